"""FerKD: soft labels of image regions, calibrated by how sure the teacher is of the region's class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Taps
from synthkit.distillation.losses.common import check_temperature, reduce
from synthkit.errors import ConfigError
from synthkit.lazy import F, torch
from synthkit.logits import ce_per_sample, soft_ce_per_sample

if TYPE_CHECKING:
    from torch import Tensor

Action = Literal["discard", "label"]
ACTIONS = ("discard", "label")


def ferkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    low: float = 0.05,
    high: float = 0.95,
    below: Action = "discard",
    above: Action = "label",
    temperature: float = 1.0,
    smoothing: float = 0.0,
    reduction: Literal["none", "mean"] = "mean",
):
    """Soft-label cross-entropy on regions the teacher is neither lost nor certain about.

    With `c_i = softmax(t_i)[y_i]`: `l_i = -sum_k p_ik log q_ik` for `low <= c_i <= high` (`p`, `q` softened by T,
    times T^2); below `low` (context that hardly shows the class) `l_i = 0`, or the cross-entropy with the label y_i
    (`below="label"`); above `high` that cross-entropy, or 0 (`above="discard"`). Its label may be smoothed.

    Shapes: `student`, `teacher` (B, K) logits, `labels` (B,) int64; returns (B,) for "none", a scalar for "mean".

    Source: Shen 2023, "FerKD: Surgical Label Adaptation for Efficient Distillation" (ICCV), idea only; the training of
    FKD below it (szq0214/FKD).
    Differs from source: its thresholds are in no public code, so `low` and `high` are this toolkit's and open; two
    readings of what happens outside them are on record (discard the hard and label the easy: default here; or label
    the hard, softened, and drop the easy: `below="label", above="discard", smoothing=0.1`). A discarded region keeps
    its place in the batch with loss 0, so that no value depends on the other samples; SelfMix is not done.
    Cost: O(B K) time and memory.

    >>> import torch
    >>> t = torch.tensor([[-9.0, 9.0], [0.0, 0.0], [9.0, -9.0]])
    >>> values = ferkd_loss(torch.zeros(3, 2), t, torch.zeros(3, dtype=torch.int64), reduction="none")
    >>> [round(value, 4) for value in values.tolist()]
    [0.0, 0.6931, 0.6931]
    """
    sure = F.softmax(teacher, dim=1).gather(1, labels[:, None])[:, 0]
    soft = soft_ce_per_sample(student, teacher, temperature)
    hard = ce_per_sample(student, labels, smoothing)
    none = torch.zeros_like(soft)
    values = torch.where(sure < low, hard if below == "label" else none, soft)
    values = torch.where(sure > high, hard if above == "label" else none, values)
    return reduce(values, reduction)


class FerKD(Loss):
    """`ferkd_loss` as a loss of the table (`--loss ferkd --label_set VIEWS --labels stored`).

    Made for stored crops (synthkit relabel --views N), which it filters while training; it works on every image whose
    teacher logits and label are at hand. Mixed views have the label of their own image: leave --mix out.
    """

    requires = LossNeeds(labels=True)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of FerKD."""

        low: float = 0.05
        """Teacher's probability of the label below which a region is too hard (unpublished: choose your own)."""
        high: float = 0.95
        """Probability above which it is very easy (unpublished: choose your own)."""
        below: Action = "discard"
        """What is done with too hard regions: discard, or train on the label."""
        above: Action = "label"
        """What is done with very easy regions: train on the label, or discard."""
        temperature: float = 1.0
        """Softening temperature T of both networks in between."""
        smoothing: float = 0.0
        """Label smoothing where the label is trained on, in [0, 1)."""

        def __post_init__(self):
            check_temperature(self.temperature)
            if not 0 <= self.low <= self.high <= 1:
                raise ConfigError("loss: 0 <= low <= high <= 1 is needed", got=(self.low, self.high))
            if not 0 <= self.smoothing < 1:
                raise ConfigError("loss.smoothing must be in [0, 1)", got=self.smoothing)
            for name in ("below", "above"):
                if getattr(self, name) not in ACTIONS:
                    raise ConfigError(f"loss.{name}: not known", got=getattr(self, name), allowed=ACTIONS)

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None  # `requires`
        c = self.config
        value = ferkd_loss(
            student.logits, teacher.logits, batch.labels, low=c.low, high=c.high, below=c.below, above=c.above,
            temperature=c.temperature, smoothing=c.smoothing, reduction="none",
        )  # fmt: skip
        return {"ferkd": value}
