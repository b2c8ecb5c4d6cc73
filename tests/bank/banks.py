"""Small banks for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank import BankSpec, BankWriter

SHAPE, CLASSES = (3, 6, 5), 4


def make_spec(**changes: Any) -> BankSpec:
    base: dict[str, Any] = {
        "shape": SHAPE, "num_classes": CLASSES, "class_names": ["ant", "bee", "cat", "dog"], "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.1], "images": 53, "images_per_shard": 10, "seed": 7,
        "recipe": {"method": {"name": "cudfkd", "lr": 0.001}}, "teacher": {"arch": "lenet5", "sha256": "ab" * 32},
    }  # fmt: skip
    return BankSpec(**{**base, **changes})


def shard_arrays(spec: BankSpec, index: int) -> dict[str, np.ndarray]:
    """Columns of one shard, a pure function of (seed, index)."""
    rng = np.random.default_rng([spec.seed, index])
    n = spec.shard_size(index)
    logits = rng.normal(size=(n, spec.num_classes)).astype(np.float16)
    return {
        "images": rng.integers(0, 256, (n, *spec.shape), dtype=np.uint8),
        "labels": logits.argmax(1).astype(np.int64),
        "logits": logits,
        "difficulty": rng.random(n).astype(np.float32),
        "origin_step": np.full(n, 100 * index, np.int64),
        "origin_seed": np.full(n, spec.seed, np.uint64),
    }


def fill(writer: BankWriter, shards: list[int] | None = None) -> None:
    for index in writer.missing() if shards is None else shards:
        writer.write_shard(index, shard_arrays(writer.spec, index), {"step": index})


def make_bank(path: Path, **changes: Any) -> BankWriter:
    writer = BankWriter.create(path, make_spec(**changes))
    fill(writer)
    return writer


def whole(spec: BankSpec, column: str) -> np.ndarray:
    """The column as it was given to the writer."""
    return np.concatenate([shard_arrays(spec, i)[column] for i in range(spec.shards)])
