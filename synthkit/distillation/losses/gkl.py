"""Generalised Kullback-Leibler distillation (GKL, version 2 of IKL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import check_temperature, reduce
from synthkit.distillation.losses.ikl import prior_rows, prior_table, teacher_soft_ce, weighted_mse
from synthkit.errors import ConfigError
from synthkit.lazy import F

if TYPE_CHECKING:
    from torch import Tensor


def gkl_weights(
    teacher: Tensor, prior: Tensor | None = None, *, gamma: float = 0.05, weight_temperature: float = 4.0
) -> Tensor:
    """(B, K): the prior rows, or the teacher's `softmax(t / T2)`, to the power gamma; they do not sum to 1."""
    if prior is not None:
        return prior**gamma
    return (gamma * F.log_softmax(teacher / weight_temperature, dim=1)).exp()


def batch_weighted_mse(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """(B,): `weighted_mse` divided by the batch's mean of `(sum_j w_j)^2`."""
    return weighted_mse(student, teacher, weights) / weights.sum(dim=1).square().mean()


def gkl_loss(
    student: Tensor,
    teacher: Tensor,
    prior: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 16.0,
    gamma: float = 0.05,
    temperature: float = 4.0,
    weight_temperature: float = 4.0,
    reduction: Literal["none", "mean"] = "mean",
):
    """IKL with weights that a power flattens, normalised over the batch.

    `L = beta sum_b 1/4 sum_jk w_bj w_bk (d_bj - d_bk)^2 / sum_b (sum_j w_bj)^2
    + alpha mean_b CE(softmax(t_b / T), softmax(s_b / T))`, `d = s - t`, `w = softmax(t / T2)^gamma` or the prior of the
    label to the power gamma. No factor T^2. Gamma 1 is IKL with T2, gamma 0 weighs all classes the same.

    Shapes: `student`, `teacher` (B, K) logits, any range; `prior` (B, K) rows that sum to 1, or None; (B,) or scalar.

    Source: Cui et al. 2025 (arXiv 2503.08038), jiequancui/DKL@c5e8ad2 (DKLv2, `GKL_KD.py`), whose numbers the tests
    check. CIFAR-100: `ce+gkl@ramp20`, T = T2 = 4, gamma 0 to 0.3, beta 4 to 20 and class priors on or off by pair;
    ImageNet: class priors, T2 = 1, gamma 0.6 or 0.5.
    Differs from source: closed form, and the empty class, as in `ikl_loss`; class priors are off by default, since a
    bank need not have labels. The value of a sample depends on its batch through the common divisor.
    Cost: O(B K) time and memory; with class priors O(B K^2) time and two K x K tables.

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0, 4.0]])
    >>> float(gkl_loss(x + 3, x, alpha=0.0)) < 1e-9
    True
    """
    weights = gkl_weights(teacher, prior, gamma=gamma, weight_temperature=weight_temperature)
    soft = teacher_soft_ce(student, teacher, temperature)
    return reduce(beta * batch_weighted_mse(student, teacher, weights) + alpha * soft, reduction)


class GKL(Loss):
    """`gkl_loss` as a loss of the table (`--loss "ce+gkl@ramp20" --loss.gkl.class_prior true`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of GKL."""

        alpha: float = 1.0
        """Weight of the soft cross-entropy."""
        beta: float = 16.0
        """Weight of the weighted squared differences."""
        gamma: float = 0.05
        """Power of the weights, in [0, 1]: 0 weighs all classes the same, 1 by their probability."""
        temperature: float = 4.0
        """Softening temperature T of the soft cross-entropy."""
        weight_temperature: float = 4.0
        """Softening temperature T2 of the weights."""
        class_prior: bool = False
        """Weights from the priors of the labels (needs labels) instead of the image's own probabilities."""

        def __post_init__(self):
            check_temperature(self.temperature)
            check_temperature(self.weight_temperature)
            for name in ("alpha", "beta"):
                if not getattr(self, name) >= 0:
                    raise ConfigError(f"loss.{name} must not be negative", got=getattr(self, name))
            if not 0 <= self.gamma <= 1:
                raise ConfigError("loss.gamma must be in [0, 1]", got=self.gamma)

    def __init__(self, config: Any = None):
        super().__init__(config)
        cfg = self.config
        # at gamma 0 and 1 all samples have the same sum of weights, and the divisor is the same for any part of a batch
        self.requires = LossNeeds(labels=cfg.class_prior, relational=cfg.class_prior or cfg.gamma not in (0, 1))

    def setup(self, setup: Setup) -> None:
        if self.config.class_prior:
            self.aux = prior_table(setup.num_classes)

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        cfg, s, t = self.config, student.logits, teacher.logits
        prior = None
        if cfg.class_prior:
            assert batch.labels is not None  # `requires`
            prior = prior_rows(self.aux, t, batch.labels, epoch=batch.epoch, temperature=cfg.weight_temperature)
        weights = gkl_weights(t, prior, gamma=cfg.gamma, weight_temperature=cfg.weight_temperature)
        return {
            "gkl_wmse": cfg.beta * batch_weighted_mse(s, t, weights),
            "gkl_soft_ce": cfg.alpha * teacher_soft_ce(s, t, cfg.temperature),
        }
