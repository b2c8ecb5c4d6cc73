"""What every importer hands over: `Source`, the facts of foreign data and a way to read its rows once, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from synthkit.bank.spec import LabelKind
from synthkit.errors import DataError, UsageError

MAX_CLASSES = 1 << 16
"""More classes than this are refused: such labels are rather file numbers or hashes than classes."""
CHUNK_BYTES = 32 << 20
"""About so many bytes of pixels are in flight while a source is read."""

Rows = dict[str, np.ndarray]
Layout = Literal["auto", "nchw", "nhwc"]
Values = Literal["auto", "unit", "byte", "normalised", "pixels", "whitened"]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the user says about foreign data."""

    size: tuple[int, int, int] | None = None
    """(C, H, W) to which every image is brought; none keeps the own size, which must be the same for all."""
    class_names: list[str] | None = None
    """Names of the classes in label order, instead of what the source tells."""
    mean: list[float] | None = None
    """Channel means in [0,1] pixel space: of the teacher, and of normalised float images."""
    std: list[float] | None = None
    """Channel standard deviations, like `mean`."""
    layout: Layout = "auto"
    """Axes of image arrays."""
    values: Values = "auto"
    """What numbers float images hold: unit [0,1]; byte [0,255]; normalised (x - mean) / std; pixels that may leave
    [0,1]. whitened (ZCA) is for our own exports, which carry the matrix."""
    real: bool | None = None
    """Whether the images are, or start from, real pixels; none: as our own export says, else yes."""
    data_free: bool = False
    """No real data was used in making them (only with `real=False`)."""
    unlabelled: bool = False
    """Take images without labels."""
    num_classes: int | None = None
    """Classes where the labels do not show them all."""
    split: Literal["train", "test", "all"] = "all"
    """The part of a source that is divided into train and test."""

    def __post_init__(self) -> None:
        if self.size is not None and (len(self.size) != 3 or self.size[0] not in (1, 3) or min(self.size) < 1):
            raise UsageError("import: --size must be C H W with C 1 or 3", got=list(self.size))
        if (self.mean is None) != (self.std is None):
            raise UsageError("import: --mean and --std go together")
        if self.data_free and self.real is not False:
            raise UsageError("import: --data-free is said of synthetic images", hint="give --synthetic too")


@dataclass(kw_only=True)
class Source:
    """Foreign data after the first look: no pixel has been copied, but every number here was counted."""

    kind: str
    """Format name."""
    name: str
    """Base name of the file or folder; no path, which would tell about the machine."""
    count: int
    """Images."""
    shape: tuple[int, int, int]
    """(C, H, W) of the images that `rows` yields."""
    num_classes: int
    """Classes."""
    rows: Callable[[], Iterator[Rows]]
    """Reads the source from the start: chunks of bank columns, images uint8 (n,C,H,W), `count` rows in order."""
    class_names: list[str] | None = None
    """One name per class."""
    label_kind: LabelKind = "real"
    """What the labels are."""
    top_k: int | None = None
    """k of top-k columns."""
    transform: tuple[dict[str, np.ndarray], dict[str, Any]] | None = None
    """(arrays, meta) of the transform of images_f16."""
    transform_facts: dict[str, Any] = field(default_factory=lambda: {"kind": "affine"})
    """What bank.json says of it, beside the hash of its arrays."""
    mean: list[float] | None = None
    """Normalisation that the source itself tells."""
    std: list[float] | None = None
    """Like `mean`."""
    learning_rate: float | None = None
    """Learning rate that a distilled set is to be trained with."""
    own: dict[str, Any] | None = None
    """The bank record of a bank that synthkit exported (`own.py`), else none."""
    notes: list[str] = field(default_factory=list)
    """What the user should know."""


def chunk_rows(row_bytes: int) -> int:
    """Rows per chunk for rows of `row_bytes` bytes."""
    return max(1, min(4096, CHUNK_BYTES // max(1, row_bytes)))


def settle_classes(
    what: str, largest: int, names: Sequence[str] | None, options: ImportOptions
) -> tuple[int, list[str] | None]:
    """(num_classes, class_names) from the largest label, what the source tells and what the user says.

    Raises:
        DataError: a label without a name, or more than 65,536 classes.
    """
    chosen = list(options.class_names) if options.class_names is not None else list(names) if names else None
    if options.num_classes is not None and chosen is not None and len(chosen) != options.num_classes:
        raise DataError(f"{what}: {len(chosen)} class names for --num-classes {options.num_classes}")
    count = len(chosen) if chosen is not None else options.num_classes or largest + 1
    if max(count, largest + 1) > MAX_CLASSES:
        raise DataError(f"{what}: more than {MAX_CLASSES} classes", got=max(count, largest + 1),
                        hint="are these labels, or numbers of files?")  # fmt: skip
    if largest >= count:
        raise DataError(f"{what}: labels run to {largest}, but there are {count} classes",
                        hint="give --class-names or --num-classes that cover them")  # fmt: skip
    return count, chosen


def unlabelled_error(what: str) -> DataError:
    """The error for data without labels."""
    return DataError(f"{what}: has no labels", hint="give --unlabelled to import the images alone")


def refuse_link(path: Path) -> Path:
    """`path` itself unless it is a link. Raises `DataError`."""
    if path.is_symlink():
        raise DataError(f"{path}: is a link; an import follows none", hint="name the file itself, or copy it")
    return path


def one_file(path: Path, suffix: str) -> Path:
    """`path`, or the one file with `suffix` in it when it is a folder. Raises `DataError`."""
    if not path.is_dir():
        return path
    found = sorted(p for p in path.iterdir() if p.suffix.lower() == suffix)
    if len(found) != 1:
        raise DataError(f"{path}: holds {len(found)} files *{suffix}", hint="name the one to import")
    return refuse_link(found[0])


def refuse_inner_links(root: Path) -> None:
    """Raise `DataError` when anything below the folder `root` is a link: it could lead to any file of this machine."""
    import os

    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            refuse_link(Path(folder) / name)
