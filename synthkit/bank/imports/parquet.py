"""Parquet in the Hugging Face layout: `image` {bytes, path} and `label` (ClassLabel names in the metadata)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank.imports.encoded import Survey, decode, decode_rows
from synthkit.bank.imports.labels import Seen, classes_of
from synthkit.bank.imports.own import record_of, require_fit
from synthkit.bank.imports.source import ImportOptions, Rows, Source, refuse_link, unlabelled_error
from synthkit.bank.shard import COLUMNS
from synthkit.errors import DataError

MAX_GROUP = 2 << 30
"""Bytes of one unpacked row group at most: a reader has to hold one of them."""
_EXTRA = tuple(name for name in COLUMNS if name not in ("images", "labels"))


def open_source(path: Path, options: ImportOptions) -> Source:
    """A file, a folder of files or a glob of them; files of one split in the order of their names.

    Raises:
        DataError: nothing found, no image or label column, row groups too large to hold, or unreadable images.
        RequirementError: pyarrow is missing.
    """
    from synthkit.data.parquet import names_beside, pyarrow_parquet, select_files

    files = [refuse_link(f) for f in select_files(str(path), options.split, str(path))[0]]
    reader = pyarrow_parquet()
    tables = [_Table(reader, file) for file in files]
    own = record_of(path, "parquet") if path.exists() else None
    unlabelled = options.unlabelled or (own or {}).get("label_kind") == "none"
    if not unlabelled and any(t.label is None for t in tables):
        raise unlabelled_error(str(path))
    survey, seen = Survey(str(path), options, own), Seen(str(path))
    for table in tables:
        for number, image, label in table.heads(not unlabelled):
            survey.add(image, f"{table.path} row {number}")
            if not unlabelled:
                seen.add(label, number)
    names = own["class_names"] if own else tables[0].names or names_beside(files[0])
    num_classes, class_names = classes_of(str(path), seen, names, options, own)
    shape = survey.shape
    if options.size is None:
        require_fit(own, survey.count, shape, str(path))
    extra = [c for c in _EXTRA if all(c in t.extra for t in tables)]

    def rows() -> Iterator[Rows]:
        for table in tables:
            for chunk in table.chunks(decode_rows(shape), not unlabelled, extra):
                images = decode(chunk.pop("images"), chunk.pop("where"), shape, str(path))
                if "labels" in chunk:
                    chunk["labels"] = seen.numbers(chunk["labels"], class_names)
                yield {"images": images, **chunk}

    return Source(
        kind="parquet", name=path.name if path.exists() else files[0].parent.name, count=survey.count, shape=shape,
        num_classes=num_classes, class_names=class_names, label_kind="none" if unlabelled else "real", rows=rows,
        top_k=tables[0].width("topk_index") if "topk_index" in extra else None, own=own,
    )  # fmt: skip


class _Table:
    """One parquet file."""

    def __init__(self, reader: Any, path: Path):
        from synthkit.data.parquet import image_columns, label_columns, rows_at_once, schema_names

        self.path, self._reader = path, reader
        with self._open() as file:
            self._schema = file.schema_arrow
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
            images, labels = image_columns(self._schema), label_columns(self._schema)
            if not images:
                raise DataError(f"{path}: no column of image bytes", got=list(self._schema.names)[:20])
            self.image, self.label = images[0], labels[0] if labels else None
        if sizes and max(sizes) > MAX_GROUP:
            raise DataError(f"{path}: a row group of {max(sizes) / 2**30:.1f} GiB", hint="cap: 2 GiB; write it anew")
        self._most = rows_at_once(max(sizes, default=0))
        metadata = self._schema.metadata or {}
        self.names = schema_names(metadata, self.label) if self.label else None
        self.extra = [c for c in _EXTRA if c in self._schema.names]

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        import pyarrow

        try:
            with self._reader.ParquetFile(self.path) as file:
                yield file
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
            raise DataError(f"{self.path}: not a readable parquet file ({reason})", hint="get it again") from error

    def _batches(self, columns: list[str], rows: int) -> Iterator[Any]:
        with self._open() as file:
            yield from file.iter_batches(batch_size=min(rows, self._most), columns=columns)

    def heads(self, labels: bool) -> Iterator[tuple[int, bytes, Any]]:
        """(row number, image bytes, label) of every row."""
        number = 0
        for batch in self._batches([self.image, *([self.label] if labels and self.label else [])], self._most):
            given = batch.column(self.label).to_pylist() if labels else [None] * len(batch)
            for image, label in zip(self._bytes(batch, number), given, strict=True):
                yield number, image, label
                number += 1

    def chunks(self, rows: int, labels: bool, extra: list[str]) -> Iterator[dict[str, Any]]:
        """Image bytes under "images", what to call them under "where", labels and further columns."""
        number = 0
        columns = [self.image, *([self.label] if labels and self.label else []), *extra]
        for batch in self._batches(columns, rows):
            images = self._bytes(batch, number)
            where = [f"{self.path} row {number + i}" for i in range(len(images))]
            chunk: dict[str, Any] = {"images": images, "where": where}
            if labels:
                chunk["labels"] = batch.column(self.label).to_pylist()
            for name in extra:
                chunk[name] = _numbers(batch.column(name), self.path, name)
            number += len(images)
            yield chunk

    def _bytes(self, batch: Any, number: int) -> list[bytes]:
        import pyarrow

        from synthkit.data.parquet import binary_values

        column = batch.column(self.image)
        images = binary_values(column.field("bytes") if pyarrow.types.is_struct(column.type) else column)
        if any(image is None for image in images):
            row = number + images.index(None)
            raise DataError(f"{self.path}: row {row} holds no image bytes (only a path?)", hint="store the bytes")
        return images

    def width(self, column: str) -> int:
        """Numbers per row of a list column."""
        for batch in self._batches([column], 1):
            return _numbers(batch.column(column), self.path, column).shape[1]
        return 0


def _numbers(column: Any, path: Path, name: str) -> np.ndarray:
    """(N,) or (N, k, ...) of a column of numbers or of equally long lists of numbers."""
    import pyarrow

    shape = [len(column)]
    if column.null_count:
        raise DataError(f"{path}: {name} has empty rows")
    while pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type) or (
            pyarrow.types.is_fixed_size_list(column.type)):  # fmt: skip
        length = column.value_lengths() if not pyarrow.types.is_fixed_size_list(column.type) else None
        widths = {column.type.list_size} if length is None else set(length.to_pylist())
        if len(widths) != 1:
            raise DataError(f"{path}: the lists of {name} differ in length", got=sorted(map(str, widths))[:5])
        shape.append(widths.pop())
        column = column.flatten()
    kind = column.type
    if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)) or column.null_count:
        raise DataError(f"{path}: {name} must hold numbers", got=str(kind))
    return np.asarray(column.to_numpy(zero_copy_only=False)).reshape(shape)
