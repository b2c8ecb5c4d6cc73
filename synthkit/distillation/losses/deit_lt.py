"""DeiT-LT: hard distillation with class weights, for banks whose classes are of unequal size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Look, Loss, Setup, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.errors import ConfigError
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


def weighted_hard_loss(
    student: Tensor, teacher: Tensor, weights: Tensor, *, reduction: Literal["none", "mean"] = "mean"
) -> Tensor:
    """Cross-entropy with the teacher's decision, weighted by its class.

    `l_i = -w_{y_i} log softmax(s_i)_{y_i}`, `y_i = argmax t_i`; the mean is over samples.

    Shapes: `student`, `teacher` (B, K) logits, `weights` (K,); returns (B,) for "none", a scalar for "mean".

    Source: Rangwani et al. 2024, "DeiT-LT" (arXiv 2404.02900); val-iisc/DeiT-LT@dcd907e losses.py:DistillationLoss.
    Differs from source: torch's weighted cross-entropy, which the source uses, divides by the batch's sum of weights
    instead of by B, so that a sample's value hangs on its neighbours.
    Cost: O(B K) time and memory.

    >>> import torch
    >>> round(float(weighted_hard_loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), torch.tensor([1.0, 2.0]))), 4)
    1.3863
    """
    decision = teacher.argmax(dim=1)
    return reduce(weights[decision] * F.cross_entropy(student, decision, reduction="none"), reduction)


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """(K,) class weights `w_c ~ (1 - beta) / (1 - beta^n_c)`, mean 1 over the classes that occur.

    `beta = 0` weighs all alike, `beta -> 1` by the inverse count. Classes without a sample get the largest weight.
    """
    raw = (1 - beta) / (1 - torch.pow(torch.as_tensor(beta, dtype=torch.float64), counts.double().clamp_min(1)))
    return raw / raw[counts > 0].mean()


class DeiTLT(Loss):
    """`weighted_hard_loss` whose class weights set in late (deferred re-weighting).

    `w_c = 1` in the first part of the run, then `effective_number_weights` of the teacher's decisions on the bank.

    Shapes: student and teacher logits (B, K); the value is (B,).

    Source: as `weighted_hard_loss`; the released command defers to epoch 1100 of 1200.
    Differs from source: one head instead of a class and a distillation token; counts are of the teacher's decisions on
    the bank, not of the labels of training images; the weights' formula and 0.9999 are those of LDAM-DRW (Cao et al.
    2019), the release's own lines were not read. The cross-entropy beside it is a term of its own.
    Cost: one pass of the teacher over the bank before training.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of DeiT-LT."""

        effective: float = 0.9999
        """beta of the effective number of samples, in [0, 1)."""
        defer: float = 11 / 12
        """Share of the run before the weights set in; 0: from the start."""

        def __post_init__(self):
            if not 0 <= self.effective < 1:
                raise ConfigError("loss.effective must lie in [0, 1)", got=self.effective)
            if not 0 <= self.defer <= 1:
                raise ConfigError("loss.defer must lie in [0, 1]", got=self.defer)

    def setup(self, setup: Setup) -> None:
        """Equal weights, until `prepare` has counted."""
        self.aux = torch.nn.Module()
        self.aux.register_buffer("weights", torch.ones(setup.num_classes))

    def prepare(self, looks: Callable[[], Iterator[Look]]) -> None:
        """Count the teacher's decisions over the bank."""
        assert self.aux is not None
        weights = self.aux.get_buffer("weights")
        counts = torch.zeros(len(weights), dtype=torch.int64, device=weights.device)
        for look in looks():
            counts += torch.bincount(look.teacher.logits.argmax(dim=1), minlength=len(weights))
        weights.copy_(effective_number_weights(counts.cpu(), self.config.effective))

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert self.aux is not None
        weights = self.aux.get_buffer("weights")
        if batch.progress < self.config.defer:
            weights = torch.ones_like(weights)
        return {"deit_lt": weighted_hard_loss(student.logits, teacher.logits, weights, reduction="none")}
