"""MosaicML's MDS (streaming): index.json and shard files, written without any dependency.

A shard, version 2 (format of mosaicml-streaming 0.13, streaming/base/format/mds): uint32 number of samples n; uint32
n + 1 offsets from the start of the file; the JSON of the columns; the samples. A sample: uint32 size of each column
whose size varies, then the columns' bytes, in the order of their sorted names. Numbers are little-endian.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank.disk.storage import dump_json
from synthkit.bank.export.base import Format, need_range, worked
from synthkit.bank.export.png import LEVEL, Piece, check_png, encode_png, png_bytes, png_pieces, png_workers

_NAMES = {"images": "image", "labels": "label"}  # column of the bank -> of the shards; others keep their name


@dataclass(frozen=True, kw_only=True)
class MDSOptions:
    """How the shards are written."""

    shard_bytes: int = 1 << 26
    """A shard holds at most this many bytes (one sample may be larger)."""
    raw: bool = False
    """Pixels as an array (uint8, channels first) instead of PNG: larger, faster to read, any number of channels."""
    hashes: bool = False
    """Whether index.json holds the sha1 of every shard, which streaming checks with `validate_hash="sha1"`."""
    compress_level: int = LEVEL
    """zlib level of the PNGs, 0 to 9; they are lossless at any."""


@dataclass(frozen=True)
class Column:
    """One column of the shards."""

    name: str
    source: str
    encoding: str
    size: int | None
    """Bytes, where all samples have the same."""


class MDS(Format):
    """`shard.00000.mds` and on, with index.json, as `streaming.StreamingDataset(local=DIR)` reads them."""

    Options = MDSOptions
    carries = (
        "images", "labels", "logits", "difficulty", "origin_step", "origin_seed", "topk_index", "topk_logit",
        "tail_logsumexp",
    )  # fmt: skip

    def check(self) -> None:
        """See `Format.check`."""
        need_range("shard_bytes", self.options.shard_bytes, 1, 1 << 31)  # offsets are uint32
        self.source.require_small_rows(self.columns, 1 << 31, "mds")
        if not self.options.raw:
            self.notes += check_png(self.source, self.options.compress_level, "mds", "--raw")
        if "labels" not in self.columns:
            self.notes.append("the bank has no labels: there is no column label")

    def estimate(self) -> int:
        """See `Format.estimate`."""
        source = self.source
        if self.options.raw:
            images = source.count * source.spec.image_bytes
        else:
            images = png_bytes(source, self.options.compress_level)
        others = source.row_bytes([c for c in self.columns if c != "images"])
        return images + source.count * (others + 32) + (1 << 16)

    def layout(self) -> list[Column]:
        """The columns, in the order of their names, and "index": the number of the image in the bank."""
        found = [Column("index", "", "int", 8)]
        for column in self.columns:
            name, shape, dtype = _NAMES.get(column, column), self.source.row_shape(column), self.source.dtype(column)
            size = int(np.prod(shape)) * dtype.itemsize
            if column == "images" and not self.options.raw:
                found.append(Column(name, column, "png", None))
            elif column == "labels":
                found.append(Column(name, column, "int", 8))
            elif shape:
                found.append(Column(name, column, f"ndarray:{dtype.name}:{','.join(map(str, shape))}", size))
            else:
                found.append(Column(name, column, dtype.name, size))
        return sorted(found, key=lambda c: c.name)

    def write(self, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
        """See `Format.write`."""
        columns = self.layout()
        config = {
            "column_encodings": [c.encoding for c in columns], "column_names": [c.name for c in columns],
            "column_sizes": [c.size for c in columns], "compression": None, "format": "mds",
            "hashes": ["sha1"] if self.options.hashes else [], "size_limit": self.options.shard_bytes, "version": 2,
        }  # fmt: skip
        head = json.dumps(config, sort_keys=True).encode()
        shards: list[dict[str, Any]] = []

        def close(held: list[bytes]) -> None:
            name = f"shard.{len(shards):05d}.mds"
            raw = _write_shard(folder / name, head, held, self.options.hashes)
            shards.append({**config, "raw_data": {"basename": name, **raw}, "zip_data": None, "samples": len(held)})

        work = functools.partial(_samples, columns, self.options.compress_level)
        held, size = [], 4 + 4 + len(head)
        with worked(png_pieces(self.source, self.columns), work, png_workers(self.source, self.workers)) as results:
            for piece in results:
                for sample in piece:
                    if held and size + 4 + len(sample) > self.options.shard_bytes:
                        close(held)
                        held, size = [], 4 + 4 + len(head)
                    held.append(sample)
                    size += 4 + len(sample)
                advance(len(piece))
        close(held)
        (folder / "index.json").write_bytes(dump_json({"version": 2, "shards": shards}))
        return {
            "index": "index.json",
            "shards": [{"file": s["raw_data"]["basename"], "images": s["samples"]} for s in shards],
        }

    def usage(self) -> str:
        """See `Format.usage`."""
        return (
            "from streaming import StreamingDataset\n\n"
            'data = StreamingDataset(local="DIR", batch_size=32)\n'
            f'image = data[0]["image"]  # {"uint8 array, channels first" if self.options.raw else "PIL image"}'
        )


def _samples(columns: list[Column], level: int, piece: Piece) -> list[bytes]:
    """Every row of a piece as the bytes of its sample."""
    first, rows = piece
    cells: list[list[bytes]] = []
    for column in columns:
        if column.name == "index":
            count = len(rows["images"])
            cells.append(_rows(np.arange(first, first + count, dtype="<i8")))
        elif column.encoding == "png":
            cells.append([encode_png(image, level) for image in rows["images"]])
        elif column.encoding == "int":
            cells.append(_rows(rows[column.source].astype("<i8")))
        else:
            cells.append(_rows(rows[column.source]))
    varying = [i for i, column in enumerate(columns) if column.size is None]
    found = []
    for row in zip(*cells, strict=True):
        found.append(struct.pack(f"<{len(varying)}I", *(len(row[i]) for i in varying)) + b"".join(row))
    return found


def _rows(array: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in array]


def _write_shard(path: Path, head: bytes, samples: list[bytes], hashed: bool) -> dict[str, Any]:
    """Write one shard; returns its bytes and hashes."""
    start = 4 + 4 * (len(samples) + 1) + len(head)
    ends = np.cumsum([start, *map(len, samples)])
    digest = hashlib.sha1(usedforsecurity=False)
    with open(path, "xb") as stream:
        for part in (struct.pack("<I", len(samples)), ends.astype("<u4").tobytes(), head, *samples):
            stream.write(part)
            if hashed:
                digest.update(part)
    return {"bytes": int(ends[-1]), "hashes": {"sha1": digest.hexdigest()} if hashed else {}}
