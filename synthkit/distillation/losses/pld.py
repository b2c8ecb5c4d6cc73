"""Plackett-Luce distillation: the teacher's ranking of the classes, weighed by its confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Taps
from synthkit.distillation.losses.common import check_temperature, reduce
from synthkit.errors import ConfigError
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

FIRST = ("label", "teacher")


def plackett_luce(student: Tensor, ranking: Tensor, weights: Tensor) -> Tensor:
    """(B,): `sum_k w_k (logsumexp_{l >= k} s_pi(l) - s_pi(k))` for rankings pi (B, K) and weights w (B, K) by rank."""
    ranked = student.gather(1, ranking)
    # the classes from rank k on are what a choice at rank k is made from: a cumulative logsumexp from the end
    left = ranked.flip(1).logcumsumexp(dim=1).flip(1)
    return (weights * (left - ranked)).sum(dim=1)


def teacher_ranking(teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    """(B, K): the classes by falling teacher logit (ties in class order), the label before all others if given."""
    if labels is not None:
        teacher = teacher.scatter(1, labels[:, None], torch.inf)
    return teacher.argsort(dim=1, descending=True, stable=True)


def pld_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reduction: Literal["none", "mean"] = "mean",
):
    """Plackett-Luce likelihood of the teacher's ranking under the student, each choice weighed by its probability.

    `l_i = sum_k a_k (logsumexp_{l >= k} s_pi(l) - s_pi(k))`; pi ranks the label first and the other classes by falling
    teacher logit, `a_k = softmax(t / T)_pi(k)`. With a = (1, 0, ...) it is the cross-entropy, so none is added.

    Shapes: `student`, `teacher` (B, K) logits, any range; `labels` (B,) int64, None ranks by the teacher alone;
    returns (B,) for "none", a scalar for "mean". Convex in the student, blind to a shift of its rows.

    Source: Bassam, Zhu, Bian 2025 (arXiv 2506.12542); written from the abstract and the definition of the loss.
    Differs from source: no code was at hand, so there are no released numbers to check; whether the paper softens the
    weights was not readable, hence T = 1. With the teacher's argmax as label it is the same as without labels.
    Cost: O(B K log K) time, O(B K) memory.

    >>> import torch
    >>> round(float(pld_loss(torch.zeros(1, 2), torch.tensor([[50.0, 0.0]]))), 4)
    0.6931
    """
    ranking = teacher_ranking(teacher, labels)
    weights = F.softmax(teacher / temperature, dim=1).gather(1, ranking)
    return reduce(plackett_luce(student, ranking, weights), reduction)


class PLD(Loss):
    """`pld_loss` as a loss of the table (`--loss pld`); it stands alone, without a cross-entropy."""

    requires = LossNeeds(labels=True)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of PLD."""

        first: Literal["label", "teacher"] = "label"
        """What is ranked first: label (needs labels, as published) or teacher (its own favourite)."""
        temperature: float = 1.0
        """Softening temperature T of the weights; the order does not depend on it."""

        def __post_init__(self):
            check_temperature(self.temperature)
            if self.first not in FIRST:
                raise ConfigError("loss.first: not known", got=self.first, allowed=FIRST)

    def __init__(self, config: Any = None):
        super().__init__(config)
        self.requires = LossNeeds(labels=self.config.first == "label")

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        labels = batch.labels if self.config.first == "label" else None
        value = pld_loss(student.logits, teacher.logits, labels, temperature=self.config.temperature, reduction="none")
        return {"pld": value}
