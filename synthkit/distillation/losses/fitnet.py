"""FitNet: one hidden map of the student, regressed onto the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.distillation.losses.maps import mean_per_sample, pool_to_smaller, regressor
from synthkit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def hint_loss(regressed: Tensor, teacher: Tensor, *, reduction: Literal["none", "mean"] = "mean") -> Tensor:
    """Mean squared error between a regressed map and the teacher's.

    `l_i = (1/(C h w)) |r(s_i) - t_i|^2`; where the sizes differ the larger map is average-pooled first.

    Shapes: `regressed` (B, C, h, w), `teacher` (B, C, h', w'); returns (B,) for "none", a scalar for "mean".

    Source: Romero et al. 2015 (arXiv 1412.6550); HobbitLong/RepDistiller@b84f547 and DefangChen/SimKD@2b389c3
    (models/util.py ConvReg, distiller_zoo/FitNet.py), whose numbers the tests check.
    Differs from source: the paper trains the lower half first and distils afterwards; both repositories, and this,
    train the hint together with the other losses. RepDistiller has no regressor for a student map below half or
    between half and the whole of the teacher's size, SimKD has one (`maps.regressor`), which is used here. Maps of
    unequal sides follow the same rules per side.
    Cost: one convolution, BatchNorm and O(B C h w); the unpadded kernel grows with the difference of the sizes (25 x
    25 for 32 to 8), as in the code.

    >>> import torch
    >>> float(hint_loss(torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)))
    1.0
    """
    s, t = pool_to_smaller(regressed, teacher)
    return reduce(mean_per_sample((s - t).square()), reduction)


class FitNet(Loss):
    """`hint_loss` on one stage, with a trained regressor (`--loss ce+100*fitnet --loss.fitnet.layer 1`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of FitNet."""

        layer: int = 1
        """Which of the tapped maps, from 0 and without the stem; negative counts from the end. 1 is hint layer 2 of
        RepDistiller and mdistiller, 0 is hint layer 1 of the SimKD repository (they count the stem)."""

    requires = LossNeeds(student=("maps",), teacher=("maps",))
    beta = 100.0

    def setup(self, setup: Setup) -> None:
        from synthkit.models.init import seeded

        layer = self.config.layer
        for name, shapes in (("student", setup.student.maps), ("teacher", setup.teacher.maps)):
            if not -len(shapes) <= layer < len(shapes):
                raise ConfigError(
                    f"fitnet, option layer: the {name} has {len(shapes)} tapped map{'s' * (len(shapes) != 1)}",
                    got=layer,
                    hint="give 0" if len(shapes) == 1 else f"give one of 0 to {len(shapes) - 1}, or -1 for the last",
                )
        with seeded(setup.seed):
            self.aux = regressor(setup.student.maps[layer], setup.teacher.maps[layer])

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert self.aux is not None and student.maps and teacher.maps  # set up, and required above
        layer = self.config.layer
        return {"fitnet": hint_loss(self.aux(student.maps[layer]), teacher.maps[layer], reduction="none")}
