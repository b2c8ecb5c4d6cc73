"""Probabilistic knowledge transfer: the conditional similarities of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Taps
from synthkit.distillation.losses.maps import full_precision, widen
from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-7


def conditional_similarities(features: Tensor) -> Tensor:
    """(B, B) rows that sum to 1: cosine similarities moved to [0, 1] and divided by their sum; features (B, D)."""
    unit = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPS)
    similarity = (unit @ unit.T + 1) / 2
    return similarity / similarity.sum(dim=1, keepdim=True)


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Probabilistic transfer: every sample has the same neighbours in the student as in the teacher.

    `l = (1/B^2) sum_ij P_t_ij log((P_t_ij + eps) / (P_s_ij + eps))`, `P_ij` proportional to
    `(cos(f_i, f_j) + 1) / 2` in each row, eps = 1e-7.

    Shapes: `student` (B, Ds), `teacher` (B, Dt) pooled features, any widths; returns a scalar.

    Source: Passalis, Tefas 2018, "Learning deep representations with probabilistic knowledge transfer" (arXiv
    1803.10837); HobbitLong/RepDistiller@b84f547 distiller_zoo/PKT.py, whose numbers the tests check.
    Differs from source: the paper sums the divergence, the released code (and this) takes the mean over the B^2
    entries, hence beta = 30000. A feature row of zeros has a finite gradient (the source's square root gives NaN);
    features that are NaN stay so and stop the run, the source sets them to 0.
    Cost: O(B^2 D) time, O(B^2) memory.

    >>> import torch
    >>> float(pkt_loss(torch.eye(3), 2 * torch.eye(3)).abs() < 1e-6)
    1.0
    """
    p, q = conditional_similarities(teacher), conditional_similarities(student)
    return (p * ((p + EPS).log() - (q + EPS).log())).mean()


class PKT(Loss):
    """`pkt_loss` of the pooled features (`--loss ce+30000*pkt`)."""

    requires = LossNeeds(student=("pooled",), teacher=("pooled",), relational=True, smallest_batch=16)
    beta = 30000.0

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """PKT has no options."""

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert student.pooled is not None and teacher.pooled is not None
        with full_precision(student.pooled):  # a mean of tiny differences
            return {"pkt": pkt_loss(widen(student.pooled), widen(teacher.pooled))}
