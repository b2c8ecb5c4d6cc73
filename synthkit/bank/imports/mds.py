"""MosaicML's MDS (streaming): index.json and uncompressed shards of version 2, read without the library.

A shard: uint32 number of samples n; n + 1 uint32 offsets from the start of the file; the JSON of the columns; the
samples. A sample: uint32 size of each column whose size varies, then the columns' bytes. Numbers are little-endian.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank.disk.storage import read_json
from synthkit.bank.imports.encoded import MAX_FILE, Survey, decode, decode_rows
from synthkit.bank.imports.labels import Seen, classes_of
from synthkit.bank.imports.own import record_of, require_fit
from synthkit.bank.imports.source import ImportOptions, Rows, Source, refuse_link, unlabelled_error
from synthkit.bank.shard import COLUMNS
from synthkit.errors import BankError, DataError

_IMAGE_NAMES = ("image", "images", "img", "x")
_LABEL_NAMES = ("label", "labels", "class", "y")
_EXTRA = tuple(name for name in COLUMNS if name not in ("images", "labels"))
_COMPRESSED = ("png", "jpeg", "pil", "bytes")
_NUMBERS = {"uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"}
MAX_SAMPLES = 1 << 28

Sample = dict[str, Any]


def open_source(path: Path, options: ImportOptions) -> Source:
    """The samples of every shard that index.json of the folder `path` names, in order.

    Raises:
        DataError: a malformed index or shard, compressed shards, an encoding that would run code (pkl), no labels.
    """
    refuse_link(path)
    shards = [_Shard(path, raw, number) for number, raw in enumerate(_index(path))]
    own = record_of(path, "mds")
    fields = {name for shard in shards for name in shard.fields}
    image = next((n for n in _IMAGE_NAMES if all(n in s.fields for s in shards)), None)
    label = next((n for n in _LABEL_NAMES if all(n in s.fields for s in shards)), None)
    if image is None:
        raise DataError(f"{path}: no column of images", got=sorted(fields)[:20], allowed=_IMAGE_NAMES)
    unlabelled = options.unlabelled or (own or {}).get("label_kind") == "none"
    if label is None and not unlabelled:
        raise unlabelled_error(str(path))
    extra = [n for n in _EXTRA if all(n in s.fields for s in shards)]
    survey, seen, top_k = Survey(str(path), options, own), Seen(str(path)), None
    for where, sample in _samples(shards, [image, *([label] if label else [])]):
        survey.add(sample[image], where)
        if label is not None and not unlabelled:
            seen.add(sample[label], survey.count - 1)
    if "topk_index" in extra:
        top_k = len(next(_samples(shards, ["topk_index"]))[1]["topk_index"])
    num_classes, class_names = classes_of(str(path), seen, (own or {}).get("class_names"), options, own)
    shape = survey.shape
    if options.size is None:
        require_fit(own, survey.count, shape, str(path))

    def rows() -> Iterator[Rows]:
        held: list[tuple[str, Sample]] = []
        for item in _samples(shards, [image, *([label] if label else []), *extra]):
            held.append(item)
            if len(held) == decode_rows(shape):
                yield chunk(held)
                held = []
        if held:
            yield chunk(held)

    def chunk(held: list[tuple[str, Sample]]) -> Rows:
        ready: Rows = {"images": decode([s[image] for _, s in held], [w for w, _ in held], shape, str(path))}
        if label is not None and not unlabelled:
            ready["labels"] = seen.numbers([s[label] for _, s in held], class_names)
        for name in extra:
            values = [np.asarray(s[name]) for _, s in held]
            if len({v.shape for v in values}) != 1:
                raise DataError(f"{held[0][0]}: {name} differs in length from sample to sample")
            ready[name] = np.stack(values)
        return ready

    return Source(
        kind="mds", name=path.resolve().name, count=survey.count, shape=shape, num_classes=num_classes,
        class_names=class_names, label_kind="none" if unlabelled else "real", rows=rows, top_k=top_k, own=own,
    )  # fmt: skip


def _index(path: Path) -> list[dict[str, Any]]:
    where = path / "index.json"
    try:
        raw = read_json(where)
    except BankError as error:
        raise DataError(str(error)) from error
    shards = raw.get("shards")
    if raw.get("version") != 2 or not isinstance(shards, list) or not shards:
        raise DataError(f"{where}: is not an index of MDS version 2 with shards", got=raw.get("version"))
    if not all(isinstance(shard, dict) for shard in shards):
        raise DataError(f"{where}: a shard is no object")
    return shards


class _Shard:
    """One shard file: its columns, and its samples on demand."""

    def __init__(self, folder: Path, raw: dict[str, Any], number: int):
        where = f"{folder / 'index.json'}: shard {number}"
        if raw.get("format") != "mds" or raw.get("compression") or raw.get("zip_data"):
            raise DataError(f"{where}: is compressed, or not MDS", got=raw.get("compression") or raw.get("format"),
                            hint="write it with compression=None")  # fmt: skip
        data = raw.get("raw_data")
        base = data.get("basename") if isinstance(data, dict) else None
        if not isinstance(base, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", base):
            raise DataError(f"{where}: the file name is malformed", got=str(base)[:80])
        names, kinds, sizes = (raw.get(k) for k in ("column_names", "column_encodings", "column_sizes"))
        if not (isinstance(names, list) and isinstance(kinds, list) and isinstance(sizes, list)
                and len(names) == len(kinds) == len(sizes) and all(isinstance(n, str) for n in names)
                and all(s is None or isinstance(s, int) and 0 <= s < 1 << 31 for s in sizes)):  # fmt: skip
            raise DataError(f"{where}: its columns are malformed")
        count = raw.get("samples")
        if not isinstance(count, int) or not 0 < count <= MAX_SAMPLES:
            raise DataError(f"{where}: samples is malformed", got=str(count)[:80])
        self.path, self.samples = folder / base, count
        self.layout: list[tuple[str, int | None]] = list(zip(names, sizes, strict=True))
        self.fields: dict[str, Callable[[bytes], Any]] = {}
        for name, kind in zip(names, kinds, strict=True):
            decoder = _decoder(kind, f"{where}: {name}")
            if decoder is not None:
                self.fields[name] = decoder
        if not refuse_link(self.path).is_file():
            raise DataError(f"{self.path}: is missing")

    def rows(self, names: list[str]) -> Iterator[tuple[str, Sample]]:
        """(where, decoded columns `names`) of every sample."""
        size = os.path.getsize(self.path)
        with open(self.path, "rb") as stream:
            head = stream.read(4)
            if len(head) < 4 or struct.unpack("<I", head)[0] != self.samples or 4 * (self.samples + 2) > size:
                raise DataError(f"{self.path}: does not hold the {self.samples} samples of the index")
            ends = np.frombuffer(stream.read(4 * (self.samples + 1)), "<u4").astype(np.int64)
            if ends[0] < 4 * (self.samples + 2) or (np.diff(ends) < 0).any() or ends[-1] != size:
                raise DataError(f"{self.path}: its table of samples is malformed")
            for number, (start, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
                where = f"{self.path} sample {number}"
                if end - start > 2 * MAX_FILE:
                    raise DataError(f"{where}: has {end - start:,} bytes")
                stream.seek(start)
                yield where, self._sample(stream.read(end - start), names, where)

    def _sample(self, data: bytes, names: list[str], where: str) -> Sample:
        varying = [name for name, size in self.layout if size is None]
        place = 4 * len(varying)
        if len(data) < place:
            raise DataError(f"{where}: is cut short")
        lengths = dict(zip(varying, struct.unpack(f"<{len(varying)}I", data[:place]), strict=True))
        found: Sample = {}
        for name, size in self.layout:
            length = lengths[name] if size is None else size
            if place + length > len(data):
                raise DataError(f"{where}: {name} reaches outside the sample")
            if name in names:
                try:
                    found[name] = self.fields[name](data[place : place + length])
                except (ValueError, struct.error, UnicodeDecodeError) as error:
                    raise DataError(f"{where}: {name} cannot be decoded ({error})") from error
            place += length
        if place != len(data):
            raise DataError(f"{where}: has {len(data) - place} bytes too many")
        return found


def _samples(shards: list[_Shard], names: list[str]) -> Iterator[tuple[str, Sample]]:
    for shard in shards:
        yield from shard.rows(names)


def _decoder(kind: Any, where: str) -> Callable[[bytes], Any] | None:
    """How a column is decoded; None for an encoding that an import has no use for. Never pickle."""
    if not isinstance(kind, str):
        raise DataError(f"{where}: the encoding is malformed", got=str(kind)[:80])
    if kind in _COMPRESSED:
        return lambda data: data
    if kind == "int":
        return lambda data: struct.unpack("<q", data)[0]
    if kind == "str":
        return lambda data: data.decode("utf-8")
    if kind in _NUMBERS:
        return lambda data: np.frombuffer(data, np.dtype(kind).newbyteorder("<"), 1)[0].item()
    match = re.fullmatch(r"ndarray:([a-z0-9]+):([0-9]+(?:,[0-9]+)*)", kind)
    if match and match[1] in _NUMBERS:
        dtype, shape = np.dtype(match[1]).newbyteorder("<"), tuple(int(v) for v in match[2].split(","))
        if math.prod(shape) * dtype.itemsize > MAX_FILE:
            raise DataError(f"{where}: claims an array of shape {shape}")
        return lambda data: np.frombuffer(data, dtype).reshape(shape)
    return None
