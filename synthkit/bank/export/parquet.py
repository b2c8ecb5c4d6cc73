"""Parquet as the Hugging Face Hub lays it out: data/train-00000-of-000NN.parquet and a dataset card. Needs pyarrow."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank.export.base import Format, need_range, worked
from synthkit.bank.export.names import unique_names
from synthkit.bank.export.png import LEVEL, Piece, check_png, encode_png, png_bytes, png_rows, png_workers
from synthkit.errors import RequirementError, UsageError

GROUP_BYTES, GROUP_ROWS = 16 << 20, 4096  # of a row group, before PNG: what the writer holds in memory
MAX_FILES = 99_999

# column of the bank -> (column of the table, type of Hugging Face's features, which numpy and Arrow name alike)
COLUMNS = {
    "logits": ("logits", "float32"),
    "difficulty": ("difficulty", "float32"),
    "origin_step": ("origin_step", "uint32"),
    "origin_seed": ("origin_seed", "uint64"),
    "topk_index": ("topk_index", "int32"),
    "topk_logit": ("topk_logit", "float32"),
    "tail_logsumexp": ("tail_logsumexp", "float32"),
}


@dataclass(frozen=True, kw_only=True)
class ParquetOptions:
    """How the files are written."""

    shard_bytes: int = 500_000_000
    """About this many bytes per file."""
    split: str = "train"
    """Name of the split: data/SPLIT-00000-of-00001.parquet."""
    title: str | None = None
    """Title of the dataset card; none makes one from method and teacher."""
    compress_level: int = LEVEL
    """zlib level of the PNGs, 0 to 9; they are lossless at any."""


class Parquet(Format):
    """Columns image {bytes, path}, label (ClassLabel), logits (float16 of the bank as float32, exactly), difficulty."""

    Options = ParquetOptions
    carries = ("images", "labels", *COLUMNS)

    def check(self) -> None:
        """See `Format.check`."""
        _pyarrow()
        options = self.options
        need_range("shard_bytes", options.shard_bytes, 1, 1 << 50)
        if not re.fullmatch(r"[A-Za-z0-9_]{1,40}", options.split):
            raise UsageError("export: split must be letters, digits and _", got=options.split)
        self.notes += check_png(self.source, options.compress_level, "parquet", "safetensors or npz")
        if self.files > MAX_FILES:
            raise UsageError("export: more than 99,999 parquet files", got=self.files, hint="raise shard_bytes")
        changed = [i for i, (a, b) in enumerate(zip(self.source.names, self._names, strict=True)) if a != b]
        if "labels" not in self.columns:
            self.notes.append("the bank has no labels: there is no column label")
        elif changed:
            shown = ", ".join(map(str, changed[:8])) + (", ..." if len(changed) > 8 else "")
            self.notes.append(f"class names must all differ here: those of {shown} got their number behind them")

    @functools.cached_property
    def _names(self) -> list[str]:
        return unique_names(self.source.names)

    def estimate(self) -> int:
        """See `Format.estimate`."""
        return self._bytes + self.files * (8192 + 64 * self.source.spec.num_classes)

    @functools.cached_property
    def _bytes(self) -> int:
        numbers = sum(int(np.prod(self.source.row_shape(c))) for c in self.columns if c in COLUMNS)
        row = 8 + 24 + 8 * numbers
        return png_bytes(self.source, self.options.compress_level) + self.source.count * row

    @functools.cached_property
    def rows_per_file(self) -> int:
        """Rows of every file but the last: from the estimate, so that the number of files is known beforehand."""
        return max(1, int(self.options.shard_bytes / (self._bytes / self.source.count)))

    @property
    def files(self) -> int:
        """Number of files."""
        return -(-self.source.count // self.rows_per_file)

    def write(self, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
        """See `Format.write`."""
        import pyarrow

        arrow = _pyarrow()
        (folder / "data").mkdir()
        schema, names = self._schema(pyarrow), []
        group = max(1, min(GROUP_ROWS, GROUP_BYTES // self.source.row_bytes(self.columns)))
        work = functools.partial(_table, schema, self.options.compress_level, max(8, len(str(self.source.count - 1))))
        pieces = self.source.pieces(self.columns, png_rows(self.source), cut=self.rows_per_file)
        plain = ["image.list.element.bytes", "image.bytes"]  # PNG is compressed already
        packing: Any = {name: "none" if name in plain else "zstd" for name in _leaves(schema, pyarrow)}
        writer, held = None, []
        try:
            with worked(pieces, work, png_workers(self.source, self.workers)) as tables:
                for first, table in tables:
                    if first % self.rows_per_file == 0:
                        self._flush(writer, held, last=True)
                        number = first // self.rows_per_file
                        names.append(f"data/{self.options.split}-{number:05d}-of-{self.files:05d}.parquet")
                        writer = arrow.ParquetWriter(folder / names[-1], schema, compression=packing)
                    held.append(table)
                    if sum(map(len, held)) >= group:
                        self._flush(writer, held)
                    advance(len(table))
            self._flush(writer, held, last=True)
            writer = None
        finally:
            if writer is not None:
                writer.close()
        return {"data": names, "rows_per_file": self.rows_per_file}

    def _flush(self, writer: Any, held: list[Any], *, last: bool = False) -> None:
        """Write the tables held as one row group; close the file after its last."""
        import pyarrow

        if held:
            table = pyarrow.concat_tables(held).combine_chunks()
            writer.write_table(table, row_group_size=len(table))
            held.clear()
        if last and writer is not None:
            writer.close()

    def _schema(self, pyarrow: Any) -> Any:
        fields = [pyarrow.field("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))]
        features: dict[str, Any] = {"image": {"_type": "Image"}}
        if "labels" in self.columns:
            fields.append(pyarrow.field("label", pyarrow.int64()))
            features["label"] = {"names": self._names, "_type": "ClassLabel"}
        for column in (c for c in self.columns if c in COLUMNS):
            name, kind = COLUMNS[column]
            leaf: dict[str, Any] = {"dtype": kind, "_type": "Value"}
            shape, dtype = self.source.row_shape(column), getattr(pyarrow, kind)()
            if shape:  # "Sequence" is read by all releases of datasets; new ones turn it into their List
                leaf, dtype = {"feature": leaf, "length": shape[0], "_type": "Sequence"}, pyarrow.list_(dtype, shape[0])
            features[name] = leaf
            fields.append(pyarrow.field(name, dtype))
        meta = {"huggingface": json.dumps({"info": {"features": features}}, ensure_ascii=True)}
        return pyarrow.schema(fields, metadata=meta)

    @property
    def title(self) -> str | None:  # type: ignore[override]  # an option here
        """Title of the dataset card."""
        return self.options.title

    @property
    def hub_split(self) -> str:  # type: ignore[override]
        """The split."""
        return self.options.split

    @property
    def hub_files(self) -> str:  # type: ignore[override]
        """Pattern of the files."""
        return f"data/{self.options.split}-*"

    def usage(self) -> str:
        """See `Format.usage`."""
        return (
            "from datasets import load_dataset\n\n"
            f'data = load_dataset("DIR", split="{self.options.split}")  # a folder, or OWNER/NAME on the Hub\n'
            'data[0]["image"]'
        )


def _table(schema: Any, level: int, width: int, piece: Piece) -> tuple[int, Any]:
    """(number of the first row, Arrow table) of one piece."""
    import pyarrow

    first, rows = piece
    count = len(rows["images"])
    files = pyarrow.array([encode_png(image, level) for image in rows["images"]], pyarrow.binary())
    paths = pyarrow.array([f"{first + i:0{width}d}.png" for i in range(count)], pyarrow.string())
    arrays = [pyarrow.StructArray.from_arrays([files, paths], fields=list(schema.field("image").type))]
    if "labels" in rows:
        arrays.append(pyarrow.array(rows["labels"].astype(np.int64)))
    for column in (c for c in COLUMNS if c in rows):
        values = rows[column].astype(COLUMNS[column][1])
        flat = pyarrow.array(values.reshape(-1))
        arrays.append(pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1]) if values.ndim == 2 else flat)
    by_name = dict(zip(_order(rows), arrays, strict=True))
    return first, pyarrow.Table.from_arrays(
        [by_name[name].cast(schema.field(name).type) for name in schema.names], schema=schema
    )


def _order(rows: dict[str, np.ndarray]) -> list[str]:
    return ["image", *(["label"] if "labels" in rows else []), *(COLUMNS[c][0] for c in COLUMNS if c in rows)]


def _leaves(schema: Any, pyarrow: Any) -> list[str]:
    """Parquet paths of the columns, as the writer's `compression` names them."""
    found = []
    for field in schema:
        if pyarrow.types.is_struct(field.type):
            found += [f"{field.name}.{inner.name}" for inner in field.type]
        elif pyarrow.types.is_fixed_size_list(field.type):
            found.append(f"{field.name}.list.element")
        else:
            found.append(field.name)
    return found


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RequirementError("parquet: pyarrow is not installed", hint="pip install 'synthkit[parquet]'") from error
    return pyarrow.parquet
