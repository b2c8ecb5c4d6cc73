"""Relational knowledge distillation: distances and angles between the samples of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Taps
from synthkit.distillation.losses.maps import full_precision, widen
from synthkit.errors import ConfigError
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 2**24  # numbers in the largest temporary of a chunk of anchors (64 MiB in float32)


def relative_distances(features: Tensor) -> Tensor:
    """(B, B) Euclidean distances divided by their mean over all pairs; the diagonal is 0."""
    count = len(features)
    # distances do not see a shift, but without it the Gram form loses digits where features lie far from the origin
    features = features - features.detach().mean(dim=0)
    squares = features.square().sum(dim=1)
    distances = (squares[:, None] + squares[None] - 2 * features @ features.T).clamp_min(1e-12).sqrt()
    distances = distances * (1 - torch.eye(count, dtype=features.dtype, device=features.device))
    return distances / (distances.sum() / max(count * (count - 1), 1))  # the clamp leaves no other pair at 0


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the relative distances: `(1/B^2) sum_ij h(D_s_ij - D_t_ij)`, features (B, D) to a scalar."""
    return F.smooth_l1_loss(relative_distances(student), relative_distances(teacher))


def _cosines(features: Tensor, anchors: Tensor) -> Tensor:
    """(A, B, B) cosines of the angle at `anchors` between every two samples; features (B, D), anchors (A, D)."""
    directions = F.normalize(features[None] - anchors[:, None], dim=2)
    return directions @ directions.transpose(1, 2)


def _angle_sum(student: Tensor, teacher: Tensor, start: int, stop: int) -> Tensor:
    """Sum of the smooth L1 over the triples whose anchor is in [start, stop)."""
    found, wanted = _cosines(student, student[start:stop]), _cosines(teacher, teacher[start:stop])
    return F.smooth_l1_loss(found, wanted, reduction="sum")


def angle_loss(student: Tensor, teacher: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Smooth L1 between the cosines of all triples: `(1/B^3) sum_ijk h(cos_s_ijk - cos_t_ijk)`.

    Features (B, D) to a scalar. Anchors are taken in chunks whose largest temporary has at most `chunk` numbers;
    several chunks are computed again in the backward pass instead of being kept.
    """
    from torch.utils.checkpoint import checkpoint

    count = len(student)
    step = max(1, chunk // (count * max(count, student.shape[1], teacher.shape[1])))
    if step >= count:
        return _angle_sum(student, teacher, 0, count) / count**3
    total = student.new_zeros(())
    for start in range(0, count, step):
        part = checkpoint(
            _angle_sum, student, teacher, start, start + step, use_reentrant=False, preserve_rng_state=False
        )
        assert isinstance(part, torch.Tensor)
        total = total + part
    return total / count**3


def rkd_loss(student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Relational distillation: the geometry of the batch in the student's features is that in the teacher's.

    `l = w_d (1/B^2) sum_ij h(D_s_ij - D_t_ij) + w_a (1/B^3) sum_ijk h(c_s_ijk - c_t_ijk)` with `D` the Euclidean
    distances over their mean, `c_ijk = cos((f_j - f_i), (f_k - f_i))` and `h` the smooth L1 (Huber) function.

    Shapes: `student` (B, Ds), `teacher` (B, Dt) pooled features, any widths; returns a scalar.

    Source: Park et al. 2019, "Relational Knowledge Distillation" (arXiv 1904.05068);
    HobbitLong/RepDistiller@b84f547 distiller_zoo/RKD.py, whose numbers the tests check.
    Differs from source: features are centred before the Gram matrix, which changes no distance but spares digits in
    float32; angles in chunks of anchors, the same sum in memory that does not grow with B^3.
    Cost: O(B^3 + B^2 D) memory up to the size of a chunk (64 MiB), time O(B^3 D); twice the forward time in chunks.

    >>> import torch
    >>> float(rkd_loss(torch.eye(3), 2 * torch.eye(3)).abs() < 1e-6)
    1.0
    """
    return distance * distance_loss(student, teacher) + angle * angle_loss(student, teacher)


class RKD(Loss):
    """`rkd_loss` of the pooled features (`--loss ce+rkd`)."""

    requires = LossNeeds(student=("pooled",), teacher=("pooled",), relational=True, smallest_batch=16)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of RKD."""

        distance: float = 25.0
        """Weight of the distance term."""
        angle: float = 50.0
        """Weight of the angle term; 0 saves its B^3."""

        def __post_init__(self):
            if min(self.distance, self.angle) < 0 or self.distance + self.angle == 0:
                raise ConfigError(
                    "loss.distance and loss.angle must not be negative, nor both 0", got=(self.distance, self.angle)
                )

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert student.pooled is not None and teacher.pooled is not None
        with full_precision(student.pooled):  # differences of like numbers
            mine, theirs = widen(student.pooled), widen(teacher.pooled)
            found = {}
            if self.config.distance:
                found["rkd_distance"] = self.config.distance * distance_loss(mine, theirs)
            if self.config.angle:
                found["rkd_angle"] = self.config.angle * angle_loss(mine, theirs)
        return found
