"""From a `Source` to a finished bank: the plan, shard by shard with bounded memory, whole or absent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank import state
from synthkit.bank.disk.storage import staged
from synthkit.bank.imports.source import ImportOptions, Rows, Source
from synthkit.bank.reader import Bank
from synthkit.bank.spec import SHARD_BYTES, BankSpec, LabelKind
from synthkit.bank.writer import BankWriter
from synthkit.errors import DataError, UsageError

NO_STATS = "no mean and std given: 0.5 is noted for both; --teacher or --mean and --std give a teacher's"


def plan(source: Source, options: ImportOptions) -> BankSpec:
    """The spec of the bank that `source` becomes; notes for the user go to `source.notes`.

    Raises:
        UsageError: `--synthetic` contradicts the export, or mean and std do not fit the channels.
    """
    own = source.own or {}
    source.learning_rate = source.learning_rate if source.learning_rate is not None else own.get("learning_rate")
    channels = source.shape[0]
    theirs = own if own and len(own["mean"]) == channels else {}  # --size may change the channels
    mean = options.mean or source.mean or theirs.get("mean")
    std = options.std or source.std or theirs.get("std")
    if mean is None or std is None:
        mean, std = [0.5] * channels, [0.5] * channels
        source.notes.append(NO_STATS)
    for key, value in (("mean", mean), ("std", std)):
        if len(value) != channels:
            raise UsageError(f"import: --{key} needs {channels} numbers, one per channel", got=value)
    contains_real, used = _real(own, options)
    settled = source.label_kind in ("argmax", "none")
    kind: LabelKind = source.label_kind if settled else own.get("label_kind", source.label_kind)
    if own.get("left_out"):
        source.notes.append(f"the export did not hold {', '.join(own['left_out'])} of the bank")
    if kind == "real" and not contains_real:
        kind = "target"  # a class that somebody asked for: no real image bears it
    origin: dict[str, Any] = {"format": source.kind, "source": source.name}
    if source.learning_rate is not None:
        origin["learning_rate"] = source.learning_rate
    recipe = own.get("recipe") or {"method": "import", **origin, "size": list(options.size) if options.size else None}
    arrays = source.transform[0] if source.transform else None
    return BankSpec(
        shape=source.shape, num_classes=source.num_classes, class_names=source.class_names, mean=mean, std=std,
        label_kind=kind, images=source.count, images_per_shard=_per_shard(source), seed=own.get("seed", 0),
        recipe=recipe, teacher=own.get("teacher") or {}, real_data_used=used, contains_real=contains_real,
        parents=[{"uuid": own["uuid"], "root": own.get("root"), "via": source.kind}] if own else [],
        extra={**(own.get("extra") or {}), "import": origin}, top_k=source.top_k,
        transform=state.transform_entry(**source.transform_facts, arrays=arrays) if arrays else {},
    )  # fmt: skip


def _real(own: dict[str, Any], options: ImportOptions) -> tuple[bool, bool]:
    """(contains_real, real_data_used)."""
    if options.real is None:
        if own:
            return bool(own["contains_real"]), bool(own["real_data_used"] or own["contains_real"])
        return True, True
    if own and own["contains_real"] and not options.real:
        raise UsageError("import: --synthetic, but the export itself says that it contains real pixels",
                         hint="leave --synthetic out")  # fmt: skip
    return options.real, options.real or not options.data_free


def _per_shard(source: Source) -> int:
    own, image_bytes = source.own, int(np.prod(source.shape))
    if own and tuple(own["shape"]) == source.shape and own["images_per_shard"] * image_bytes <= 4 * SHARD_BYTES:
        return own["images_per_shard"]  # the same split into shards: a restored bank has the root of its original
    return max(1, min(source.count, SHARD_BYTES // (image_bytes * (3 if source.transform else 1))))


def write(
    source: Source, options: ImportOptions, out: str | Path, progress: Callable[[int], None] | None = None
) -> Bank:
    """Copy `source` into a new bank at `out`, which is whole at the end or does not exist.

    Args:
        progress: is called with the number of images after every shard.

    Raises:
        OutputExistsError: `out` exists. StorageError: no room, disk full.
        DataError: the source is damaged, or changed while it was read.
    """
    spec = plan(source, options)
    with staged(out) as staging:
        writer = BankWriter.create(staging, spec)
        if source.transform:
            writer.write_transform(*source.transform)
        stream = Stream(source.rows(), source.name)
        for index in range(writer.shards):
            rows = stream.take(writer.shard_size(index))
            last = index == writer.shards - 1
            if last:
                stream.require_end()
            rate = {"learning_rate": source.learning_rate} if last and source.learning_rate is not None else {}
            writer.write_shard(index, rows, rate)
            if progress:
                progress(writer.shard_size(index))
    return Bank(out)


class Stream:
    """Chunks of any size cut anew."""

    def __init__(self, chunks: Iterator[Rows], what: str):
        self._chunks, self._what = chunks, what
        self._rest: Rows = {}

    def take(self, count: int) -> Rows:
        """The next `count` rows. Raises `DataError` when the source ends before."""
        held, have = [self._rest] if self._rest else [], _length(self._rest)
        while have < count:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise DataError(f"{self._what}: ends {count - have} images early: it changed while it was read")
            if held and chunk.keys() != held[0].keys():
                raise DataError(f"{self._what}: some rows have other columns", got=sorted(chunk), allowed=held[0])
            if _length(chunk):
                held.append(chunk)
                have += _length(chunk)
        joined = {key: np.concatenate([h[key] for h in held]) if len(held) > 1 else held[0][key] for key in held[0]}
        self._rest = {key: value[count:] for key, value in joined.items()} if have > count else {}
        return {key: value[:count] for key, value in joined.items()}

    def require_end(self) -> None:
        """Raise `DataError` when there are more rows; reading to the end also lets a source compare its checksum."""
        if self._rest or any(_length(chunk) for chunk in self._chunks):
            raise DataError(f"{self._what}: holds more images than at first: it changed while it was read")


def _length(rows: Rows) -> int:
    return next((len(v) for v in rows.values()), 0)


def estimate(source: Source) -> int:
    """About how many bytes the bank will take: pixels, float pixels and small columns (logits come on top)."""
    image_bytes = int(np.prod(source.shape))
    return source.count * (image_bytes * (3 if source.transform else 1) + 16) + (16 << 10)
