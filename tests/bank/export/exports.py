"""Banks that an export may meet, and what must come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank import Bank, BankSpec, BankWriter
from synthkit.bank.labels.topk import compress_topk
from synthkit.bank.state import transform_entry

# the third class has no image, two names are equal, all are what a table, a file system or a page would stumble over
HOSTILE = ["=cmd|' /C calc'!A0", "../../etc/passwd", "CON", "../../etc/passwd", "Ärger 猫 \u202e\x00\n<b>"]
EMPTY = 2


def make(
    path: Path, *, images: int = 23, shape: tuple[int, int, int] = (3, 6, 5), per_shard: int = 10, labels: bool = True,
    logits: bool = True, top_k: int | None = None, f16: bool = False, rate: float | None = None,
    huge_seeds: bool = True, **changes: Any,
) -> Bank:  # fmt: skip
    """A finished bank of random images whose third class is empty."""
    rng = np.random.default_rng(5)
    whitening = {"matrix": rng.normal(size=(4, 4)).astype("<f4"), "mean": rng.normal(size=4).astype("<f4")}
    fields: dict[str, Any] = {
        "shape": shape, "num_classes": len(HOSTILE), "class_names": HOSTILE, "mean": [0.1, 0.25, 1 / 3][: shape[0]],
        "std": [0.3, 0.2, 0.7][: shape[0]], "images": images, "images_per_shard": per_shard, "seed": 2**63 + 1,
        "label_kind": "target" if labels else "none", "top_k": top_k, "recipe": {"method": {"name": "mtt"}},
        "transform": transform_entry("zca", whitening) if f16 else {},
    }  # fmt: skip
    writer = BankWriter.create(path, BankSpec(**{**fields, **changes}))
    if f16:
        writer.write_transform(whitening, {})
    scores = rng.normal(scale=5, size=(images, len(HOSTILE))).astype(np.float16)
    index, logit, tail = compress_topk(scores, top_k or 1)
    rows: dict[str, np.ndarray] = {
        "images": rng.integers(0, 256, (images, *shape), dtype=np.uint8),
        "difficulty": rng.random(images).astype(np.float32),
        "origin_step": rng.integers(0, 2**32, images, dtype=np.int64),
        "origin_seed": rng.integers(2**62, 2**63, images, dtype=np.uint64) * (2 if huge_seeds else 0) + 1,
    }
    if labels:
        drawn = rng.integers(0, len(HOSTILE) - 1, images)
        rows["labels"] = np.where(drawn >= EMPTY, drawn + 1, drawn)
    if logits:
        rows["logits"] = scores
    if top_k:
        rows |= {"topk_index": index, "topk_logit": logit, "tail_logsumexp": tail}
    if f16:
        rows["images_f16"] = rng.normal(size=(images, *shape)).astype(np.float16)
    for shard in range(writer.shards):
        part = slice(shard * per_shard, shard * per_shard + writer.shard_size(shard))
        last = shard == writer.shards - 1
        meta = {"learning_rate": rate if last else 77.0} if rate else {}
        writer.write_shard(shard, {name: value[part] for name, value in rows.items()}, meta)
    return Bank(path)


def stored(bank: Bank) -> dict[str, np.ndarray]:
    """All columns of a bank as they lie in its shards."""
    return {c: bank.column(c) for c in bank.columns}


def same(found: Any, expected: np.ndarray, dtype: Any = None) -> None:
    """Assert equality of every bit, not of values alone: -0.0 is not 0.0."""
    found = np.asarray(found)
    expected = expected if dtype is None else expected.astype(dtype)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def pixels(image: Any) -> np.ndarray:
    """A PIL image as (C, H, W)."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path; folders as empty entries."""
    return {
        str(p.relative_to(folder)) + ("/" if p.is_dir() else ""): b"" if p.is_dir() else p.read_bytes()
        for p in sorted(folder.rglob("*"))
    }
