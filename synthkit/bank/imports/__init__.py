"""Foreign data into a bank: one file per format, each handing over a `Source`; `write` makes the bank. No torch here.

>>> from synthkit.bank.imports import import_bank
>>> import_bank("photos/", "banks/photos")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from synthkit.bank.imports.own import export_format
from synthkit.bank.imports.source import ImportOptions, Source
from synthkit.errors import DataError, UsageError

if TYPE_CHECKING:
    from synthkit.bank.reader import Bank

# format -> (module, what it is). Adding a format is one line here, one in `guess`, and one module with `open_source`.
IMPORTERS: dict[str, tuple[str, str]] = {
    "imagefolder": ("imagefolder", "one folder of images per class, perhaps below train/ and test/; or labels.csv"),
    "parquet": ("parquet", "the Hugging Face layout: image.bytes and label"),
    "npz": ("npz", "arrays images and labels, or x and y"),
    "pt": ("pt", "tensors (images, labels, lr) of dataset distillation; weights_only"),
    "safetensors": ("tensors", "tensors images and labels"),
    "webdataset": ("webdataset", "tar files with KEY.png and KEY.cls"),
    "mds": ("mds", "MosaicML streaming shards with index.json"),
}

_SUFFIXES = {".npz": "npz", ".pt": "pt", ".pth": "pt", ".safetensors": "safetensors", ".parquet": "parquet",
             ".tar": "webdataset"}  # fmt: skip

__all__ = ["IMPORTERS", "ImportOptions", "guess", "import_bank", "open_source"]


def guess(path: Path) -> str:
    """The format of what lies at `path`, by its name and by the names in the folder.

    Raises:
        DataError: there is nothing, or nothing known.
    """
    if not path.exists():
        raise DataError(f"{path}: does not exist")
    if path.is_file():
        if path.suffix.lower() in _SUFFIXES:
            return _SUFFIXES[path.suffix.lower()]
        raise DataError(f"{path}: what format is it?", got=path.suffix, hint=f"give --format: {', '.join(IMPORTERS)}")
    if (path / "bank.json").exists():
        raise DataError(f"{path}: is a bank already", hint="copy the folder, or use: synthkit bank merge")
    ours = export_format(path)
    if ours in IMPORTERS:
        return ours
    if (path / "index.json").is_file():
        return "mds"
    if (path / "labels.csv").is_file():
        return "imagefolder"
    inside = _glance(path)
    for suffix in (".tar", ".parquet", ".npz", ".safetensors"):
        if any(p.suffix == suffix for p in inside):
            return _SUFFIXES[suffix]
    if any((path / name).is_file() for name in ("images_best.pt", "images.pt", "images_last.pt")):
        return "pt"
    if any(p.is_dir() for p in inside):
        return "imagefolder"
    raise DataError(f"{path}: nothing in it is of a known format", hint=f"give --format: {', '.join(IMPORTERS)}")


def _glance(folder: Path, most: int = 100) -> list[Path]:
    """What lies in `folder`, and the first things in its first folders: enough to know the kind, of any size."""
    top = sorted(folder.iterdir())
    return top + [p for place in top[:most] if place.is_dir() for p in itertools.islice(place.iterdir(), most)]


def open_source(src: str | Path, format: str = "auto", options: ImportOptions | None = None) -> Source:
    """Look at foreign data: count it and check it, without copying a pixel.

    Raises:
        UsageError: no such format. DataError: the data are damaged, hostile or unclear; the message says what to give.
    """
    path = Path(src).expanduser()
    if format != "auto" and format not in IMPORTERS:
        raise UsageError("import: no such format", got=format, allowed=["auto", *IMPORTERS])
    kind = guess(path) if format == "auto" else format
    if not path.exists() and kind != "parquet":  # parquet takes a glob
        raise DataError(f"{path}: does not exist")
    module = importlib.import_module(f"synthkit.bank.imports.{IMPORTERS[kind][0]}")
    return module.open_source(path, options or ImportOptions())


def import_bank(
    src: str | Path,
    out: str | Path,
    format: str = "auto",
    options: ImportOptions | None = None,
    *,
    said: Callable[[Source], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Bank:
    """Make a bank at `out` of foreign data at `src`; memory stays bounded whatever its size.

    Without `options.real` the bank is labelled as containing real pixels, unless it is an export of ours that says
    otherwise.

    Args:
        said: is called with the source before any pixel is copied (to print an estimate).
        progress: is called with the number of images after every shard.

    Raises:
        UsageError, DataError: see `open_source`. OutputExistsError, StorageError: `out` exists, or has no room.
    """
    from synthkit.bank.disk.storage import require_free
    from synthkit.bank.imports.write import write

    require_free(Path(out))  # before hours of reading
    options = options or ImportOptions()
    source = open_source(src, format, options)
    if said:
        said(source)
    return write(source, options, out, progress)
