"""Plain cross-entropy with hard labels, as a term of a sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.errors import ConfigError
from synthkit.logits import ce_per_sample

if TYPE_CHECKING:
    from torch import Tensor


def ce_loss(
    student: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, reduction: Literal["none", "mean"] = "mean"
):
    """Cross-entropy of the student with the labels; the teacher is not read.

    `l_i = -sum_k y_ik log q_ik`, `q = softmax(s)`, `y_ik = (1 - a) [k = label_i] + a / K`, a the label smoothing.

    Shapes: `student` (B, K) logits, any range; `labels` (B,) int64; returns (B,) for "none", a scalar for "mean".

    Source: the supervised term of RepDistiller (HobbitLong/RepDistiller@b84f547, `criterion_cls`) and its successors.
    Differs from source: nothing; label smoothing (0 there) is the one of torch.
    Cost: O(B K) time and memory.

    >>> import torch
    >>> round(float(ce_loss(torch.zeros(1, 2), torch.tensor([0]))), 4)
    0.6931
    """
    return reduce(ce_per_sample(student, labels, label_smoothing), reduction)


class CE(Loss):
    """`ce_loss` as a term (`--loss "ce+dkd@ramp20" --loss.ce.label_smoothing 0.1`)."""

    requires = LossNeeds(labels=True)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of CE."""

        label_smoothing: float = 0.0
        """Share of the target that is spread evenly over all classes, in [0, 1)."""

        def __post_init__(self):
            if not 0 <= self.label_smoothing < 1:
                raise ConfigError("loss.label_smoothing must be in [0, 1)", got=self.label_smoothing)

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None  # `requires`
        smoothing = self.config.label_smoothing
        return {"ce": ce_loss(student.logits, batch.labels, label_smoothing=smoothing, reduction="none")}
