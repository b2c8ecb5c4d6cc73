"""Correlation congruence in its released form: distances of consecutive samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.maps import widen
from synthkit.errors import ConfigError
from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Correlation congruence: samples that follow each other do not err in the same dimensions.

    `l = (1/(B-1)) sum_b sum_d delta_bd delta_(b+1)d`, `delta = |e_s - e_t|` with linear embeddings `e` of the pooled
    features.

    Shapes: `student`, `teacher` (B, D) embeddings of one width, B at least 2; returns a scalar.

    Source: Peng et al. 2019, "Correlation congruence for knowledge distillation" (arXiv 1904.01802);
    HobbitLong/RepDistiller@b84f547 distiller_zoo/CC.py, whose numbers the tests check.
    Differs from source: nothing of the released code, which is not the paper's loss (the squared difference of two
    kernel matrices). The order of the batch matters. Both embeddings are trained, the teacher's too, so the loss
    alone has a trivial minimum (both embeddings constant): use it beside a loss of the logits.
    Cost: O(B D) time and memory.

    >>> import torch
    >>> float(cc_loss(torch.ones(3, 2), torch.zeros(3, 2)))
    2.0
    """
    delta = (student - teacher).abs()
    return (delta[:-1] * delta[1:]).sum(dim=1).mean()


class CC(Loss):
    """`cc_loss` of trained embeddings of the pooled features (`--loss ce+0.02*cc`)."""

    requires = LossNeeds(student=("pooled",), teacher=("pooled",), relational=True)
    beta = 0.02

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of CC."""

        width: int = 128
        """Width of the embeddings."""

        def __post_init__(self):
            if self.width < 1:
                raise ConfigError("loss.width must be at least 1", got=self.width, hint="128 is usual")

    def setup(self, setup: Setup) -> None:
        from synthkit.models.init import seeded

        with seeded(setup.seed):
            self.aux = torch.nn.ModuleDict(
                {
                    "student": torch.nn.Linear(setup.student.pooled, self.config.width),
                    "teacher": torch.nn.Linear(setup.teacher.pooled, self.config.width),
                }
            )

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(self.aux, torch.nn.ModuleDict)
        mine, theirs = self.aux["student"](student.pooled), self.aux["teacher"](teacher.pooled)
        return {"cc": cc_loss(widen(mine), widen(theirs))}
