"""SRRL: the student's feature is judged by the teacher's classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.distillation.losses.maps import widen
from synthkit.errors import ConfigError, RequirementError
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


def srrl_loss(
    projected: Tensor,
    teacher: Tensor,
    predicted: Tensor,
    logits: Tensor,
    *,
    reduction: Literal["none", "mean"] = "mean",
):
    """Softmax regression representation learning: the projected feature and what the teacher's classifier makes of it.

    `l_i = (1/D) |g_i - f_i|^2 + (1/K) |(W_t g_i + b_t) - t_i|^2`, `g = relu(bn(W f_s))` the projected student feature,
    `f` the teacher's feature and `t` its logits. The gradient passes through the frozen classifier; no labels.

    Shapes: `projected`, `teacher` (B, D); `predicted`, `logits` (B, K); returns (B,) for "none", a scalar for "mean".

    Source: Yang et al. 2021, "Knowledge distillation via softmax regression representation learning" (ICLR);
    DefangChen/SimKD@2b389c3 models/util.py:SRRL and helper/loops.py, whose numbers the tests check.
    Differs from source: nothing; per-sample values on request.
    Cost: O(B (Ds D + D K)) time, O(B (D + K)) memory; Ds D + 2 D trained parameters.

    >>> import torch
    >>> float(srrl_loss(torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 4), torch.ones(2, 4)))
    1.0
    """
    features = (projected - teacher).square().mean(dim=1)
    return reduce(features + (predicted - logits).square().mean(dim=1), reduction)


class SRRL(Loss):
    """`srrl_loss` with a trained projection (`--loss ce+kd+srrl`)."""

    requires = LossNeeds(student=("pooled",), teacher=("pooled",), teacher_classifier=True)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """SRRL has no options."""

    def setup(self, setup: Setup) -> None:
        from synthkit.models.init import seeded

        classifier = setup.teacher_classifier
        if classifier is None:
            raise RequirementError("loss srrl needs the teacher's linear classifier", hint="use --loss kd")
        width = setup.teacher.pooled
        if classifier.in_features != width:
            raise ConfigError(
                "loss srrl: the teacher's pooled feature must be the input of its classifier",
                got=(width, classifier.in_features),
            )
        self._classifier = classifier  # the teacher's own, frozen: no part of what is trained and stored
        with seeded(setup.seed):
            self.aux = torch.nn.Sequential(
                torch.nn.Conv2d(setup.student.pooled, width, 1, bias=False),
                torch.nn.BatchNorm2d(width),
                torch.nn.ReLU(),
            )

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert self.aux is not None and student.pooled is not None and teacher.pooled is not None
        projected = self.aux(student.pooled[:, :, None, None]).flatten(1)
        weight, bias = self._classifier.weight.detach(), self._classifier.bias
        predicted = F.linear(projected, weight, None if bias is None else bias.detach())
        parts = (projected, teacher.pooled, predicted, teacher.logits)
        return {"srrl": srrl_loss(*map(widen, parts), reduction="none")}
