"""Loss terms of generators and inversion: pure functions of logits, features and BN statistics.

All logits are (B, K), features (B, D); every function returns a scalar unless it says otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from synthkit.lazy import F, torch
from synthkit.logits import kl_per_sample

if TYPE_CHECKING:
    from torch import Tensor


def class_entropy(logits: Tensor, T: float = 1.0) -> Tensor:
    """Entropy H of the batch-mean class distribution mean_i softmax(t_i / T); maximal (log K) for a balanced batch."""
    mean = F.softmax(logits / T, dim=1).mean(0)
    # The clamp changes no value; without it a class of probability exactly 0 would have the gradient of log 0.
    return -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()


def one_hot_loss(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Cross-entropy to the labels (B,), or to the network's own argmax: confident images."""
    return F.cross_entropy(logits, logits.detach().argmax(1) if labels is None else labels)


def activation_loss(features: Tensor) -> Tensor:
    """-mean |f|: strongly activated penultimate features (DAFL)."""
    return -features.abs().mean()


def masked_adversarial_kl(student: Tensor, teacher: Tensor, T: float = 3.0) -> Tensor:
    """-mean_i 1[argmax s_i = argmax t_i] T^2 KL(softmax(t_i/T) || softmax(s_i/T)), the mean over all B.

    The student's mistakes are not pushed further: only samples on which both decide alike count (decision adversary).
    """
    agree = (student.argmax(1) == teacher.argmax(1)).to(teacher.dtype)
    return -(kl_per_sample(student, teacher, T) * agree).mean()


def adi_divergence(
    student: Tensor, teacher: Tensor, T: float = 3.0, mean: Literal["batch", "element"] = "batch"
) -> Tensor:
    """Jensen-Shannon divergence J of Adaptive DeepInversion: J = KL(M||P)/2 + KL(M||Q)/2, batchmean.

    P, Q are softmax(s/T), softmax(t/T), M their mean, each clamped to [0.01, 0.99] after averaging. With mean
    "element" the sum over classes is a mean as well, 1/K of J (PRE-DFKD, MB-DFKD, LRA, TA-DFKD).
    Source: NVlabs/DeepInversion@2413af1 (direction as there: F.kl_div(log P, M)).
    """
    p, q = F.softmax(student / T, dim=1), F.softmax(teacher / T, dim=1)
    middle = 0.5 * (p + q)
    p, q, middle = (x.clamp(0.01, 0.99) for x in (p, q, middle))
    terms = 0.5 * sum(F.kl_div(x.log(), middle, reduction="none") for x in (p, q))
    return terms.sum(1).mean() if mean == "batch" else terms.mean()  # type: ignore[union-attr]  # sum of two tensors


def adversarial_js(
    student: Tensor, teacher: Tensor, T: float = 3.0, mean: Literal["batch", "element"] = "batch"
) -> Tensor:
    """1 - clamp(J, 0, 1) with J of `adi_divergence`: images on which student and teacher differ."""
    return 1 - adi_divergence(student, teacher, T, mean).clamp(0, 1)


def adversarial_kl(student: Tensor, teacher: Tensor, T: float = 1.0) -> Tensor:
    """-mean_i T^2 KL(softmax(t_i/T) || softmax(s_i/T)): images on which student and teacher differ (DFQ, ZSKT)."""
    return -kl_per_sample(student, teacher, T).mean()


def adversarial_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """-mean |s - t| over all logits (DFAD)."""
    return -(student - teacher).abs().mean()
