"""L1 distance of the raw logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.logits import l1_per_sample

if TYPE_CHECKING:
    from torch import Tensor


def l1_loss(student: Tensor, teacher: Tensor, *, reduction: Literal["none", "mean"] = "mean"):
    """Mean absolute difference of the logits.

    `l_i = (1/K) sum_k |s_ik - t_ik|`; no softmax, so the scale and offset of the logits are learnt too.

    Shapes: `student`, `teacher` (B, K) logits, any range; returns (B,) for "none", a scalar for "mean".

    Source: the student loss of DFQ, ZSKT's successors and CuDFKD's `--loss l1` (ljrprocc/DataFree@bf3096b).
    Differs from source: per-sample values on request; the mean is the same number.
    Cost: O(B K) time and memory.

    >>> import torch
    >>> float(l1_loss(torch.ones(2, 3), torch.zeros(2, 3)))
    1.0
    """
    return reduce(l1_per_sample(student, teacher), reduction)


class L1(Loss):
    """`l1_loss` as a loss of the table (`--loss l1`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """L1 has no options."""

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        return {"l1": l1_loss(student.logits, teacher.logits, reduction="none")}
