"""WebDataset: tar files whose members `KEY.png`, `KEY.cls`, `KEY.json` stand one behind the other. Nothing is unpacked.

Members are read from the stream by the sizes in their headers; a name never touches the disk, and what is no regular
file (links, devices) is refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from synthkit.bank.imports.encoded import MAX_FILE, Survey, decode, decode_rows
from synthkit.bank.imports.labels import Seen, classes_of
from synthkit.bank.imports.own import FILE, record_of, require_fit
from synthkit.bank.imports.source import ImportOptions, Rows, Source, refuse_link, unlabelled_error
from synthkit.bank.shard import COLUMNS
from synthkit.data.splits import by_split, choose
from synthkit.errors import DataError

_IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "pgm")
_LABELS = ("cls", "label", "cls.txt")
_EXTRA = tuple(name for name in COLUMNS if name not in ("images", "labels"))
MAX_SMALL = 16 << 20
"""Bytes at most of a member that is not an image."""

Sample = dict[str, Any]


def open_source(path: Path, options: ImportOptions) -> Source:
    """A tar file, or a folder of them in the order of their names.

    Raises:
        DataError: a damaged tar, a link in it, images without labels, or samples with other members than the first.
    """
    files = _files(refuse_link(path), options)
    own = record_of(path, "webdataset")
    unlabelled = options.unlabelled or (own or {}).get("label_kind") == "none"
    survey, seen = Survey(str(path), options, own), Seen(str(path))
    columns: set[str] | None = None
    for where, sample in _samples(files):
        survey.add(sample["image"], where)
        if not unlabelled:
            if "label" not in sample:
                raise unlabelled_error(where)
            seen.add(sample["label"], survey.count - 1)
        extra = {k for k in sample if k in _EXTRA}
        columns = extra if columns is None else columns & extra
        top_k = len(sample["topk_index"]) if "topk_index" in sample else None
    shape = survey.shape
    if options.size is None:
        require_fit(own, survey.count, shape, str(path))
    names = own["class_names"] if own else _names_beside(files[0].parent)
    num_classes, class_names = classes_of(str(path), seen, names, options, own)
    kept = sorted(columns or ())

    def rows() -> Iterator[Rows]:
        step = decode_rows(shape)
        held: list[tuple[str, Sample]] = []
        for item in _samples(files):
            held.append(item)
            if len(held) == step:
                yield chunk(held)
                held = []
        if held:
            yield chunk(held)

    def chunk(held: list[tuple[str, Sample]]) -> Rows:
        ready: Rows = {"images": decode([s["image"] for _, s in held], [w for w, _ in held], shape, str(path))}
        if not unlabelled:
            ready["labels"] = seen.numbers([s["label"] for _, s in held], class_names)
        for name in kept:
            values = [np.asarray(s[name]) for _, s in held]
            if len({v.shape for v in values}) != 1:
                raise DataError(f"{held[0][0]}: {name} differs in length from sample to sample")
            ready[name] = np.stack(values)
        return ready

    return Source(
        kind="webdataset", name=path.resolve().name, count=survey.count, shape=shape, num_classes=num_classes,
        class_names=class_names, label_kind="none" if unlabelled else "real", rows=rows,
        top_k=top_k if "topk_index" in kept else None, own=own,
    )  # fmt: skip


def _files(path: Path, options: ImportOptions) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.tar")) or sorted(path.glob("*/*.tar"))
    if not found:
        raise DataError(f"{path}: no .tar files in it")
    groups = by_split(refuse_link(f) for f in found)
    if set(groups) == {""}:
        return groups[""]
    groups.pop("", None)
    return [file for group in choose(groups, options.split, str(path))[0] for file in group]


def _samples(files: list[Path]) -> Iterator[tuple[str, Sample]]:
    """(where, fields) of every sample: image bytes, label, and numbers by column name."""
    for file in files:
        key, sample, where = None, {}, ""
        for name, data in _members(file):
            folder, _, base = name.rpartition("/")
            stem, _, ending = base.partition(".")
            if not stem or not ending or base == FILE:
                continue
            if (folder, stem) != key:
                if "image" in sample:
                    yield where, sample
                key, sample, where = (folder, stem), {}, f"{file}: {name}"
            _put(sample, ending.lower(), data, f"{file}: {name}")
        if "image" in sample:
            yield where, sample


def _members(file: Path) -> Iterator[tuple[str, bytes]]:
    # Uncompressed only, as WebDataset's own tools write it: extended headers are read at once, and those of a
    # compressed tar can unfold to any size. Of a plain tar they are bounded by `_Bounded`.
    with _tar_errors(file), open(file, "rb") as raw, _opened(raw, file) as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it remembers each; a million would fill the memory
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise DataError(f"{file}: {member.name[:200]} is a link or a device", hint="only plain files are read")
            image = member.name.rpartition(".")[2].lower() in (*_IMAGES, "npy")
            if member.size > (MAX_FILE if image else MAX_SMALL):
                raise DataError(f"{file}: {member.name[:200]} has {member.size:,} bytes")
            stream = archive.extractfile(member)
            data = stream.read() if stream else b""
            if len(data) != member.size:
                raise DataError(f"{file}: {member.name[:200]} ends early", hint="the tar is truncated")
            yield member.name, data


def _opened(raw: IO[bytes], file: Path) -> tarfile.TarFile:
    return tarfile.open(fileobj=cast(IO[bytes], _Bounded(raw, file)), mode="r:")


class _Bounded:
    """A file whose single reads are bounded: a header of a sparse tar may claim (and cost) any number of bytes."""

    def __init__(self, raw: IO[bytes], where: Path):
        self._raw, self._where = raw, where
        self.seek, self.tell, self.name = raw.seek, raw.tell, str(where)

    def read(self, size: int = -1) -> bytes:
        """At most `MAX_FILE` bytes at once."""
        if not 0 <= size <= MAX_FILE:
            raise DataError(f"{self._where}: a header of the tar claims {size:,} bytes")
        return self._raw.read(size)


@contextlib.contextmanager
def _tar_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{file}: not a whole tar file ({str(error)[:120]})", hint="get it again") from error


def _put(sample: Sample, ending: str, data: bytes, where: str) -> None:
    if ending in _IMAGES:
        if "image" in sample:
            raise DataError(f"{where}: a second image of one sample")
        sample["image"] = data
    elif ending in _LABELS:
        text = data[:1000].decode("utf-8", "replace").strip()
        sample["label"] = int(text) if text.lstrip("-").isascii() and text.lstrip("-").isdigit() else text
    elif ending == "json":
        sample.update(_fields(data, where))
    elif ending == "npy":
        sample["image"] = _array(data, where)
    elif ending.removesuffix(".npy") in _EXTRA and ending.endswith(".npy"):
        sample[ending.removesuffix(".npy")] = _array(data, where)


def _fields(data: bytes, where: str) -> Sample:
    from synthkit.bank.disk.storage import parse_json
    from synthkit.errors import BankError

    try:
        raw = parse_json(data, where)
    except BankError as error:
        raise DataError(str(error)) from error
    found = {k: v for k, v in raw.items() if k in _EXTRA and v is not None}
    for key, value in found.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers):
            raise DataError(f"{where}: {key} must be numbers", got=json.dumps(value)[:80])
    if isinstance(raw.get("label"), (int, str)) and not isinstance(raw.get("label"), bool):
        found["label"] = raw["label"]
    return found


def _array(data: bytes, where: str) -> np.ndarray:
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (
        ValueError,
        OSError,
        EOFError,
        SyntaxError,
        TypeError,
        tokenize.TokenError,
        RecursionError,
        MemoryError,
    ) as error:
        raise DataError(f"{where}: not a plain .npy array ({' '.join(str(error).split())[:120]})") from error
    if array.dtype.kind not in "iuf":
        raise DataError(f"{where}: must hold numbers", got=str(array.dtype))
    return array


def _names_beside(folder: Path) -> list[str] | None:
    from synthkit.data.parquet import names_beside

    return names_beside(folder / "any")
