"""A folder of images with labels.csv: our own ImageFolder export, or any table of `file` and `label`."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from synthkit.bank.imports.encoded import Survey, decode, decode_rows
from synthkit.bank.imports.labels import Seen, classes_of
from synthkit.bank.imports.own import record_of, require_fit
from synthkit.bank.imports.source import ImportOptions, Rows, Source, unlabelled_error
from synthkit.errors import DataError

NAME = "labels.csv"
MAX_LINE = 8 << 20
"""Characters of one line at most: 65,536 logits take less than 1 MiB."""
_FILES = ("file", "filename", "file_name", "path", "image")
_LABELS = ("label", "class", "target")

Reader = Callable[[list[list[str]]], np.ndarray]


def open_table(root: Path, options: ImportOptions) -> Source:
    """The images that labels.csv of `root` names, in its order, with every column that a bank can hold.

    Raises:
        DataError: the table is malformed, names a file outside the folder, or an image is missing or unreadable.
    """
    where = root / NAME
    own = record_of(root, "imagefolder")
    header = next(_records(where), None)
    if header is None:
        raise DataError(f"{where}: is empty")
    if len(set(header)) < len(header):
        raise DataError(f"{where}: two columns have one name", got=header[:20])
    file = next((header.index(c) for c in _FILES if c in header), None)
    if file is None:
        raise DataError(f"{where}: no column of file names", got=header[:20], hint=f"call it {_FILES[0]}")
    label = next((header.index(c) for c in _LABELS if c in header), None)
    unlabelled = options.unlabelled or (own or {}).get("label_kind") == "none"
    if label is None and not unlabelled:
        raise unlabelled_error(str(where))
    numbers, top_k = _columns(header, str(where))
    survey, seen = Survey(str(root), options, own), Seen(str(where))
    for line, row in _rows(where, len(header)):
        survey.add(_inside(root, row[file], where, line), row[file])
        if label is not None and not unlabelled:
            seen.add(_label(row[label]), line)
    num_classes, class_names = classes_of(str(where), seen, (own or {}).get("class_names"), options, own)
    shape = survey.shape
    if options.size is None:
        require_fit(own, survey.count, shape, str(root))

    def rows() -> Iterator[Rows]:
        held: list[list[str]] = []
        for _, row in _rows(where, len(header)):
            held.append(row)
            if len(held) == decode_rows(shape):
                yield chunk(held)
                held = []
        if held:
            yield chunk(held)

    def chunk(held: list[list[str]]) -> Rows:
        names = [row[file] for row in held]
        ready: Rows = {"images": decode([root / name for name in names], names, shape, str(root))}
        if label is not None and not unlabelled:
            ready["labels"] = seen.numbers([_label(row[label]) for row in held], class_names)
        for name, read in numbers.items():
            ready[name] = read(held)
        return ready

    return Source(
        kind="imagefolder", name=root.resolve().name, count=survey.count, shape=shape, num_classes=num_classes,
        class_names=class_names, label_kind="none" if unlabelled else "real", rows=rows, top_k=top_k, own=own,
    )  # fmt: skip


def _records(path: Path) -> Iterator[list[str]]:
    """The lines of a CSV as lists of cells."""
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            yield from csv.reader(_lines(stream, path), strict=True)
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: not a readable CSV ({error})") from error


def _lines(stream, path: Path) -> Iterator[str]:
    while line := stream.readline(MAX_LINE):
        if len(line) >= MAX_LINE:
            raise DataError(f"{path}: a line of more than {MAX_LINE:,} characters")
        yield line


def _rows(path: Path, width: int) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) below the header."""
    records = _records(path)
    next(records, None)
    for line, row in enumerate(records, start=2):
        if len(row) != width:
            raise DataError(f"{path}: line {line} has {len(row)} cells, the header {width}")
        yield line, row


def _inside(root: Path, name: str, where: Path, line: int) -> Path:
    """The file that a cell names. Raises `DataError` when it leads out of the folder."""
    parts = PurePosixPath(name)
    if not name or parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name or "\0" in name:
        raise DataError(f"{where}: line {line} names a file outside the folder", got=name[:200])
    return root / name


def _label(cell: str) -> int | str:
    return int(cell) if re.fullmatch(r"-?[0-9]{1,18}", cell) else cell


def _columns(header: Sequence[str], where: str) -> tuple[dict[str, Reader], int | None]:
    """Bank column -> how to read it from rows of cells, and k of the top-k columns."""
    found: dict[str, Reader] = {}

    def reader(places: list[int], kind: str, flat: bool) -> Reader:
        def read(rows: list[list[str]]) -> np.ndarray:
            try:
                values = np.array([[row[p] for p in places] for row in rows]).astype(kind)
            except ValueError as error:
                raise DataError(f"{where}: {header[places[0]]} holds something that is no number ({error})") from error
            return values[:, 0] if flat else values

        return read

    place = {name: i for i, name in enumerate(header)}
    for name, kind in (("difficulty", "f4"), ("tail_logsumexp", "f4"), ("origin_step", "i8"), ("origin_seed", "u8")):
        if name in place:
            found[name] = reader([place[name]], kind, True)
    logits = _numbered(place, r"logit_([0-9]{1,6})", 0, where)
    if logits:
        found["logits"] = reader(logits, "f4", False)
    first, second = (_numbered(place, rf"top([0-9]{{1,6}})_{what}", 1, where) for what in ("class", "logit"))
    if len(first) != len(second):
        raise DataError(f"{where}: {len(first)} columns of top classes, but {len(second)} of their logits")
    if first:
        found["topk_index"], found["topk_logit"] = reader(first, "i8", False), reader(second, "f4", False)
    return found, len(first) or None


def _numbered(place: dict[str, int], pattern: str, start: int, where: str) -> list[int]:
    """Places of the columns `pattern`, by their number, which must run from `start` without a gap."""
    found = {int(m[1]): i for name, i in place.items() if (m := re.fullmatch(pattern, name))}
    if sorted(found) != list(range(start, start + len(found))):
        raise DataError(f"{where}: the columns {pattern} do not run from {start} without a gap")
    return [found[i] for i in sorted(found)]
