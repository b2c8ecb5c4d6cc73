"""Cross-entropy with the teacher's softened probabilities as targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, Taps
from synthkit.distillation.losses.common import check_temperature, reduce, scaled
from synthkit.logits import soft_ce_per_sample

if TYPE_CHECKING:
    from torch import Tensor


def soft_ce_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    t_squared: bool = True,
    reduction: Literal["none", "mean"] = "mean",
):
    """Soft-label cross-entropy.

    `l_i = -T^2 * sum_k p_ik log q_ik`, `p = softmax(t / T)`, `q = softmax(s / T)`. It is `kd_loss` plus the teacher's
    entropy: the same gradient in the student, another value (never 0). Without `t_squared` the factor T^2 is 1.

    Shapes: `student`, `teacher` (B, K) logits, any range; returns (B,) for "none", a scalar for "mean".

    Source: the post-training of the SRe2L family and FKD (Shen, Xing 2022, arXiv 2112.01528) at T = 1.
    Differs from source: the factor T^2 keeps gradients comparable over temperatures; at T = 1 it is the source's form.
    Cost: O(B K) time and memory.

    >>> import torch
    >>> round(float(soft_ce_loss(torch.zeros(1, 2), torch.zeros(1, 2))), 4)
    0.6931
    """
    return reduce(scaled(soft_ce_per_sample(student, teacher, temperature), temperature, t_squared), reduction)


class SoftCE(Loss):
    """`soft_ce_loss` as a loss of the table (`--loss soft_ce --loss.temperature 1`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of SoftCE."""

        temperature: float = 1.0
        """Softening temperature T of both networks."""
        t_squared: bool = True
        """Whether the cross-entropy is multiplied by T^2."""

        def __post_init__(self):
            check_temperature(self.temperature)

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        options = {"temperature": self.config.temperature, "t_squared": self.config.t_squared}
        return {"soft_ce": soft_ce_loss(student.logits, teacher.logits, **options, reduction="none")}
