"""Pure functions of logits, one value per sample: what every loss, curriculum and metric of the house is built from.

Shapes: `student` and `teacher` are (B, K) float logits of the same images; every function returns (B,) in the dtype
of its input and is differentiable in both arguments (detach the teacher where that is meant). `T` is the temperature;
`p = softmax(x / T)`. All are O(B K) in time and memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


def kl_per_sample(student: Tensor, teacher: Tensor, T: float = 1.0) -> Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))`; its mean is the usual "batchmean" KD loss."""
    log_s = F.log_softmax(student / T, dim=1)
    log_t = F.log_softmax(teacher / T, dim=1)
    return (log_t.exp() * (log_t - log_s)).sum(dim=1) * (T * T)


def l1_per_sample(student: Tensor, teacher: Tensor) -> Tensor:
    """`mean_k |s_k - t_k|` on the raw logits."""
    return (student - teacher).abs().mean(dim=1)


def l2_per_sample(student: Tensor, teacher: Tensor) -> Tensor:
    """`mean_k (s_k - t_k)^2` on the raw logits."""
    return (student - teacher).square().mean(dim=1)


def js_per_sample(student: Tensor, teacher: Tensor, T: float = 1.0) -> Tensor:
    """`T^2 * (KL(p_t || m) + KL(p_s || m)) / 2` with `m = (p_t + p_s) / 2`; between 0 and `T^2 ln 2`."""
    log_s = F.log_softmax(student / T, dim=1)
    log_t = F.log_softmax(teacher / T, dim=1)
    log_m = torch.logaddexp(log_s, log_t) - 0.6931471805599453
    parts = log_t.exp() * (log_t - log_m) + log_s.exp() * (log_s - log_m)
    return parts.sum(dim=1) * (0.5 * T * T)


def soft_ce_per_sample(student: Tensor, teacher: Tensor, T: float = 1.0) -> Tensor:
    """`-T^2 * sum_k p_t log p_s`: the KL plus the teacher's entropy (same gradient in the student)."""
    return -(F.softmax(teacher / T, dim=1) * F.log_softmax(student / T, dim=1)).sum(dim=1) * (T * T)


def ce_per_sample(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with hard labels (B,) int64, optionally smoothed."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)


def entropy_per_sample(logits: Tensor, T: float = 1.0) -> Tensor:
    """`-sum_k p_k log p_k` in nats; between 0 and `ln K`."""
    log_p = F.log_softmax(logits / T, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def agreement_per_sample(student: Tensor, teacher: Tensor) -> Tensor:
    """1 where both name the same class, else 0 (no gradient)."""
    return (student.argmax(dim=1) == teacher.argmax(dim=1)).to(student.dtype)
