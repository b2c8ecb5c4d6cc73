"""Attention transfer: where the student looks, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.distillation.losses.maps import attention, pairs, pool_to_smaller, require_space
from synthkit.errors import ConfigError
from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def at_loss(
    student: Tensor, teacher: Tensor, *, power: float = 2.0, reduction: Literal["none", "mean"] = "mean"
) -> Tensor:
    """Mean squared difference of the spatial attention of two maps.

    `l_i = (1/N) sum_n (a_n(s_i) - a_n(t_i))^2`, `a(f) = q / |q|`, `q_n = (1/C) sum_c |f_cn|^power`, over the N
    positions of the smaller map, to which the larger is average-pooled first; `AT` adds the stages.

    Shapes: `student` (B, C, h, w), `teacher` (B, C', h', w'), any sizes; returns (B,) for "none", a scalar for "mean".

    Source: Zagoruyko, Komodakis 2017 (arXiv 1612.03928); HobbitLong/RepDistiller@b84f547 distiller_zoo/AT.py, whose
    numbers the tests check (power 2).
    Differs from source: the absolute value is taken, as in the paper, so that odd powers mean the same (the code takes
    none; no difference at 2); the paper takes the norm of the difference, the code (and this) the mean square; where
    the numbers of stages differ they are paired from the start and the rest is left out, as in the code.
    Cost: O(B C h w) time, O(B h w) memory beside the maps.

    >>> import torch
    >>> float(at_loss(torch.ones(1, 2, 2, 2), 3 * torch.ones(1, 5, 4, 4)))
    0.0
    """
    s, t = pool_to_smaller(student, teacher, wide=False)
    return reduce((attention(s, power) - attention(t, power)).square().mean(dim=1), reduction)


class AT(Loss):
    """`at_loss` over the stages (`--loss ce+1000*at`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of AT."""

        power: float = 2.0
        """Exponent of the activations: higher looks more at the strongest positions."""

        def __post_init__(self):
            if not self.power >= 1:  # below it the gradient at 0 is infinite, and ReLU gives many zeros
                raise ConfigError("loss.power must be at least 1", got=self.power, hint="2 is usual")

    requires = LossNeeds(student=("maps",), teacher=("maps",))
    beta = 1000.0

    def setup(self, setup: Setup) -> None:
        require_space("at", pairs(setup.student.maps, setup.teacher.maps))

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert student.maps and teacher.maps  # required above
        stages = [
            at_loss(s, t, power=self.config.power, reduction="none") for s, t in pairs(student.maps, teacher.maps)
        ]
        return {"at": torch.stack(stages).sum(dim=0)}
