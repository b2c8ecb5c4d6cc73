"""`load_data`: from a data spec such as `cifar10:DIR` to images and labels in memory."""

from __future__ import annotations

import glob
from pathlib import Path

import torch

from synthkit.data import arrays, cifar, idx
from synthkit.data.folder import is_image_folder, load_folder
from synthkit.data.parquet import find_parquet, load_parquet
from synthkit.data.real import RealData
from synthkit.data.splits import Split, check_split, looked_for, missing_root
from synthkit.data.stats import CLASS_NAMES
from synthkit.errors import DataError

__all__ = ["KINDS", "RealData", "load_data", "parse_spec"]

KINDS = ("mnist", "cifar10", "cifar100", "imagefolder", "parquet", "hf", "bank", "npz")


def parse_spec(spec: str) -> tuple[str, str]:
    """(kind, rest) of `KIND:REST`.

    Raises:
        DataError: no kind, an unknown kind, or nothing behind it.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or (len(kind) == 1 and rest[:1] in "/\\"):  # C:\data is a path, not a kind
        guess = _guess(Path(spec).expanduser())
        where = "DIR (for example cifar10:data)"
        hint = f"try {guess}" if guess else f"write KIND:{where}; kinds are {', '.join(KINDS)}"
        if spec in KINDS:
            hint = f"say where it lies: {spec}:DIR"
        raise DataError("data: a spec is KIND:PATH", got=spec, hint=hint)
    if kind not in KINDS:
        raise DataError("data: unknown kind", got=kind, allowed=KINDS, hint="synthkit list datasets")
    if not rest:
        raise DataError(f"data: {kind}: needs a path or name behind the colon", got=spec)
    return kind, rest


def _guess(path: Path) -> str | None:
    if path.suffix in (".parquet", ".npz") and path.is_file():
        return f"{path.suffix[1:]}:{path}"
    if not path.is_dir():
        return None
    if (path / "bank.json").is_file():
        return f"bank:{path}"
    if idx.find_mnist(path):
        return f"mnist:{path}"
    for kind in ("cifar10", "cifar100"):
        if cifar.find_cifar(kind, path):
            return f"{kind}:{path}"
    if is_image_folder(path):
        return f"imagefolder:{path}"
    return f"parquet:{path}" if find_parquet(path) else None


def load_data(spec: str, split: Split = "test", *, size: tuple[int, int, int] | None = None) -> RealData:
    """Read the data set that `spec` names, whole, into memory.

    Args:
        spec: `mnist:DIR`, `cifar10:DIR`, `cifar100:DIR` (the official files, an ImageFolder or parquet files below
            DIR), `imagefolder:DIR[/SPLIT]`, `parquet:FILE_OR_GLOB_OR_DIR`, `npz:FILE`, `bank:DIR`, `hf:NAME`.
        split: train, test (val when there is no test) or all. A source without splits is taken whole, which
            `RealData.notes` says; a path that names the other split is refused. `RealData.split` is what was read.
        size: (C,H,W) of the images by `resize_images` (once, at loading); none keeps the own size.

    Returns:
        images uint8 (N,C,H,W), labels int64 (N,), class names; nothing is cached on disk.

    Raises:
        DataError: the spec, the path or a file is wrong, or the images do not fit into free memory.
        RequirementError: an optional library is missing (pyarrow, datasets).
        BankError: the bank is damaged.
    """
    kind, rest = parse_spec(spec)
    split = check_split(split)
    if size is not None and (len(size) != 3 or size[0] not in (1, 3) or min(size) < 1):
        raise DataError("size: must be (C, H, W) with C 1 or 3", got=size)
    path = Path(rest).expanduser()
    if kind in CLASS_NAMES:
        return _standard(kind, path, split, size)
    if kind == "parquet":
        return load_parquet(rest, split, size, spec)
    if kind == "npz":
        return arrays.load_npz(path, split, size, spec)
    if kind == "bank":
        return arrays.load_bank(path, size, spec)
    if kind == "hf":
        return arrays.load_hub(rest, split, size, spec)
    return _image_folder(path, split, size, spec)


def _image_folder(path: Path, split: Split, size: tuple[int, int, int] | None, spec: str) -> RealData:
    if not path.is_dir():
        raise missing_root("imagefolder", path)
    if not is_image_folder(path):
        other = _guess(path)
        error = looked_for("imagefolder", path, ["CLASS/*.png", "train/CLASS/*.png", "test/CLASS/*.png"])
        raise DataError(f"{error}; try {other}" if other else str(error))
    return load_folder(path, split, size, spec)


def _standard(kind: str, root: Path, split: Split, size: tuple[int, int, int] | None) -> RealData:
    """A data set with known classes, in whichever form it lies below `root`."""
    if root.is_file() and root.suffix == ".parquet" or glob.has_magic(str(root)):
        return load_parquet(str(root), split, size, kind, CLASS_NAMES[kind])
    if not root.is_dir():
        raise missing_root(kind, root)
    native = idx.find_mnist(root) if kind == "mnist" else cifar.find_cifar(kind, root)
    if native is not None:
        return _native(kind, native, split, size)
    if is_image_folder(root):
        return load_folder(root, split, size, kind, CLASS_NAMES[kind])
    if find_parquet(root):
        return load_parquet(str(root), split, size, kind, CLASS_NAMES[kind])
    places = (
        [f"{below or '.'}/train-images-idx3-ubyte[.gz]" for below in idx.FOLDERS]
        if kind == "mnist"
        else [f"{table[kind].folder}/" for table in cifar.LAYOUTS.values()]
    )
    raise looked_for(kind, root, [*places, "train/CLASS/*.png", "train*.parquet"])


def _native(kind: str, native: Path | tuple[str, Path], split: Split, size: tuple[int, int, int] | None) -> RealData:
    wanted = ("train", "test") if split == "all" else (split,)
    if isinstance(native, tuple):
        folder = native[1]
        parts = [cifar.read_cifar(kind, native[0], folder, one) for one in wanted]
    else:
        folder = native
        parts = [idx.read_mnist(folder, one) for one in wanted]
    images = torch.cat([part[0] for part in parts]) if len(parts) > 1 else parts[0][0]
    labels = torch.cat([part[1] for part in parts])
    data = RealData(
        images=images, labels=labels, class_names=list(CLASS_NAMES[kind]), name=kind, root=str(folder), split=split
    )
    return data.resized(size) if size else data
