"""Mean squared error of the raw logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.logits import l2_per_sample

if TYPE_CHECKING:
    from torch import Tensor


def mse_loss(student: Tensor, teacher: Tensor, *, reduction: Literal["none", "mean"] = "mean"):
    """Mean squared difference of the logits.

    `l_i = (1/K) sum_k (s_ik - t_ik)^2`; no softmax, so the scale and offset of the logits are learnt too. For centred
    logits `kd_loss` tends to half of it as T grows.

    Shapes: `student`, `teacher` (B, K) logits, any range; returns (B,) for "none", a scalar for "mean".

    Source: Ba, Caruana 2014 (arXiv 1312.6184); Kim et al. 2021 (arXiv 2105.08919), who compare it with KD; the mse of
    the data-free line (ljrprocc/DataFree@bf3096b), whose numbers the tests check.
    Differs from source: per-sample values on request; the mean is the same number.
    Cost: O(B K) time and memory.

    >>> import torch
    >>> float(mse_loss(torch.ones(2, 3), -torch.ones(2, 3)))
    4.0
    """
    return reduce(l2_per_sample(student, teacher), reduction)


class MSE(Loss):
    """`mse_loss` as a loss of the table (`--loss mse`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """MSE has no options."""

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        return {"mse": mse_loss(student.logits, teacher.logits, reduction="none")}
