"""From what a method yields to the columns of a shard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from synthkit.lazy import torch
from synthkit.synthesis.base import to_uint8

if TYPE_CHECKING:
    from synthkit.synthesis.base import ImageBatch

COLUMNS = ("images", "labels", "logits", "difficulty", "images_f16", "origin_step")
_DTYPES = {"labels": np.int32, "logits": np.float16, "difficulty": np.float32, "images_f16": np.float16}


def arrays_of(batch: ImageBatch) -> dict[str, np.ndarray]:
    """The columns of one batch in the dtypes that a bank stores; those that the method does not make are left out."""
    values = {
        "images": batch.images if batch.images.dtype == torch.uint8 else to_uint8(batch.images),
        "labels": batch.labels,
        "logits": batch.logits,
        "difficulty": batch.difficulty,
        "images_f16": batch.pixels,
    }
    arrays = {}
    for name, value in values.items():
        if value is not None:
            array = value.detach().cpu().numpy()
            arrays[name] = array.astype(_DTYPES[name]) if name in _DTYPES else array
    arrays["origin_step"] = np.full(len(batch.images), batch.step, np.uint32)
    return arrays


def columns_of(batches: Iterable[ImageBatch]) -> dict[str, np.ndarray]:
    """The columns of all batches one behind the other."""
    parts = [arrays_of(batch) for batch in batches]
    return {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS if name in parts[0]}
