"""The easy-to-hard curriculum: one idea across the house.

`easy2hard` maps training progress to what a family makes harder: sample weights and the adversarial ramp (generator
methods), crop scale (inversion), the expert's window (matching), guidance (diffusion). This file holds the parts that
do not depend on a method: self-paced weights and their age (generator), and what the ramp raises in each family.

Source: CuDFKD (Li et al., Information Sciences 2023, arXiv 2208.13648), ljrprocc/DataFree@bf3096b
`datafree/datasets/utils.py`; self-paced learning (Kumar et al. 2010), log regulariser as published there; crops of CDA
(Yin & Shen, TMLR 2024, arXiv 2311.18838), VILA-Lab/SRe2L@8d00cba; trajectory window of DATM (Guo et al., ICLR 2024,
arXiv 2310.05773), NUS-HPC-AI-Lab/DATM@97ae510.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.errors import ConfigError
from synthkit.lazy import torch
from synthkit.tables import CURRICULA

if TYPE_CHECKING:
    from torch import Tensor

Weights = Literal["log", "hard", "soft", "none"]
CropForm = Literal["cosine", "linear", "step"]


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Which parts of easy-to-hard are on."""

    name: str = "easy2hard"
    """Name in the curriculum table."""
    weights: Weights = "log"
    """Form of the self-paced sample weights."""
    ramp: bool = True
    """Whether what a family makes harder grows with progress."""

    @classmethod
    def named(cls, name: str) -> Curriculum:
        """The curriculum called `name`.

        Raises:
            ConfigError: no such curriculum.
        """
        forms: dict[str, tuple[Weights, bool]] = {
            "easy2hard": ("log", True),
            "easy2hard-hard": ("hard", True),
            "easy2hard-soft": ("soft", True),
            "weights-only": ("log", False),
            "ramp-only": ("none", True),
            "none": ("none", False),
        }
        if name not in forms:
            raise ConfigError(
                "curriculum: not a known curriculum", got=name, allowed=CURRICULA, hint="synthkit list curricula"
            )
        weights, ramp = forms[name]
        return cls(name=name, weights=weights, ramp=ramp)


def self_paced_weights(loss: Tensor, age: float, form: Weights) -> Tensor:
    """Weight v of samples of loss l at age lambda, without gradient.

    log: v = (1 + e^-lambda) / (1 + e^(l - lambda)); hard: v = 1[l < lambda]; soft: v = 1[l < lambda] (1 - l / lambda);
    none: v = 1.

    Args:
        loss: any shape, non-negative.
        age: lambda > 0 (the losses a student "is ready for").
        form: one of the above.

    Returns:
        Weights of the shape and dtype of `loss`, in [0, 1].
    """
    loss = loss.detach()
    if form == "log":
        return (1 + math.exp(-age)) * torch.sigmoid(age - loss)
    if form == "hard":
        return (loss < age).to(loss.dtype)
    if form == "soft":
        return (loss < age).to(loss.dtype) * (1 - loss / age)
    if form == "none":
        return torch.ones_like(loss)
    raise ConfigError("self-paced weights: no such form", got=form, allowed=["log", "hard", "soft", "none"])


def self_paced_regulariser(weights: Tensor, age: float, form: Weights) -> Tensor:
    """Regulariser g(v, lambda) whose minimiser over v is `self_paced_weights`; logged, it carries no gradient.

    log: mu log mu + v log(v + 1e-8) - lambda v with mu = 1 + e^-lambda - v, elementwise;
    hard: -lambda sum v; soft: lambda (sum v^2 / 2 - sum v), both scalar.
    """
    if form == "log":
        mu = 1 + math.exp(-age) - weights
        return mu * mu.log() + weights * (weights + 1e-8).log() - age * weights
    if form == "hard":
        return -age * weights.sum()
    if form == "soft":
        return age * (0.5 * (weights**2).sum() - weights.sum())
    raise ConfigError("self-paced regulariser: no such form", got=form, allowed=["log", "hard", "soft"])


def age_at(step: int, age_0: float, growth: float) -> float:
    """lambda_k = lambda_0 + growth * k after k student steps (k capped at 5e8, as published)."""
    return age_0 + growth * min(step, 500_000_000)


def adversarial_weight(epoch: int, epochs: int, start: float, growth: float, begin: float, end: float) -> float:
    """Weight of the adversarial term in `epoch` (counted from 0): the easy-to-hard ramp of the generator.

    a(e) = a_0 + g max(0, min(e - 1, e_e - 1) - e_b) with e_b = int(E begin), e_e = int(E end): constant in the first
    (easy) fraction, growing by g an epoch, constant again at the end. Equals the published accumulation.
    """
    first, last = int(epochs * begin), int(epochs * end)
    return start + growth * max(0, min(epoch - 1, last - 1) - first)


def crop_lower_bound(progress: float, form: CropForm = "cosine", milestone: float = 1.0, low: float = 0.08) -> float:
    """Smallest area of a random crop: 1 (whole image, easy) at first, `low` (small parts, hard) from `milestone` on.

    With p = progress / milestone < 1: cosine: low + (1 - low) (1 + cos(pi p)) / 2; linear: low + (1 - low) (1 - p);
    step: 1.

    Args:
        progress: t / T of the optimisation, in [0, 1].
        milestone: share of the iterations over which the bound falls.
    """
    if progress >= milestone:
        return low
    p = progress / milestone
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * p)), "linear": 1 - p, "step": 1.0}[form]
    return low + (1 - low) * share


def trajectory_window(step: int, first: int, last: int, grow: int) -> int:
    """Exclusive upper end of the start epochs of expert trajectories: early (easy) epochs first, later ones by and by.

    min(last, first + floor((last - first) step / grow)): `first` at step 0, `last` from step `grow` on.
    """
    return min(last, first + (last - first) * step // grow)


def rising(progress: float, start: float, end: float) -> float:
    """`start` at progress 0, `end` at 1, linear between (progress is clamped to [0, 1])."""
    return start + (end - start) * min(1.0, max(0.0, progress))
