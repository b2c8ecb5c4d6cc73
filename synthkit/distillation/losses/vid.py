"""Variational information distillation: the student's maps should tell the teacher's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.distillation.losses.maps import mean_per_sample, pairs, pool_to_smaller, widen
from synthkit.errors import ConfigError
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor, nn

EPSILON = 1e-5  # keeps the variance off zero


def vid_loss(mean: Tensor, teacher: Tensor, scale: Tensor, *, reduction: Literal["none", "mean"] = "mean") -> Tensor:
    """Gaussian negative log-likelihood of the teacher's map, with one learnt variance per channel.

    `l_i = mean_cn ((m_icn - t_icn)^2 / v_c + log v_c) / 2`, `v = softplus(scale) + 1e-5`; the constant `log(2 pi) / 2`
    is left out, so the value may be negative. `VID` adds the stages.

    Shapes: `mean`, `teacher` (B, C, h, w), `scale` (C,); returns (B,) for "none", a scalar for "mean".

    Source: Ahn et al. 2019 (arXiv 1904.05835); HobbitLong/RepDistiller@b84f547 distiller_zoo/VID.py, whose numbers the
    tests check.
    Differs from source: softplus instead of `log(1 + exp)`, which overflows. mdistiller keeps the scales out of its
    optimiser, so its variance stays at 5: `train_scale` False. Where the numbers of stages differ they are paired from
    the start, as in the code.
    Cost: per stage three 1x1 convolutions, `C_s C_t + 2 C_t^2 + C_t` parameters, at the smaller map's size.

    >>> import torch
    >>> v1 = torch.full((2,), math.log(math.expm1(1 - EPSILON)))
    >>> round(float(vid_loss(torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), v1)), 4)
    0.5
    """
    variance = (F.softplus(scale) + EPSILON).view(1, -1, 1, 1)
    error = widen(mean) - widen(teacher)
    return reduce(mean_per_sample(0.5 * (error.square() / variance + variance.log())), reduction)


def mean_network(student: int, teacher: int) -> nn.Sequential:
    """Three 1x1 convolutions without bias from `student` to `teacher` channels, ReLU between."""
    layers: list[nn.Module] = [torch.nn.Conv2d(student, teacher, 1, bias=False)]
    for _ in range(2):
        layers += [torch.nn.ReLU(), torch.nn.Conv2d(teacher, teacher, 1, bias=False)]
    return torch.nn.Sequential(*layers)


class VID(Loss):
    """`vid_loss` over the stages, with a trained mean and variance each (`--loss ce+vid`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of VID."""

        variance: float = 5.0
        """The variance of every channel before training."""
        train_scale: bool = True
        """Whether the variances are learnt (mdistiller's are not)."""

        def __post_init__(self):
            if not self.variance > EPSILON:
                raise ConfigError(f"loss.variance must be above {EPSILON}", got=self.variance, hint="5 is usual")

    requires = LossNeeds(student=("maps",), teacher=("maps",))
    beta = 1.0
    aux: nn.ModuleDict | None = None

    def setup(self, setup: Setup) -> None:
        from synthkit.models.init import seeded

        channels = [(s[0], t[0]) for s, t in pairs(setup.student.maps, setup.teacher.maps)]
        start = math.log(math.expm1(self.config.variance - EPSILON))
        with seeded(setup.seed):
            means = torch.nn.ModuleList(mean_network(s, t) for s, t in channels)
        scales = torch.nn.ParameterList(
            torch.nn.Parameter(torch.full((t,), start), requires_grad=self.config.train_scale) for _, t in channels
        )
        self.aux = torch.nn.ModuleDict({"means": means, "scales": scales})

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert self.aux is not None and student.maps and teacher.maps  # set up, and required above
        means, scales = self.aux["means"].children(), self.aux["scales"].parameters()
        stages = []
        for (s, t), mean, scale in zip(pairs(student.maps, teacher.maps), means, scales, strict=True):
            s, t = pool_to_smaller(s, t)
            stages.append(vid_loss(mean(s), t, scale, reduction="none"))
        return {"vid": torch.stack(stages).sum(dim=0)}
