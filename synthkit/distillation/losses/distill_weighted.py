"""DistillWeighted: several teachers, each as heavy as its outputs tell the task's classes apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Look, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import check_temperature, reduce
from synthkit.errors import ConfigError, RequirementError
from synthkit.lazy import torch
from synthkit.logits import kl_per_sample

if TYPE_CHECKING:
    from torch import Tensor

MOST_TEACHERS = 16  # places of the stored weights: how many teachers there are is not known when they are made


def weighted_kd_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: Tensor,
    *,
    temperature: float = 1.0,
    reduction: Literal["none", "mean"] = "mean",
) -> Tensor:
    """Weighted sum of distillation losses, one per teacher.

    `l_i = sum_m w_m T^2 KL(softmax(t_m,i / T) || softmax(s_i / T))`.

    Shapes: `student`, each of `teachers` (B, K) logits, `weights` (M,); returns (B,) for "none", a scalar for "mean".

    >>> import torch
    >>> s = torch.zeros(1, 2)
    >>> float(weighted_kd_loss(s, [s, s + 1], torch.tensor([0.5, 0.5])))
    0.0
    """
    values = torch.stack([kl_per_sample(student, t, temperature) for t in teachers])
    return reduce((weights.unsqueeze(1) * values).sum(dim=0), reduction)


def task_similarity(features: Tensor, labels: Tensor) -> Tensor:
    """How well distances between features follow the classes: a rank correlation over all pairs of samples.

    Spearman's correlation of `1 - pearson(f_i, f_j)` with `[y_i != y_j]`, in [-1, 1]; 0 where either is constant.

    Shapes: `features` (N, D), `labels` (N,); returns a scalar, float64.

    Cost: O(N^2 (D + log N)) time, O(N^2) memory.
    """
    centred = features.double() - features.double().mean(dim=1, keepdim=True)
    unit = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
    rows, columns = torch.tril_indices(len(features), len(features), offset=-1, device=features.device)
    # rounded: equal pairs may differ in their last bit
    distances = (1 - unit @ unit.T)[rows, columns].round(decimals=9)
    _, place, counts = distances.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2.0).double()[place]  # equal distances share their mean rank
    ranks = ranks - ranks.mean()
    other = (labels[rows] != labels[columns]).double()
    other = other - other.mean()
    return (ranks * other).sum() / (ranks.norm() * other.norm()).clamp_min(1e-12)


def teacher_weights(scores: Tensor, power: float) -> Tensor:
    """(M,) weights `w_m ~ max(score_m, 0)^power`, sum 1; equal ones where no score is above 0."""
    raw = scores.clamp_min(0)
    if not bool((raw > 0).any()):
        return torch.full_like(scores, 1 / len(scores))
    raw = torch.where(raw > 0, raw**power, 0)  # 0^0 would revive a teacher
    return raw / raw.sum()


class DistillWeighted(Loss):
    """`weighted_kd_loss` with weights from a task similarity, measured once on the bank.

    `L_i = sum_m w_m KD(s_i, t_m,i; T)`, `w_m ~ max(rho_m, 0)^power`, `rho_m` the `task_similarity` of the teacher's
    logits on part of the bank with the labels.

    Shapes: student logits (B, K), teacher members (B, K) each; the value is (B,).

    Source: Borup, Phoo, Hariharan 2023, "Distilling from Similar Tasks for Transfer Learning on a Budget" (arXiv
    2304.12314). Only the abstract was read: several sources weighted by a task similarity between their features and
    the target labels, cross-entropy on the labelled images, distillation from every source's pseudo-labels.
    Differs from source: the paper's measure and its powers were not read; the measure is a rank correlation of pairwise
    distances (as in PARC, Bolya et al. 2021, from memory). All teachers share one label space, so the student has
    one head, not one per source. Logits serve as features. The cross-entropy is a term of its own.
    Cost: O(M B K) a step; before training a pass over the bank and O(images^2) memory for each teacher in turn.
    """

    requires = LossNeeds(labels=True, live_teacher=True, teachers=2)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of DistillWeighted."""

        temperature: float = 1.0
        """Softening temperature T of all networks."""
        power: float = 1.0
        """Exponent of the scores: 0 weighs all teachers above 0 alike, large ones leave the best."""
        images: int = 1024
        """Images of the bank, evenly spread, on which teachers are compared."""

        def __post_init__(self):
            check_temperature(self.temperature)
            if not self.power >= 0:
                raise ConfigError("loss.power must not be negative", got=self.power)
            if self.images < 2:
                raise ConfigError("loss.images must be at least 2", got=self.images)

    def setup(self, setup: Setup) -> None:
        """Room for the weights; without `prepare` they are 0."""
        self.aux = torch.nn.Module()
        self.aux.register_buffer("weights", torch.zeros(MOST_TEACHERS))
        self._stride = max(-(-setup.images // self.config.images), 1)

    def prepare(self, looks: Callable[[], Iterator[Look]]) -> None:
        """Score every teacher on every `stride`-th image of the bank."""
        assert self.aux is not None
        logits: list[list[Tensor]] = []
        labels: list[Tensor] = []
        passed = 0
        for look in looks():
            assert look.labels is not None
            chosen = torch.arange(passed, passed + len(look.labels)) % self._stride == 0
            passed += len(chosen)
            logits.append([member.cpu()[chosen] for member in members_of(look.teacher)])
            labels.append(look.labels.cpu()[chosen])
        truth = torch.cat(labels)
        scores = torch.stack([task_similarity(torch.cat(parts), truth) for parts in zip(*logits, strict=True)])
        weights = self.aux.get_buffer("weights")
        weights[: len(scores)] = teacher_weights(scores, self.config.power).to(weights)

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert self.aux is not None
        members = members_of(teacher)
        value = weighted_kd_loss(
            student.logits,
            members,
            self.aux.get_buffer("weights")[: len(members)],
            temperature=self.config.temperature,
            reduction="none",
        )
        return {"distill_weighted": value}


def members_of(teacher: Taps) -> list[Tensor]:
    """The logits of every teacher.

    Raises:
        RequirementError: there is one teacher, or there are too many.
    """
    members = teacher.members
    if members is None or not 2 <= len(members) <= MOST_TEACHERS:
        raise RequirementError(
            f"distill_weighted weighs 2 to {MOST_TEACHERS} teachers",
            got=1 if members is None else len(members),
            hint="--teacher A,B, or loss kd for one teacher",
        )
    return members
