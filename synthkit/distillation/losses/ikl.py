"""Improved Kullback-Leibler distillation (IKL, version 1) and its table of class priors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import check_temperature, reduce
from synthkit.errors import ConfigError
from synthkit.lazy import F, torch
from synthkit.logits import soft_ce_per_sample

if TYPE_CHECKING:
    from torch import Tensor, nn


def weighted_mse(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """(B,): `1/4 sum_jk w_j w_k (d_j - d_k)^2`, d = s - t, for non-negative weights (B, K).

    In closed form `W/2 sum_j w_j (d_j - m)^2` with `W = sum_j w_j` and `m = sum_j w_j d_j / W`: O(K), not O(K^2).
    """
    difference = student - teacher
    total = weights.sum(dim=1, keepdim=True)
    # centred first: the sum of squares minus the square of the sum loses the digits of a common offset
    centred = difference - (weights * difference).sum(dim=1, keepdim=True) / total
    return 0.5 * total.squeeze(1) * (weights * centred.square()).sum(dim=1)


def teacher_soft_ce(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(B,): cross-entropy with the teacher's softened probabilities, without the factor T^2, as IKL and GKL have it."""
    return soft_ce_per_sample(student, teacher, temperature) / temperature**2


def ikl_loss(
    student: Tensor,
    teacher: Tensor,
    prior: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    weight_temperature: float = 100.0,
    reduction: Literal["none", "mean"] = "mean",
):
    """KL in its decoupled form, with the gradient of the weighted logit differences kept.

    `l_i = beta/4 sum_jk w_j w_k (d_ij - d_ik)^2 + alpha CE(softmax(t_i / T), softmax(s_i / T))`, `d = s - t`,
    `w = softmax(t_i / T2)` or, with class priors, the mean of `softmax(t / T2)` over the images of the same label.
    No factor T^2. In KL the first part gives a fixed teacher's student no gradient of its own; here it does.

    Shapes: `student`, `teacher` (B, K) logits, any range; `prior` (B, K) rows that sum to 1, or None; (B,) or scalar.

    Source: Cui et al. 2023 (arXiv 2305.13948), jiequancui/DKL@c5e8ad2 (DKLv1, `IKL_KD.py`), whose numbers the tests
    check. CIFAR-100: `ce+ikl@ramp20`, T = 4, T2 = 100, alpha 1 to 4, beta 4 to 12 by pair; ImageNet: class priors,
    T = T2 = 1, alpha/beta 1/0.5 or 4/1, `@ramp1`.
    Differs from source: the closed form of `weighted_mse` instead of the K x K pairs; a class that no image of an
    epoch had keeps its prior (released: 0/0). The warm-up is the sum's; the source counts its epochs from 1.
    Cost: O(B K) time and memory; with class priors O(B K^2) time and two K x K tables.

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0, 4.0]])
    >>> float(ikl_loss(x + 3, x, alpha=0.0)) < 1e-9
    True
    """
    weights = F.softmax(teacher / weight_temperature, dim=1) if prior is None else prior
    values = beta * weighted_mse(student, teacher, weights) + alpha * teacher_soft_ce(student, teacher, temperature)
    return reduce(values, reduction)


# --- the class priors -------------------------------------------------------------------------------------------------


def prior_table(num_classes: int) -> nn.Module:
    """Buffers for `prior_rows`: the priors in use (K, K), this epoch's sums (K, K), and the epoch; uniform at first."""
    table = torch.nn.Module()
    table.register_buffer("prior", torch.full((num_classes, num_classes), 1.0 / num_classes))
    table.register_buffer("sums", torch.zeros(num_classes, num_classes))
    table.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
    return table


def prior_rows(table: Any, teacher: Tensor, labels: Tensor, *, epoch: float, temperature: float) -> Tensor:
    """(B, K): the priors of `labels` from the last whole epoch; adds this batch to the epoch that runs.

    Everything happens on the device: whether a new epoch began is a tensor too, so that no step waits for the answer,
    and what is needed to resume lies in the buffers. No autocast: a sum over an epoch needs its digits.
    """
    with torch.no_grad(), torch.autocast(teacher.device.type, enabled=False):
        whole = math.floor(epoch)
        turned = table.epoch != whole
        totals = table.sums.sum(dim=1, keepdim=True)
        table.prior.copy_(torch.where(turned & (totals > 0), table.sums / totals, table.prior))
        table.sums.mul_(~turned)
        table.epoch.fill_(whole)
        rows = table.prior[labels].to(teacher.dtype)
        probabilities = F.softmax(teacher / temperature, dim=1).to(table.sums.dtype)
        # a product and not index_add_, whose order of additions is not fixed on a GPU
        table.sums.add_(F.one_hot(labels, len(totals)).to(table.sums.dtype).T @ probabilities)
        return rows


class IKL(Loss):
    """`ikl_loss` as a loss of the table (`--loss "ce+ikl@ramp20" --loss.ikl.beta 8`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of IKL."""

        alpha: float = 1.0
        """Weight of the soft cross-entropy."""
        beta: float = 8.0
        """Weight of the weighted squared differences."""
        temperature: float = 4.0
        """Softening temperature T of the soft cross-entropy."""
        weight_temperature: float = 100.0
        """Softening temperature T2 of the weights; 100 makes them almost equal."""
        class_prior: bool = False
        """Weights from the priors of the labels (needs labels) instead of the image's own probabilities."""

        def __post_init__(self):
            check_temperature(self.temperature)
            check_temperature(self.weight_temperature)
            for name in ("alpha", "beta"):
                if not getattr(self, name) >= 0:
                    raise ConfigError(f"loss.{name} must not be negative", got=getattr(self, name))

    def __init__(self, config: Any = None):
        super().__init__(config)
        on = self.config.class_prior  # the table is of the whole batch, so that all ranks hold the same
        self.requires = LossNeeds(labels=on, relational=on)

    def setup(self, setup: Setup) -> None:
        if self.config.class_prior:
            self.aux = prior_table(setup.num_classes)

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        cfg, s, t = self.config, student.logits, teacher.logits
        if cfg.class_prior:
            assert batch.labels is not None  # `requires`
            weights = prior_rows(self.aux, t, batch.labels, epoch=batch.epoch, temperature=cfg.weight_temperature)
        else:
            weights = F.softmax(t / cfg.weight_temperature, dim=1)
        return {
            "ikl_wmse": cfg.beta * weighted_mse(s, t, weights),
            "ikl_soft_ce": cfg.alpha * teacher_soft_ce(s, t, cfg.temperature),
        }
