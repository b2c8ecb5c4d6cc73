"""What GenDD trains its head on: contracted features, cut into tokens and repeated; and its released schedules."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_MILESTONES = (150 / 240, 180 / 240, 210 / 240)


def contract(feature: Tensor, centres: Tensor, labels: Tensor | None, share: float) -> Tensor:
    """Distribution contraction: `(1 - share) x + share W_y`; soft labels q give `q^T W` for `W_y`, none leaves x.

    Shapes: `feature` (B, D), `centres` (K, D), `labels` (B,) int64 or (B, K) probabilities; returns (B, D).
    """
    if labels is None:
        return feature
    own = centres[labels] if labels.dim() == 1 else labels.to(centres.dtype) @ centres
    return (1.0 - share) * feature + share * own


def mixed(values: Tensor, share: Tensor | float, order: Tensor) -> Tensor:
    """`share v + (1 - share) v[order]` of the rows of `values` (B, D)."""
    return share * values + (1.0 - share) * values[order]


def tokenised(feature: Tensor, condition: Tensor, token_dim: int, repeats: int) -> tuple[Tensor, Tensor, Tensor]:
    """Consecutive tokens of the features, beside each its condition and its position, all `repeats` times.

    Shapes: `feature` (B, C token_dim), `condition` (B, d); returns (R B C, token_dim), (R B C, d) and (R B C,) int64;
    the row of repeat r, sample b and token c is `(r B + b) C + c`.
    """
    size, width = feature.shape
    tokens = width // token_dim
    position = torch.arange(tokens, device=feature.device).repeat(repeats * size)
    beside = condition.repeat_interleave(tokens, dim=0).repeat(repeats, 1)
    return feature.reshape(-1, token_dim).repeat(repeats, 1), beside, position


def dropped(condition: Tensor, uniform: Tensor, probability: float) -> Tensor:
    """Condition rows (N, d), 0 where `uniform` (N,) lies below `probability`."""
    return torch.where((uniform < probability)[:, None], 0.0, condition)


def diffusion_loss(
    head: Any, process: Any, rows: tuple[Tensor, Tensor, Tensor], index: Tensor, noise: Tensor
) -> Tensor:
    """Noise error plus variational bound (bits) of every row.

    Shapes: `rows` as `tokenised` gives N of them, `index` (N,) int64 steps, `noise` (N, token_dim); returns (N,).
    """
    tokens, condition, position = rows
    state = process.noised(tokens, index, noise)
    output = head(state, index.to(tokens.device), condition, position)
    squared, bound = process.terms(output, tokens, state, noise, index)
    return squared + bound


def beta2_at(progress: float, first: float, last: float) -> float:
    """beta2 of Adam along a cosine from `first` to `last`."""
    return last - (last - first) * 0.5 * (1.0 + math.cos(math.pi * progress))


def released_rate(epoch: int, epochs: int, schedule: Literal["step", "cosine"], warmup: int) -> float:
    """Factor of the learning rate in `epoch` (from 1) as the CIFAR code sets it: `epoch / warmup` in the warm-up.

    "step" assigns no rate between the warm-up and the first of 150/240, 180/240 and 210/240 of the epochs, so that it
    stays at `(warmup - 1) / warmup`; after each it is a tenth. "cosine" falls from 1 to 0.
    """
    if schedule == "cosine" and epoch >= warmup:
        return 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1)))
    passed = sum(epoch > share * epochs for share in _MILESTONES)
    return 0.1**passed if passed or warmup < 2 else min(epoch, warmup - 1) / warmup
