"""Tar shards as WebDataset reads them: per image `.png` (or `.npy`), `.cls`, `.json` and `.logits.npy`."""

from __future__ import annotations

import functools
import io
import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank.export.base import Format, need_range, worked
from synthkit.bank.export.names import printable
from synthkit.bank.export.png import LEVEL, Piece, check_png, encode_png, png_bytes, png_pieces, png_workers
from synthkit.errors import UsageError

_BLOCK = 512
_ARRAYS = ("logits", "topk_index", "topk_logit")
_NUMBERS = ("difficulty", "tail_logsumexp", "origin_step", "origin_seed")


@dataclass(frozen=True, kw_only=True)
class WebDatasetOptions:
    """How the shards are written."""

    name: str = "bank"
    """First part of the file names: NAME-000000.tar."""
    shard_bytes: int = 256 << 20
    """A tar is closed when it reaches this size."""
    shard_images: int = 100_000
    """A tar is closed when it holds this many images."""
    raw: bool = False
    """Pixels as `.npy` (uint8, channels first) instead of `.png`: larger, faster to read, any number of channels."""
    compress_level: int = LEVEL
    """zlib level of the PNGs, 0 to 9; they are lossless at any."""


class WebDataset(Format):
    """`bank-000000.tar` and on; their headers hold no time and no owner."""

    Options = WebDatasetOptions
    hub_files = "*.tar"
    carries = ("images", "labels", *_ARRAYS, *_NUMBERS)

    _tars = 1

    def check(self) -> None:
        """See `Format.check`."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.options.name):
            raise UsageError("export: name must be letters, digits, - and _ (64 at most)", got=self.options.name)
        need_range("shard_bytes", self.options.shard_bytes, 1, 1 << 50)
        need_range("shard_images", self.options.shard_images, 1, 1 << 40)
        self.source.require_small_rows(self.columns, 1 << 32, "webdataset")  # a tar header counts to 8 GiB
        if not self.options.raw:
            self.notes += check_png(self.source, self.options.compress_level, "webdataset", "--raw")
        if "labels" not in self.columns:
            self.notes.append("the bank has no labels: there are no .cls files")

    def estimate(self) -> int:
        """See `Format.estimate`."""
        count, parts = self.source.count, [c for c in self.columns if c in _ARRAYS]
        arrays = sum(2 * _BLOCK + 128 + self.source.row_bytes([c]) for c in parts)
        if self.options.raw:
            images = count * (self.source.spec.image_bytes + 128)
        else:
            images = png_bytes(self.source, self.options.compress_level)
        tars = count // self.options.shard_images + images // self.options.shard_bytes + 1
        return images + count * (arrays + 6 * _BLOCK) + tars * 2 * _BLOCK  # image, .cls, .json: header and padding each

    def write(self, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
        """See `Format.write`."""
        work = functools.partial(_samples, self.options, [printable(n) for n in self.source.names], self._width())
        shards: list[dict[str, Any]] = []
        with worked(png_pieces(self.source, self.columns), work, png_workers(self.source, self.workers)) as results:
            samples = (sample for piece in results for sample in piece)
            while self._shard(folder, samples, shards, advance):
                pass
        self._tars = len(shards)
        return {"shards": shards}

    def _shard(self, folder: Path, samples: Iterator[bytes], shards: list[dict[str, Any]], advance: Any) -> bool:
        """Write the next tar; False when there are no more samples."""
        sample = next(samples, None)
        if sample is None:
            return False
        name, images, size = f"{self.options.name}-{len(shards):06d}.tar", 0, 0
        with open(folder / name, "xb") as tar:
            while sample is not None:
                tar.write(sample)
                images, size = images + 1, size + len(sample)
                advance(1)
                if size >= self.options.shard_bytes or images >= self.options.shard_images:
                    break
                sample = next(samples, None)
            tar.write(bytes(2 * _BLOCK))  # the end of an archive
        shards.append({"file": name, "images": images})
        return True

    def _width(self) -> int:
        return max(8, len(str(self.source.count - 1)))

    def usage(self) -> str:
        """See `Format.usage`."""
        last = max(0, self._tars - 1)
        name = f"{self.options.name}-{{000000..{last:06d}}}.tar" if last else f"{self.options.name}-000000.tar"
        image, decode = ("npy", ".decode()") if self.options.raw else ("png", '.decode("pil")')
        keys = [image] + (["cls"] if "labels" in self.columns else []) + ["json"]
        return (
            "import webdataset\n\n"
            f'data = webdataset.WebDataset("DIR/{name}", shardshuffle=False){decode}\n'
            f"for {', '.join(keys)} in data.to_tuple({', '.join(map(repr, keys))}):\n    ..."
        )


def _samples(options: WebDatasetOptions, names: list[str], width: int, piece: Piece) -> list[bytes]:
    """The members of every image of a piece, as they stand in the tar."""
    first, rows = piece
    labels, found = rows.get("labels"), []
    for i, image in enumerate(rows["images"]):
        key = f"{first + i:0{width}d}"
        content = ("npy", _npy(image)) if options.raw else ("png", encode_png(image, options.compress_level))
        members: list[tuple[str, bytes]] = [content]
        facts: dict[str, Any] = {"index": first + i, "label": None, "class": None}
        if labels is not None:
            label = int(labels[i])
            facts |= {"label": label, "class": names[label]}
            members.append(("cls", str(label).encode()))
        facts |= {c: rows[c][i].item() for c in _NUMBERS if c in rows}
        members.append(("json", json.dumps(facts, ensure_ascii=False).encode()))
        members += [(f"{c}.npy", _npy(rows[c][i])) for c in _ARRAYS if c in rows]
        found.append(b"".join(_member(f"{key}.{ending}", data) for ending, data in members))
    return found


def _member(name: str, data: bytes) -> bytes:
    """One file of a tar (POSIX ustar), without time, owner or names: the same bytes for everyone.

    The standard library takes half of the time of an export for its headers; `tarfile` reads these (tests).
    """
    fields = (name.encode(), b"0000644", b"0000000", b"0000000", b"%011o" % len(data), b"00000000000", b" " * 8, b"0",
              b"ustar\0" + b"00")  # fmt: skip
    head = struct.pack("100s8s8s8s12s12s8sc100x8s247x", *fields)
    head = head[:148] + b"%06o\0 " % sum(head) + head[156:]  # the sum counts its own field as blanks
    return head + data + bytes(-len(data) % _BLOCK)


def _npy(array: np.ndarray) -> bytes:
    return _npy_header(array.dtype.str, array.shape) + array.tobytes()


@functools.cache
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()
