"""Data that already are arrays: `npz:FILE`, `bank:DIR` and `hf:NAME`."""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthkit.data.decode import decode_images
from synthkit.data.parquet import _labels
from synthkit.data.real import RealData, free_memory, require_memory
from synthkit.data.splits import Split, choose, missing_root, split_of_folder
from synthkit.errors import DataError, RequirementError

_IMAGE_KEYS = ("images", "x", "data")
# What numpy and zipfile raise for damaged or hostile members (numpy parses a header as Python text).
_BROKEN = (
    zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, LookupError, TypeError, RuntimeError, SyntaxError,
    ArithmeticError, tokenize.TokenError,
)  # fmt: skip
_LABEL_KEYS = ("labels", "y", "targets")


def _pairs(keys: list[str]) -> dict[str, tuple[str, str]]:
    """Split ("" when the names tell none) -> (image key, label key)."""
    found: dict[str, tuple[str, str]] = {}
    spelled = {key.lower(): key for key in keys}
    for image, label in zip(_IMAGE_KEYS, _LABEL_KEYS, strict=True):
        for part in ("", "train", "test", "val"):
            for form in ("{0}_{1}", "{1}_{0}") if part else ("{0}",):
                names = (form.format(image, part), form.format(label, part))
                if all(name in spelled for name in names):
                    found.setdefault(part, (spelled[names[0]], spelled[names[1]]))
    return found


def load_npz(path: Path, split: Split, size: tuple[int, int, int] | None, name: str) -> RealData:
    """An .npz with images/labels or x/y, plain or with `_train`/`_test`; optional `class_names`.

    Images are uint8 (N,H,W), (N,H,W,C) or (N,C,H,W).

    Raises:
        DataError: no such arrays, other types or shapes, pickled objects, or too large for memory.
    """
    if not path.is_file():
        raise missing_root(name, path)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            for entry in archive.infolist():
                _require_honest_header(archive, entry, path)
        if unpacked > 0.9 * free_memory():
            raise DataError(f"{path}: {unpacked / 2**30:.2f} GiB unpacked do not fit into memory")
        with np.load(path, allow_pickle=False) as store:
            pairs = _pairs(list(store))
            if not pairs:
                raise DataError(f"{path}: no images and labels", got=sorted(store), hint="expected images and labels")
            notes: tuple[str, ...] = ()
            if "" in pairs and len(pairs) == 1:
                chosen, taken = [pairs[""]], "all"
                notes = (f"{path} is not divided into train and test; all is used",) if split != "all" else ()
            else:
                chosen, taken = choose({key: pair for key, pair in pairs.items() if key}, split, name)
            images = torch.cat([_as_nchw(store[image], path) for image, _ in chosen])
            raw = np.concatenate([store[label].reshape(-1) for _, label in chosen])
            names = [str(text) for text in store["class_names"]] if "class_names" in store else None
    except _BROKEN as error:
        raise DataError(f"{path}: not a plain npz file ({error})", hint="write it with numpy.savez") from error
    labels, class_names = _labels(raw.tolist(), names, name)
    data = RealData(
        images=images, labels=labels, class_names=class_names, name=name, root=str(path), split=taken, notes=notes
    )
    return data.resized(size) if size else data


def _require_honest_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    """Refuse an array that claims more bytes than its member holds: numpy would allocate them before it reads."""
    if not entry.filename.endswith(".npy"):
        return
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        claimed = math.prod(shape) * dtype.itemsize
        if not dtype.hasobject and (min(shape, default=0) < 0 or stream.tell() + claimed != entry.file_size):
            raise DataError(f"{path}: {entry.filename[:100]} claims shape {shape}, which it does not hold")


def _as_nchw(array: np.ndarray, path: Path) -> torch.Tensor:
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise DataError(f"{path}: images must be uint8 (N,H,W[,C]) or (N,C,H,W)", got=f"{array.dtype} {array.shape}")
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[1] not in (1, 3):
        if array.shape[3] not in (1, 3):
            raise DataError(f"{path}: neither axis 1 nor axis 3 has 1 or 3 channels", got=array.shape)
        array = array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(array))


def load_bank(path: Path, size: tuple[int, int, int] | None, name: str) -> RealData:
    """All images of a synthkit bank with its labels; `label_source` tells that they are not real labels.

    Raises:
        DataError: no bank, no labels in it, or too large for memory.
        BankError: the bank is damaged.
    """
    from synthkit.bank import Bank

    if not (path / "bank.json").is_file():
        raise missing_root(name, path) if not path.exists() else DataError(f"bank: {path} has no bank.json")
    bank = Bank(path)
    if bank.spec.label_kind == "none":
        raise DataError(f"bank: {path} has no labels", hint="evaluate the agreement with its teacher instead")
    require_memory(name, len(bank), bank.shape)
    batch = bank.batch(np.arange(len(bank)))
    kind = bank.spec.label_kind
    notes = () if kind == "real" else (f"synthetic bank: labels are of kind {kind!r}, not real labels",)
    images = torch.from_numpy(np.ascontiguousarray(batch.images))
    data = RealData(
        images=images,
        labels=torch.from_numpy(np.asarray(batch.labels, dtype=np.int64)),
        class_names=list(bank.class_names or [str(i) for i in range(bank.num_classes)]),
        name=name,
        root=str(path),
        notes=notes,
        label_source=kind,
    )
    return data.resized(size) if size else data


def load_hub(spec: str, split: Split, size: tuple[int, int, int] | None, name: str) -> RealData:
    """A Hugging Face dataset `NAME[@REVISION]` through the `datasets` library, which keeps its own cache.

    Raises:
        RequirementError: `datasets` is missing.
        DataError: the dataset cannot be had, or has no image and label columns.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise RequirementError(
            "hf: the library `datasets` is not installed",
            hint="pip install datasets, or download the parquet files and use parquet:DIR",
        ) from error
    repo, _, revision = spec.partition("@")
    try:
        found = datasets.load_dataset(repo, revision=revision or None)
    # the library raises its own and requests' errors, all below these
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"hf: {repo} cannot be loaded ({error})", hint="check the name and the network") from error
    # a split may be named by a `NamedSplit`, which is a str to Python but not to type checkers
    parts: dict[str, Any] = {split_of_folder(str(key)) or str(key): found[key] for key in found}
    chosen, taken = choose(parts, split, name)
    features: dict[str, Any] = chosen[0].features
    image = next((key for key, kind in features.items() if type(kind).__name__ == "Image"), None)
    label = next((key for key in ("fine_label", "label", "labels") if key in features), None)
    if image is None or label is None:
        raise DataError(f"hf: {repo} has no image and label columns", got=list(features))
    encoded = [part.cast_column(image, datasets.Image(decode=False)) for part in chosen]
    rows = [row for part in encoded for row in part[image]]
    sources = [row["bytes"] if row["bytes"] is not None else Path(row["path"]) for row in rows]
    raw = [int(value) for part in encoded for value in part[label]]
    labels, names = _labels(raw, list(getattr(features[label], "names", None) or []) or None, name)
    images, stored = decode_images(sources, lambda i: f"{name} row {i}", size, name)
    return RealData(
        images=images, labels=labels, class_names=names, name=name, root=spec, split=taken, stored_shape=stored
    )
