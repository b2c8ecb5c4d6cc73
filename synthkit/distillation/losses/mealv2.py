"""MEAL V2: soft labels of an ensemble and a discriminator on logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, Setup, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.errors import ConfigError
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def ensemble_ce(student: Tensor, teachers: Sequence[Tensor], *, reduction: Literal["none", "mean"] = "mean") -> Tensor:
    """Cross-entropy with the mean of the teachers' probabilities.

    `l_i = -sum_c q_ic log softmax(s_i)_c`, `q = mean_m softmax(t_m)`, no temperature.

    Shapes: `student` (B, K) logits, `teachers` (B, K) logits each; returns (B,) for "none", a scalar for "mean".

    Source: szq0214/MEAL-V2@59e6bca extensions/teacher_wrapper.py, extensions/kd_loss.py:KLLoss.
    Differs from source: per-sample values.
    Cost: O(M B K) for M teachers.

    >>> import torch
    >>> round(float(ensemble_ce(torch.zeros(1, 2), [torch.zeros(1, 2), torch.ones(1, 2)])), 4)
    0.6931
    """
    target = torch.stack([t.softmax(dim=1) for t in teachers]).mean(dim=0)
    return reduce(-(target * F.log_softmax(student, dim=1)).sum(dim=1), reduction)


def discriminator_loss(
    discriminator: nn.Module,
    student: Tensor,
    teacher: Tensor,
    *,
    reverse: bool = False,
    reduction: Literal["none", "mean"] = "mean",
) -> Tensor:
    """How well a two-output network tells the student's logits ([1, 0]) from the teacher's ([0, 1]).

    `l_i = (b(D(s_i), [1, 0]) + b(D(t_i), [0, 1])) / 2`, `b` the mean binary cross-entropy of both outputs. With
    `reverse` the student receives the negated gradient: it then works against the discriminator.

    Shapes: `student`, `teacher` (B, K) logits; returns (B,) for "none", a scalar for "mean".
    """
    if reverse:
        student = 2 * student.detach() - student  # the same value, the opposite gradient
    outputs = discriminator(torch.cat([student, teacher]))
    targets = torch.eye(2, dtype=outputs.dtype, device=outputs.device).repeat_interleave(len(student), dim=0)
    values = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=1)
    return reduce(values.view(2, -1).mean(dim=0), reduction)


def build_discriminator(num_classes: int, divisor: int) -> nn.Sequential:
    """K -> K // divisor -> K // divisor^2 -> 2, a ReLU after each layer, the last included (as released)."""
    nn = torch.nn
    first = max(num_classes // divisor, 1)
    widths = [num_classes, first, max(first // divisor, 1), 2]
    layers: list[nn.Module] = []
    for i in range(3):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers)


class MEALV2(Loss):
    """Soft cross-entropy to an ensemble plus a discriminator between the student's and the mean teacher's logits.

    `L_i = ensemble_ce_i + w * discriminator_loss_i`, the discriminator looking at `mean_m t_m`; no labels.

    Shapes: student logits (B, K), teacher members (B, K) each (with a single teacher its logits); both values (B,).

    Source: Shen, Savvides 2020, "MEAL V2" (arXiv 2009.08453); szq0214/MEAL-V2@59e6bca loss.py:discriminatorLoss,
    models/discriminator.py, train.py.
    Differs from source: linear layers instead of 1x1 convolutions on one pixel (the same maths); hidden widths are at
    least 1, which the source's division does not see to below 64 classes. The paper calls it adversarial, the released
    code adds both losses without a reversal, so student and discriminator cooperate: that is the default, `reverse`
    is the adversarial reading. The source's own learning rate for the discriminator is overwritten by its schedule, so
    there is none here. Published with weight decay 0 and a pretrained student.
    Cost: O(B K^2 / divisor) beside the teachers.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of MEAL V2."""

        discriminator: float = 1.0
        """Weight of the discriminator's loss; 0 leaves it out."""
        divisor: int = 8
        """By what the discriminator's width shrinks from layer to layer."""
        reverse: bool = False
        """Reverse the discriminator's gradient in the student."""

        def __post_init__(self):
            if not self.discriminator >= 0:
                raise ConfigError("loss.discriminator must not be negative", got=self.discriminator)
            if self.divisor < 1:
                raise ConfigError("loss.divisor must be at least 1", got=self.divisor)

    def setup(self, setup: Setup) -> None:
        """Build the discriminator."""
        from synthkit.models.init import seeded

        if self.config.discriminator > 0:
            with seeded(setup.seed):
                self.aux = build_discriminator(setup.num_classes, self.config.divisor)

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        members = teacher.members or [teacher.logits]
        parts = {"mealv2": ensemble_ce(student.logits, members, reduction="none")}
        if self.aux is not None:
            mean = torch.stack(members).mean(dim=0)
            found = discriminator_loss(
                self.aux, student.logits, mean, reverse=self.config.reverse, reduction="none"
            ).float()
            parts["discriminator"] = self.config.discriminator * found
        return parts
