"""One shard: the columns it may hold, its bytes, and its commit record (the sidecar).

A shard is an HDF5 file of contiguous little-endian datasets without filters. Its bytes depend on its arrays alone:
no times, no host, no uuid; so a run that was killed and resumed ends with the same files.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from synthkit.bank import migrate
from synthkit.bank.disk.storage import names_in, read_json
from synthkit.bank.spec import BankSpec
from synthkit.errors import BankError, NonFiniteError, UsageError

# name -> (stored dtype, what one row looks like). The allow-list: a reader refuses every other name and dtype.
# "index" is the smallest of <u2 and <u4 that numbers the classes.
COLUMNS: dict[str, tuple[str, str]] = {
    "images": ("|u1", "image"),
    "labels": ("<i4", "scalar"),
    "logits": ("<f2", "classes"),
    "difficulty": ("<f4", "scalar"),
    "origin_step": ("<u4", "scalar"),
    "origin_seed": ("<u8", "scalar"),
    "images_f16": ("<f2", "image"),
    "topk_index": ("index", "topk"),
    "topk_logit": ("<f2", "topk"),
    "tail_logsumexp": ("<f4", "scalar"),
}
TOPK = ("topk_index", "topk_logit", "tail_logsumexp")  # together or not at all
SINCE = {"images_f16": 2, **dict.fromkeys(TOPK, 2)}  # schema that brought the column; 1 where not listed
ALIGNMENT = 64  # bytes; every dataset starts on a multiple, so that it can be mapped and read in place


def column_dtype(column: str, spec: BankSpec) -> np.dtype:
    """Stored dtype of `column`, little-endian."""
    dtype = COLUMNS[column][0]
    if dtype == "index":
        dtype = "<u2" if spec.num_classes <= 1 << 16 else "<u4"
    return np.dtype(dtype)


def row_shape(column: str, spec: BankSpec) -> tuple[int, ...]:
    """Shape of one row of `column`. Raises `UsageError` for a topk column of a bank without `top_k`."""
    kind = COLUMNS[column][1]
    if column in TOPK and spec.top_k is None:
        raise UsageError(f"shard: {column} needs a bank with top_k", hint="set top_k in the BankSpec")
    return {"image": tuple(spec.shape), "classes": (spec.num_classes,), "topk": (spec.top_k or 0,), "scalar": ()}[kind]


@dataclass(frozen=True)
class Layout:
    """What one kind of shard holds: the allow-list of its columns, and those that must be there."""

    columns: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
    """Name -> stored dtype and the shape of one row, in the order in which they are written."""
    required: tuple[str, ...]


def bank_layout(spec: BankSpec) -> Layout:
    """The layout of the image shards of a bank."""
    names = [name for name in COLUMNS if spec.top_k or name not in TOPK]
    required = ["images"] if spec.label_kind == "none" else ["images", "labels"]
    columns = {name: (column_dtype(name, spec), row_shape(name, spec)) for name in names}
    return Layout(columns=columns, required=(*required, *(TOPK if spec.top_k else ())))


def conform(arrays: Mapping[str, Any], spec: BankSpec, count: int) -> dict[str, np.ndarray]:
    """`arrays` in stored dtype and order, checked.

    Args:
        arrays: column name -> array of `count` rows; `origin_step` and `origin_seed` may be one number for all.

    Raises:
        UsageError: unknown or missing column, wrong shape or type, a label or top-k index outside the classes, a
            class twice in one row of topk_index.
        NonFiniteError: a logit, difficulty or float pixel is not finite in the stored precision.
    """
    for name in TOPK:
        if arrays.get(name) is not None:
            row_shape(name, spec)  # says what a bank needs for it
    ready = conform_columns(arrays, bank_layout(spec), count, f"label_kind is {spec.label_kind}, top_k is {spec.top_k}")
    wrong = value_problem(ready, spec)
    if wrong:
        raise UsageError(f"shard: {wrong}")
    return ready


def conform_columns(
    arrays: Mapping[str, Any], layout: Layout, count: int, why: str | None = None
) -> dict[str, np.ndarray]:
    """`arrays` in the stored dtypes and order of `layout`; values are looked at by the caller.

    Args:
        count: rows. why: said with a missing column.

    Raises:
        UsageError: unknown or missing column, wrong shape or type. NonFiniteError: a float is not finite as stored.
    """
    for name in arrays:
        if name not in layout.columns:
            raise UsageError("shard: not a column of a bank", got=name, allowed=layout.columns)
    absent = [name for name in layout.required if arrays.get(name) is None]
    if absent:
        raise UsageError(f"shard: the column {' and '.join(absent)} is missing", hint=why)
    return {
        name: _column(name, np.asarray(arrays[name]), dtype, (count, *shape))
        for name, (dtype, shape) in layout.columns.items()
        if arrays.get(name) is not None
    }


class HasClasses(Protocol):
    """A spec of images or of labels."""

    @property
    def num_classes(self) -> int: ...


def value_problem(columns: Mapping[str, np.ndarray], spec: HasClasses) -> str | None:
    """What is wrong with the values of stored columns; None: nothing.

    Labels and top-k indices lie within the classes, no class stands twice in a row of topk_index, all floats are
    finite. `columns` may be any part of a shard.
    """
    last = spec.num_classes - 1
    for name in ("labels", "topk_index"):
        value = columns.get(name)
        if value is not None and value.size and not 0 <= int(value.min()) <= int(value.max()) <= last:
            return f"{name} must be 0 to {last}, got {_extent(value)}"
    if "topk_index" in columns:
        ordered = np.sort(columns["topk_index"], axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if twice.any():
            return f"topk_index names a class twice in row {int(twice.argmax())}"
    for name, value in columns.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            return f"{name} is not finite in row {int(np.argwhere(~np.isfinite(value))[0][0])}"
    return None


def _column(name: str, value: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if name.startswith("origin") and value.ndim == 0:
        value = np.broadcast_to(value, shape)
    if value.shape != shape:
        raise UsageError(f"shard: {name} must have shape {shape}", got=value.shape)
    if name == "images" and value.dtype != np.uint8:
        hint = "pixels are stored as uint8: (x * 255).round().clamp(0, 255)"
        raise UsageError("shard: images must be uint8", got=str(value.dtype), hint=hint)
    if dtype.kind in "iu":
        bounds = np.iinfo(dtype)
        if value.dtype.kind not in "iu":
            raise UsageError(f"shard: {name} must be integers", got=str(value.dtype))
        if value.size and (int(value.min()) < bounds.min or int(value.max()) > bounds.max):
            raise UsageError(f"shard: {name} does not fit {dtype.name}", got=_extent(value))
    elif value.dtype.kind not in "fiu":
        raise UsageError(f"shard: {name} must be numbers", got=str(value.dtype))
    with np.errstate(over="ignore"):  # an overflow becomes inf, which is refused just below
        stored = np.ascontiguousarray(value, dtype=dtype)
    if dtype.kind == "f" and not np.isfinite(stored).all():
        row = int(np.argwhere(~np.isfinite(stored))[0][0])
        raise NonFiniteError(f"shard: {name} is not finite in {dtype.name}", got=f"row {row}",
                             hint="the teacher or the generator diverged, or logits exceed 65504")  # fmt: skip
    return stored


def _extent(value: np.ndarray) -> str:
    return f"{value.min()} to {value.max()}"


def encode(columns: Mapping[str, np.ndarray]) -> tuple[memoryview, dict[str, dict[str, Any]]]:
    """The bytes of a shard file, and where its datasets lie.

    The file is composed in memory: a full disk then meets a plain write, never a half-open HDF5 file. What lies around
    the values depends on names, shapes and dtypes alone and is asked of HDF5 once; copying the values into it is eight
    times as fast as having HDF5 write each file (measured with 64 MiB: 10 against 80 ms).

    Returns:
        (bytes, {column: {"offset": int, "shape": list, "dtype": str}}).
    """
    size, around, offsets = _frame(tuple((name, c.shape, c.dtype.str) for name, c in columns.items()))
    file = np.empty(size, np.uint8)
    for start, piece in around:
        file[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
    for name, value in columns.items():
        file[offsets[name] : offsets[name] + value.nbytes] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    layout = {n: {"offset": offsets[n], "shape": list(c.shape), "dtype": c.dtype.str} for n, c in columns.items()}
    return file.data, layout


@functools.lru_cache(maxsize=16)
def _frame(
    columns: tuple[tuple[str, tuple[int, ...], str], ...],
) -> tuple[int, list[tuple[int, bytes]], dict[str, int]]:
    """A shard file of these (name, shape, dtype) without its values: (bytes, what lies around them, their offsets)."""
    import h5py

    payload = sum(math.prod(shape) * np.dtype(dtype).itemsize for _, shape, dtype in columns)
    with h5py.File(
        f"{threading.get_ident()}.h5", "w", driver="core", backing_store=False, block_size=payload + (64 << 10),
        libver=("v108", "v108"), alignment_threshold=1, alignment_interval=ALIGNMENT,
    ) as file:  # fmt: skip
        offsets, extents = {}, []
        for name, shape, dtype in columns:
            values = np.zeros(shape, dtype)  # HDF5 gives a dataset its place when it is written
            offsets[name] = file.create_dataset(name, data=values, track_times=False).id.get_offset()
            extents.append((offsets[name], offsets[name] + values.nbytes))
        file.flush()
        image = file.id.get_file_image()
    around, start = [], 0
    for begin, end in [*sorted(extents), (len(image), len(image))]:
        around.append((start, image[start:begin]))
        start = end
    return len(image), around, offsets


def summary(columns: Mapping[str, np.ndarray], num_classes: int) -> dict[str, Any]:
    """What a sidecar says about the content: histogram, difficulty, agreement, confidence, steps."""
    facts: dict[str, Any] = {}
    labels, best = columns.get("labels"), _best(columns)
    if labels is not None:
        facts["label_histogram"] = np.bincount(labels, minlength=num_classes).tolist()
    if best is not None:
        argmax, confidence = best
        facts["mean_confidence"] = round(float(confidence.mean(dtype=np.float64)), 6)
        if labels is not None:
            facts["argmax_matches"] = int((argmax == labels).sum())
            facts["teacher_agreement"] = round(facts["argmax_matches"] / len(labels), 6)
    if "difficulty" in columns:
        difficulty = columns["difficulty"]
        facts["mean_difficulty"] = float(difficulty.mean(dtype=np.float64))
        facts["difficulty_range"] = [float(difficulty.min()), float(difficulty.max())]
    if "origin_step" in columns:
        facts["step_range"] = [int(columns["origin_step"].min()), int(columns["origin_step"].max())]
    return facts


def _best(columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """The teacher's first class and its probability, both (N,), from logits or else from the top-k columns."""
    if "logits" in columns:
        scores = columns["logits"].astype(np.float32)
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        return scores.argmax(axis=1), odds.max(axis=1) / odds.sum(axis=1)
    if "topk_logit" not in columns:
        return None
    scores = columns["topk_logit"].astype(np.float32)
    first, tail = scores.argmax(axis=1), columns["tail_logsumexp"]
    top = np.maximum(scores.max(axis=1), tail)  # the largest exponent is 0: nothing overflows
    rows = np.arange(len(scores))
    odds = np.exp(scores - top[:, None])
    return columns["topk_index"][rows, first], odds[rows, first] / (odds.sum(axis=1) + np.exp(tail - top))


