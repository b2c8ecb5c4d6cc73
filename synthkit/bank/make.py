"""Banks from arrays: the embedded evaluation bank, controls of noise or real images, and tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank.reader import Bank
from synthkit.bank.spec import SHARD_BYTES, BankSpec, LabelKind
from synthkit.bank.writer import BankWriter
from synthkit.errors import UsageError


def bank_from_arrays(
    path: str | Path,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    num_classes: int,
    mean: list[float],
    std: list[float],
    class_names: list[str] | None = None,
    label_kind: LabelKind = "real",
    columns: Mapping[str, np.ndarray] | None = None,
    images_per_shard: int | None = None,
    seed: int = 0,
    recipe: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
    real_data_used: bool | None = None,
    contains_real: bool | None = None,
    extra: dict[str, Any] | None = None,
) -> Bank:
    """Write a complete bank from arrays in memory and open it.

    Args:
        images: uint8 (N,C,H,W).
        labels: integers (N,); none makes a bank without labels.
        columns: further columns, e.g. {"logits": (N,K), "difficulty": (N,)}.
        images_per_shard: none takes as many as fit in 64 MiB.
        real_data_used, contains_real: what the images are; none takes both as true when `label_kind` is "real".

    Raises:
        UsageError: an array has the wrong shape or type. OutputExistsError: `path` is not empty.
        StorageError: writing failed.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
        raise UsageError("bank_from_arrays: images must be uint8 (N, C, H, W)", got=f"{images.dtype} {images.shape}")
    rows = {"images": images, **({} if labels is None else {"labels": np.asarray(labels)}), **(columns or {})}
    for name, value in rows.items():
        if np.shape(value)[:1] != (len(images),):
            raise UsageError(f"bank_from_arrays: {name} must have {len(images)} rows", got=np.shape(value))
    kind: LabelKind = "none" if labels is None else label_kind
    real = kind == "real"
    largest = max(1, min(len(images), SHARD_BYTES // images[0].nbytes))  # nothing to resume here: few, large shards
    spec = BankSpec(
        shape=(images.shape[1], images.shape[2], images.shape[3]), num_classes=num_classes, class_names=class_names,
        mean=mean, std=std, label_kind=kind, images=len(images), seed=seed,
        images_per_shard=images_per_shard or largest,
        recipe=recipe or {"method": "arrays"}, teacher=teacher or {},
        real_data_used=real if real_data_used is None else real_data_used,
        contains_real=real if contains_real is None else contains_real, extra=extra or {},
    )  # fmt: skip
    writer = BankWriter.create(path, spec)
    for index in range(writer.shards):
        start = index * spec.per_shard
        part = slice(start, start + writer.shard_size(index))
        writer.write_shard(index, {name: value[part] for name, value in rows.items()})
    return Bank(path)


def noise_images(count: int, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """`count` images of independent uniform pixels, uint8 (count, *shape): the control that carries no knowledge."""
    return np.random.default_rng(np.random.SeedSequence([seed, 0x6E6F6973])).integers(
        0, 256, size=(count, *shape), dtype=np.uint8
    )
