"""Learnt soft labels: where they start, and images that the experts get right (DATM).

Source: NUS-HPC-AI-Lab/DATM@97ae510 distill/DATM.py; method card `matching` 2.8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from synthkit.errors import DataError
from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.synthesis.matching.pool import RealPool

Predict = Callable[[int, "Tensor"], "Tensor"]
"""(expert, images (B, C, H, W)) -> its logits (B, K)."""
_BATCH = 500


def correct_rows(real: RealPool, labels: Tensor, experts: int, predict: Predict, draws: torch.Generator) -> Tensor:
    """One row of `real` per label of `labels` (N,), without repetition: images that the first expert gets right, taken
    in random order; where those of a class run out, images that the next expert gets right, and so on.

    Raises:
        DataError: a class has too few images that any expert gets right.
    """
    chosen = torch.empty_like(labels)
    for label in labels.unique().tolist():
        places = (labels == label).nonzero()[:, 0]
        left, found = real.draw(label, len(real), draws), torch.empty(0, dtype=torch.int64)
        for expert in range(experts):
            missing = len(places) - len(found)
            right, wrong = [], []
            for part in left.split(_BATCH):
                if missing <= 0:
                    break
                hit = (predict(expert, real.take(part)).argmax(1) == label).cpu()
                right.append(part[hit])
                wrong.append(part[~hit])
                missing -= int(hit.sum())
            found = torch.cat([found, *right])
            if missing <= 0:
                break
            left = torch.cat(wrong)
        if len(found) < len(places):
            raise DataError(
                f"class {real.data.class_names[label]!r} has {len(found)} images that an expert gets right,"
                f" {len(places)} are to start from",
                hint="train more experts or for longer (--method.experts_count, --method.expert_length), or init real",
            )
        chosen[places] = found[: len(places)]
    return chosen


def expert_logits(images: Tensor, labels: Tensor, experts: int, predict: Predict) -> Tensor:
    """Mean logits (N, K) of the experts that get an image right; of all experts where none does.

    Args:
        images: (N, C, H, W) in training space.
        labels: (N,) on the same device.
    """
    parts = []
    for x, y in zip(images.split(_BATCH), labels.split(_BATCH), strict=True):
        logits = torch.stack([predict(expert, x) for expert in range(experts)])
        right = (logits.argmax(2) == y).to(logits.dtype)
        weights = torch.where(right.sum(0) > 0, right, torch.ones_like(right))
        parts.append((weights[:, :, None] * logits).sum(0) / weights.sum(0)[:, None])
    return torch.cat(parts)
