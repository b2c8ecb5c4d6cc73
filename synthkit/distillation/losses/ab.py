"""Activation boundaries: which neurons of the teacher are on, before the ReLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.distillation.losses.maps import pairs, pool_to_smaller, regressor
from synthkit.errors import ConfigError
from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SCALE = 3 / 1000  # of the released code


def boundary_loss(
    student: Tensor, teacher: Tensor, *, margin: float = 1.0, reduction: Literal["none", "mean"] = "mean"
) -> Tensor:
    """Squared hinge that pulls every neuron to the teacher's side of zero.

    `l_i = sum_cn (x + m)^2 [x > -m and t <= 0] + (x - m)^2 [x <= m and t > 0]`, x the connected student map before its
    ReLU, t the teacher's. `AB` adds the stages with the weights `2^(stage - last) * 3/1000`.

    Shapes: `student`, `teacher` (B, C, h, w); where the sizes differ the larger is average-pooled; returns (B,) for
    "none", a scalar for "mean".

    Source: Heo et al. 2019 (arXiv 1811.03233); HobbitLong/RepDistiller@b84f547 distiller_zoo/AB.py and models/util.py
    Connector, whose numbers the tests check.
    Differs from source: there it is used only in an initialisation of 30 epochs, with no other loss and the student's
    BatchNorm in eval mode, then never again; here it is a term, and the initialisation reads
    `--loss "ab@until30+ce@from30"`, with the student in train mode. Two stages of unlike size that RepDistiller
    refuses get SimKD's regressor. Where the numbers of stages differ they are paired from the start.
    Cost: a connector (convolution and BatchNorm; none where shapes agree) and O(B C h w) per stage.

    >>> import torch
    >>> float(boundary_loss(torch.tensor([[[[0.5]]], [[[-2.0]]]]), -torch.ones(2, 1, 1, 1)))
    1.125
    """
    s, t = pool_to_smaller(student, teacher)
    off = (s + margin).square() * ((s > -margin) & (t <= 0))
    on = (s - margin).square() * ((s <= margin) & (t > 0))
    return reduce((off + on).flatten(1).sum(dim=1), reduction)


class AB(Loss):
    """`boundary_loss` over the stages, with trained connectors (`--loss "ab@until30+ce@from30"`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of AB."""

        margin: float = 1.0
        """Distance from zero up to which a neuron is still pulled."""

        def __post_init__(self):
            if not self.margin > 0:
                raise ConfigError("loss.margin must be above 0", got=self.margin, hint="1 is usual")

    requires = LossNeeds(student=("preact",), teacher=("preact",))
    beta = 1.0

    def setup(self, setup: Setup) -> None:
        from synthkit.models.init import seeded

        stages = pairs(setup.student.preact, setup.teacher.preact)
        with seeded(setup.seed):
            self.aux = torch.nn.ModuleList(
                torch.nn.Identity() if tuple(s) == tuple(t) else regressor(s, t, relu=False) for s, t in stages
            )

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert self.aux is not None and student.preact and teacher.preact  # set up, and required above
        connectors = list(self.aux.children())
        last = len(connectors) - 1
        stages = []
        for stage, (s, t) in enumerate(pairs(student.preact, teacher.preact)):
            value = boundary_loss(connectors[stage](s), t, margin=self.config.margin, reduction="none")
            stages.append(SCALE * 2.0 ** (stage - last) * value)
        return {"ab": torch.stack(stages).sum(dim=0)}
