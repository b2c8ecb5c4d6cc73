"""Which files belong to train and which to test: one rule for folders, parquet files and arrays. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from synthkit.errors import DataError

Split = Literal["train", "test", "all"]
SPLITS: tuple[Split, ...] = ("train", "test", "all")
_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
}
_T = TypeVar("_T")


def check_split(split: str) -> Split:
    """`split` itself.

    Raises:
        DataError: not train, test or all.
    """
    for known in SPLITS:
        if split == known:
            return known
    raise DataError("split: not known", got=split, allowed=SPLITS)


def split_of_folder(name: str) -> str | None:
    """train, test or val when a folder is called so, else none (`test_data` is no split folder)."""
    return _WORDS.get(name.lower())


def split_of_path(path: Path) -> str | None:
    """The split by the first word of a file's name (`train-00000-of-00001.parquet`), else by its folder's name."""
    first_word = re.split(r"[^a-z]", path.stem.lower(), maxsplit=1)[0]
    return _WORDS.get(first_word) or split_of_folder(path.parent.name)


def choose(parts: dict[str, _T], split: Split, what: str) -> tuple[list[_T], str]:
    """From parts keyed train/test/val those that `split` means, and what was taken.

    test is the part `test`, or `val` when there is no test; all is every part.

    Raises:
        DataError: the part is not there.
    """
    if split == "all":
        return [parts[key] for key in ("train", "val", "test") if key in parts], "all"
    for key in (split,) if split == "train" else ("test", "val"):
        if key in parts:
            return [parts[key]], key
    raise DataError(
        f"{what}: has no {split} part", got=sorted(parts), hint=f"use --split {next(iter(parts))}" if parts else None
    )


def refuse_other_split(what: str, path: Path, taken: str, split: Split) -> None:
    """Raise when a path names one part and the other is asked for: training images must not pass as a test.

    Raises:
        DataError: `taken` ("train", "test", "val", or "all" when the path names none) contradicts `split`.
    """
    if split != "all" and taken != "all" and (taken == "train") != (split == "train"):
        raise DataError(
            f"{what}: {path} is the {taken} part, but split {split!r} is asked for",
            hint=f"use --split {'train' if taken == 'train' else 'test'}, or --split all",
        )


def by_split(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Sorted paths grouped by `split_of_path`; those that say nothing stand under ""."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(paths):
        groups.setdefault(split_of_path(path) or "", []).append(path)
    return groups


def missing_root(what: str, root: Path) -> DataError:
    """The error for a path that is not there: names the part that is missing and what lies beside it."""
    existing = root
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return DataError(f"{what}: {root} does not exist ({existing} is a file)")
    wanted = root.relative_to(existing).parts[0]
    beside = sorted(entry.name for entry in existing.iterdir())[:200]
    return DataError(f"{what}: {root} does not exist; {existing} has no entry", got=wanted, allowed=beside)


def looked_for(what: str, root: Path, places: Sequence[str]) -> DataError:
    """The error for a folder that holds nothing that fits."""
    inside = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in root.iterdir())[:12]
    return DataError(
        f"{what}: nothing that fits in {root} (it holds {', '.join(inside) or 'nothing'})",
        hint="looked for " + "; ".join(places),
    )
