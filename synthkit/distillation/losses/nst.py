"""Neuron selectivity transfer: the distribution of the channels' activation patterns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.distillation.losses.maps import full_precision, mean_per_sample, pairs, pool_to_smaller, require_space
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


def nst_loss(student: Tensor, teacher: Tensor, *, reduction: Literal["none", "mean"] = "mean") -> Tensor:
    """Squared maximum mean discrepancy between the channels of two maps, with the kernel `(x . y)^2`.

    `l_i = mean_cc' (t_c . t_c')^2 + mean_cc' (s_c . s_c')^2 - 2 mean_cc' (s_c . t_c')^2`, where `s_c` is channel c of
    sample i, flattened over space and of unit norm; the larger map is average-pooled to the smaller first. `NST` adds
    the stages.

    Shapes: `student` (B, C, h, w), `teacher` (B, C', h', w'), any sizes; returns (B,) for "none", a scalar for "mean".

    Source: Huang, Wang 2017 (arXiv 1707.01219); HobbitLong/RepDistiller@b84f547 distiller_zoo/NST.py, whose numbers
    the tests check.
    Differs from source: Gram matrices instead of all channel products at once, which need C h w times the memory; the
    teacher's own term has no gradient in both, and it stays in the value. Where the numbers of stages differ they are
    paired from the start, as in the code.
    Cost: O(B (C + C')^2 h w) time, O(B (C + C')^2) memory per stage.

    >>> import torch
    >>> x = torch.arange(16.0).reshape(1, 4, 2, 2)
    >>> bool(nst_loss(x, 2 * x).abs() < 1e-6)
    True
    """
    s, t = pool_to_smaller(student, teacher)
    with full_precision(s):
        s, t = F.normalize(s.flatten(2), dim=2), F.normalize(t.flatten(2), dim=2)

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return mean_per_sample(torch.bmm(a, b.transpose(1, 2)).square())

        return reduce(kernel(t, t).detach() + kernel(s, s) - 2 * kernel(s, t), reduction)


class NST(Loss):
    """`nst_loss` over the stages (`--loss ce+50*nst`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """NST has no options."""

    requires = LossNeeds(student=("maps",), teacher=("maps",))
    beta = 50.0

    def setup(self, setup: Setup) -> None:
        require_space("nst", pairs(setup.student.maps, setup.teacher.maps))

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert student.maps and teacher.maps  # required above
        stages = [nst_loss(s, t, reduction="none") for s, t in pairs(student.maps, teacher.maps)]
        return {"nst": torch.stack(stages).sum(dim=0)}