@dataclass(frozen=True)
class Placement:
    """Where a column lies in its shard file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Sidecar:
    """A checked commit record."""

    index: int
    n: int
    bytes: int
    sha256: str
    datasets: dict[str, Placement]
    raw: dict[str, Any]


def read_sidecar(path: Path, index: int, spec: BankSpec) -> Sidecar:
    """The commit record in `path`, every number of it checked against the spec and against itself.

    Raises:
        BankError: missing, not JSON, a newer schema, an unknown column, or numbers that do not add up.
    """
    return check_sidecar(read_json(path), str(path), index, spec)


def check_sidecar(raw: dict[str, Any], where: str, index: int, spec: BankSpec) -> Sidecar:
    """`raw` (of any schema up to ours) as a `Sidecar`; `where` names it in messages. Raises `BankError`."""
    written, raw = raw, migrate.sidecar(raw, where)
    datasets = raw.get("datasets")
    if not isinstance(datasets, dict) or "images" not in datasets:
        raise BankError(f"{where}: datasets must be an object that names images")
    for name in datasets:
        if name in TOPK and spec.top_k is None:
            raise BankError(f"{where}: names {name}, but bank.json has no top_k")
        if SINCE.get(name, 1) > written["schema"]:
            raise BankError(f"{where}: a record of schema {written['schema']} cannot name {name}")
    # labels may be missing from old shards; the three top-k columns come together
    layout = Layout(columns=bank_layout(spec).columns, required=("images", *(TOPK if spec.top_k else ())))
    found = check_record(raw, where, index, spec.shard_size(index), layout)
    _check_facts(raw, where, spec)
    return found


def check_record(raw: dict[str, Any], where: str, index: int, rows: int, layout: Layout) -> Sidecar:
    """The commit record of shard `index` with `rows` rows, checked against `layout`, the file size and itself.

    Args:
        raw: a record of the newest schema. where: names it in messages.

    Raises:
        BankError: an unknown or missing column, or numbers that do not add up.
    """

    def need(ok: bool, what: str, got: object) -> None:
        if not ok:
            raise BankError(f"{where}: {what}", got=got)

    def is_int(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62

    need(type(raw.get("shard")) is int and raw["shard"] == index, f"must describe shard {index}", raw.get("shard"))
    count, size, digest = raw.get("n"), raw.get("bytes"), raw.get("sha256")
    need(is_int(count) and count == rows, f"n must be {rows} as planned", count)
    need(is_int(size), "bytes must be a number", size)
    need(isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) is not None, "sha256 is malformed", digest)
    datasets = raw.get("datasets")
    if not isinstance(datasets, dict):
        raise BankError(f"{where}: datasets must be an object")
    placed = {name: _placement(name, entry, where, layout, raw) for name, entry in datasets.items()}
    absent = [name for name in layout.required if name not in placed]
    need(not absent, f"lacks {', '.join(absent)}", None)
    ends = sorted((p.offset, p.offset + math.prod(p.shape) * p.dtype.itemsize, name) for name, p in placed.items())
    for (_, end, name), (start, _, other) in zip(ends, ends[1:], strict=False):
        need(end <= start, f"datasets {name} and {other} overlap", (end, start))
    return Sidecar(index=index, n=raw["n"], bytes=raw["bytes"], sha256=raw["sha256"], datasets=placed, raw=raw)


def _placement(name: str, entry: Any, where: str, layout: Layout, raw: dict[str, Any]) -> Placement:
    if name not in layout.columns:
        raise BankError(f"{where}: not a column of a bank", got=name, allowed=layout.columns)
    dtype, row = layout.columns[name]
    shape = (raw["n"], *row)
    if not isinstance(entry, dict):
        raise BankError(f"{where}: the entry of {name} must be an object", got=type(entry).__name__)
    if entry.get("dtype") != dtype.str:
        raise BankError(f"{where}: {name} must be stored as {dtype.str}", got=entry.get("dtype"))
    if entry.get("shape") != list(shape):
        raise BankError(f"{where}: {name} must have shape {list(shape)}", got=entry.get("shape"))
    offset = entry.get("offset")
    if not isinstance(offset, int) or isinstance(offset, bool) or offset < 0 or offset % dtype.itemsize:
        raise BankError(f"{where}: the offset of {name} is malformed", got=offset)
    end = offset + math.prod(shape) * dtype.itemsize
    if end > raw["bytes"]:
        raise BankError(f"{where}: {name} ends at byte {end}, outside the file of {raw['bytes']} bytes", got=offset)
    return Placement(offset=offset, shape=shape, dtype=dtype)


def _check_facts(raw: dict[str, Any], where: str, spec: BankSpec) -> None:
    """The descriptive numbers are used by `info`: they must at least have their form."""

    def numbers(value: Any, length: int) -> bool:
        return isinstance(value, list) and len(value) == length and all(
            type(v) in (int, float) and -(2**63) <= v < 2**63 for v in value)  # fmt: skip

    lengths = {"label_histogram": spec.num_classes, "difficulty_range": 2, "step_range": 2}
    for key, length in lengths.items():
        if key in raw and not numbers(raw[key], length):
            raise BankError(f"{where}: {key} must be {length} numbers")
    for key in ("mean_difficulty", "mean_confidence", "teacher_agreement", "argmax_matches", "seconds"):
        if key in raw and not numbers([raw[key]], 1):
            raise BankError(f"{where}: {key} must be a number")
    histogram = raw.get("label_histogram")
    if histogram is not None and (not all(isinstance(v, int) and v >= 0 for v in histogram)
                                  or sum(histogram) != raw["n"]):  # fmt: skip
        raise BankError(f"{where}: label_histogram must count {raw['n']} images")


def shard_file(bank: Path, index: int) -> Path:
    """The HDF5 file of shard `index` of the bank at `bank`."""
    return bank / "shards" / f"{index:05d}.h5"


def committed_shards(bank: Path, spec: BankSpec) -> list[int]:
    """Indices of the planned shards that have a sidecar, ascending."""
    return committed_in(bank / "shards", spec.shards)


def committed_in(folder: Path, shards: int) -> list[int]:
    """Indices below `shards` whose commit record lies in `folder`, ascending."""
    found = (re.fullmatch(r"([0-9]{5,7})\.json", name) for name in names_in(folder))
    indices = {int(m[1]) for m in found if m and m[0] == f"{int(m[1]):05d}.json"}
    return sorted(i for i in indices if i < shards)


def file_sha256(path: Path) -> str:
    """sha256 of a file, read piece by piece into one buffer that stays in the processor's cache."""
    digest, piece = hashlib.sha256(), bytearray(256 << 10)
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            digest.update(memoryview(piece)[:count])
    return digest.hexdigest()
