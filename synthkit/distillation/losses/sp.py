"""Similarity-preserving distillation: which samples of a batch resemble each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Taps
from synthkit.distillation.losses.maps import full_precision, widen
from synthkit.lazy import F

if TYPE_CHECKING:
    from torch import Tensor


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the row-normalised similarities within a batch.

    `l = (1/B^2) |G(t) - G(s)|_F^2`, `G(f)` the products `<f_i, f_j>` of the flattened features with every row divided
    by its Euclidean norm. Sizes and channels of the two networks need not agree.

    Shapes: `student` (B, ...), `teacher` (B, ...), at least two dimensions; returns a scalar.

    Source: Tung, Mori 2019 (arXiv 1907.09682); HobbitLong/RepDistiller@b84f547 distiller_zoo/SP.py, whose numbers the
    tests check.
    Differs from source: never in half precision; several processes compare the whole global batch, where the code
    under DataParallel compares what its one loss sees.
    Cost: O(B^2 C h w) time, O(B^2) memory beside the maps.

    >>> import torch
    >>> x = torch.arange(12.0).reshape(3, 4)
    >>> float(sp_loss(x, 2 * x))
    0.0
    """
    with full_precision(student):
        similar = [F.normalize(f @ f.t(), dim=1) for f in (widen(student).flatten(1), widen(teacher).flatten(1))]
        return (similar[1] - similar[0]).square().mean()


class SP(Loss):
    """`sp_loss` on the last maps (`--loss ce+3000*sp`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """SP has no options."""

    requires = LossNeeds(student=("maps",), teacher=("maps",), relational=True)
    beta = 3000.0

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert student.maps and teacher.maps  # required above
        return {"sp": sp_loss(student.maps[-1], teacher.maps[-1])}
