"""Distances between gradients and between features: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

Distance = Literal["rows", "mse", "cos"]
_EPS = 1e-6


def gradient_distance(synthetic: Sequence[Tensor], real: Sequence[Tensor], kind: Distance = "rows") -> Tensor:
    """Scalar distance of two gradients, given as one tensor per parameter in the same order.

    rows: sum over parameters of two or more dimensions and over their output rows r of
    1 - <a_r, b_r> / (|a_r| |b_r| + 1e-6); biases and norm weights are passed over.
    mse: squared Euclidean distance over all parameters. cos: 1 - cosine over all parameters.
    """
    if kind == "rows":
        pairs = [(a.flatten(1), b.flatten(1)) for a, b in zip(synthetic, real, strict=True) if a.ndim > 1]
        return torch.stack([(1 - _cosine(a, b)).sum() for a, b in pairs]).sum()
    a, b = (torch.cat([g.flatten() for g in gradient]) for gradient in (synthetic, real))
    return (a - b).square().sum() if kind == "mse" else 1 - _cosine(a, b)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + _EPS)


def mean_distance(real: Tensor, synthetic: Tensor) -> Tensor:
    """|| mean real - mean synthetic ||^2 of features (N, D) and (M, D), scalar."""
    return (real.mean(0) - synthetic.mean(0)).square().sum()


def soft_cross_entropy(logits: Tensor, label_logits: Tensor) -> Tensor:
    """-mean_i sum_k softmax(z_i)_k log softmax(f_i)_k of logits f and label logits z, both (B, K); gradient to both."""
    return -(label_logits.softmax(1) * F.log_softmax(logits, 1)).sum(1).mean()
