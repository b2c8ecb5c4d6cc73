"""Signals of how good a student is that need no real image and no label.

All look at probe images: images of a bank that the student was not trained along with. Logits are (B, K); every
function returns one number and is pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from synthkit.lazy import torch
from synthkit.logits import agreement_per_sample, kl_per_sample

if TYPE_CHECKING:
    from torch import Tensor


class Signal(NamedTuple):
    """One signal: which way is better, decided before any accuracy was seen, and what it is."""

    better: int
    """1: higher is better; -1: lower."""
    text: str


SIGNALS: dict[str, Signal] = {
    "agreement": Signal(1, "share of probe images on which the student names the teacher's class"),
    "agreement_augmented": Signal(1, "the same on mildly augmented probe images (the teacher sees the same ones)"),
    "kl": Signal(-1, "soft agreement: mean KL(teacher || student) on probe images, nats"),
    "confidence": Signal(1, "mean top probability of the student on probe images"),
    "class_balance": Signal(1, "entropy of the student's classes on class-balanced probe images over its maximum"),
    "bn_distance": Signal(-1, "BN statistics of probe images against the running ones, student's over teacher's"),
    "disagreement": Signal(-1, "share of probe images on which the method's other seeds name another class"),
}
"""Every signal by its name. `bn_distance` needs BatchNorm in both networks, `disagreement` another seed."""


def agreement(student: Tensor, teacher: Tensor) -> float:
    """mean_i 1[argmax s_i = argmax t_i], in [0, 1].

    Source: fidelity of a student to its teacher, Stanton et al. 2021, arXiv 2106.05945.
    """
    return float(agreement_per_sample(student.double(), teacher).mean())


def soft_agreement(student: Tensor, teacher: Tensor) -> float:
    """mean_i KL(softmax(t_i) || softmax(s_i)) in nats; 0 where both say the same."""
    return float(kl_per_sample(student.double(), teacher.double()).mean())


def confidence(student: Tensor) -> float:
    """mean_i max_k softmax(s_i)_k, in [1/K, 1].

    Source: average confidence as a label-free estimate of accuracy, Guillory et al. 2021, arXiv 2107.03315.
    """
    return float(torch.softmax(student.double(), dim=1).amax(1).mean())


def class_balance(student: Tensor, teacher: Tensor) -> float:
    """H(q) / log C, q = mean over the C classes that the teacher names of the student's class shares within the class.

    1: on images that the teacher finds balanced the student uses all classes alike; 0: it knows one class only. Classes
    of the student beyond those C can lift the entropy above its maximum: it is cut off at 1. C = 1 gives 1.
    """
    classes = student.shape[1]
    table = torch.bincount(teacher.argmax(1) * classes + student.argmax(1), minlength=classes * classes)
    table = table.view(classes, classes).double()
    named = table.sum(1) > 0
    present = int(named.sum())
    if present < 2:
        return 1.0
    share = (table[named] / table[named].sum(1, keepdim=True)).mean(0)
    return min(1.0, float(torch.special.entr(share).sum()) / math.log(present))


def bn_distance(batch: Sequence[tuple[Tensor, Tensor]], running: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean over layers of (||m - M||_2 + ||v - V||_2) / (||M||_2 + ||V||_2): batch statistics against running ones.

    Args:
        batch: (mean, biased variance), each (C,), of every BatchNorm layer's input.
        running: the layers' running (M, V).

    Source: the BatchNorm term of DeepInversion (see `bn_stats`). Differs from source: every layer is divided by the
        size of its running statistics, so that deep and wide networks can be compared.
    """
    norm = torch.linalg.vector_norm
    parts = [
        (norm(m - running_m) + norm(v - running_v)) / (norm(running_m) + norm(running_v)).clamp(min=1e-12)
        for (m, v), (running_m, running_v) in zip(batch, running, strict=True)
    ]
    return float(torch.stack(parts).double().mean())


def disagreement(first: Tensor, second: Tensor) -> float:
    """Share of images to which two students give different classes; both (B,) class numbers.

    Source: the disagreement of two trainings estimates their error, Jiang et al. 2022, arXiv 2106.13799.
    """
    return float((first != second).double().mean())
