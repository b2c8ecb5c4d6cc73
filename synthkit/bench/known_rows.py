"""Banks whose every byte is known: rows are a pure function of their number, right or wrong at any time for anyone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank import Bank, BankSpec, BankWriter
from synthkit.errors import BankError

SHAPE, CLASSES, PER_SHARD, SHARDS = (3, 16, 16), 10, 40, 8
_GOLD, _MIX, _SPREAD = 0x9E3779B97F4A7C15, 0x94D049BB133111EB, 0xBF58476D1CE4E5B9


def noise_bits(rows: np.ndarray, width: int, salt: int = 0) -> np.ndarray:
    """uint64 (N, width), a pure function of (row, column, salt): a hash, not a stream, so that any row stands alone."""
    start = np.uint64(salt * _MIX % 2**64)
    across = np.arange(1, width + 1, dtype=np.uint64)[None] * np.uint64(_SPREAD)
    value = rows.astype(np.uint64)[:, None] * np.uint64(_GOLD) + across + start
    value ^= value >> np.uint64(31)
    value *= np.uint64(_MIX)
    return value ^ (value >> np.uint64(29))


def columns_of(rows: np.ndarray, salt: int) -> dict[str, np.ndarray]:
    """Images, labels, logits and difficulty of the images numbered `rows` of the bank with seed `salt`."""
    pixels = (noise_bits(rows, int(np.prod(SHAPE)), salt) >> np.uint64(56)).astype(np.uint8)
    logits = (noise_bits(rows, CLASSES, salt + 1) >> np.uint64(52)).astype(np.float16) / np.float16(256)
    return {
        "images": pixels.reshape(-1, *SHAPE), "labels": logits.argmax(axis=1).astype(np.int32), "logits": logits,
        "difficulty": ((noise_bits(rows, 1, salt + 2)[:, 0] >> np.uint64(40)) / 2**24).astype(np.float32),
    }  # fmt: skip


def spec_of(salt: int, shards: int = SHARDS, **changes: Any) -> BankSpec:
    """A small bank whose images are `columns_of` their numbers."""
    base: dict[str, Any] = {
        "shape": SHAPE, "num_classes": CLASSES, "mean": [0.5] * 3, "std": [0.25] * 3, "seed": salt,
        "images": PER_SHARD * shards, "images_per_shard": PER_SHARD, "recipe": {"method": {"name": "bench kills"}},
    }  # fmt: skip
    return BankSpec(**{**base, **changes})


def rows_of(spec: BankSpec, shard: int) -> np.ndarray:
    """Numbers of the images of a shard."""
    start = shard * spec.per_shard
    return np.arange(start, start + spec.shard_size(shard))


def wrong_rows(bank: Bank, rows: np.ndarray, numbers: np.ndarray) -> int:
    """How many of `rows` of the bank differ, in any column, from what the images `numbers` are."""
    batch, right = bank.batch(rows, ["images", "labels", "logits", "difficulty"]), columns_of(numbers, bank.spec.seed)
    same = np.ones(len(rows), bool)
    for name, value in right.items():
        found = getattr(batch, name)
        same &= (found == value).reshape(len(rows), -1).all(axis=1)
    return int((~same).sum())


def numbers_in(bank: Bank) -> np.ndarray:
    """Number of the image in each row of a bank, finished or not."""
    return np.concatenate([rows_of(bank.spec, s.index) for s in bank.sidecars] or [np.zeros(0, np.int64)])


def make_bank(path: Path, salt: int, generators: bool = False, shards: list[int] | None = None, **changes: Any) -> Path:
    """A bank of `columns_of` rows (some `shards` of it, or all)."""
    writer = BankWriter.create(path, spec_of(salt, **changes))
    if generators:
        writer.write_generator(0, {"w": np.arange(5, dtype=np.float32)}, {"generator": {"name": "x"}})
    for index in range(writer.shards) if shards is None else shards:
        writer.write_shard(index, columns_of(rows_of(writer.spec, index), salt))
    return path


def read_for_ever(path: Path, counts: np.ndarray, log: Path) -> None:
    """In a child: open the bank at `path` again and again and read random rows; ends when `counts[3]` is set.

    `counts` (shared memory, int64): banks opened, rows compared, rows that were wrong, stop.
    """
    chance = np.random.default_rng(os.getpid())
    kept: list[Bank] = []
    for bank in _openings(path, counts, log):
        kept = [*kept[-3:], bank]  # banks that were opened while there was less of it stay right
        for held in kept:
            if len(held):
                rows = chance.integers(0, len(held), 24)
                counts[2] += wrong_rows(held, rows, numbers_in(held)[rows])
                counts[1] += len(rows)


def _openings(path: Path, counts: np.ndarray, log: Path) -> Iterator[Bank]:
    while not counts[3]:
        if not (path / "bank.json").exists():
            time.sleep(0.001)
            continue
        try:
            bank = Bank(path)
        except BankError as error:
            with open(log, "a") as stream:
                stream.write(f"{error}\n")
            continue
        counts[0] += 1
        yield bank
