"""Several teachers as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn

from synthkit.errors import ConfigError, ModelError
from synthkit.models.view import TeacherView

Combine = Literal["probs", "logits"]


def combine_logits(members: Sequence[Tensor], combine: Combine = "probs", weights: Sequence[float] | None = None):
    """Logits of an ensemble from those of its members.

    "probs": `log sum_m w_m softmax(z_m)`, so that their softmax is the weighted mean of the members' softmaxes;
    "logits": `sum_m w_m z_m`. Weights sum to 1; none given: equal ones.

    Shapes: `members` (B, K) each; returns (B, K) in their dtype.
    """
    weights = weights or [1 / len(members)] * len(members)
    stacked = torch.stack(list(members))
    if combine == "logits":
        return (stacked * stacked.new_tensor(weights).view(-1, 1, 1)).sum(dim=0)
    offsets = stacked.new_tensor([math.log(w) for w in weights]).view(-1, 1, 1)
    return torch.logsumexp(torch.log_softmax(stacked, dim=2) + offsets, dim=0)


class TeacherEnsemble(TeacherView):
    """Teachers of the same classes and input size behind the call of one `TeacherView`.

    Every member normalises the images for itself; `module` holds the members' networks (it cannot be called), `mean`
    and `std` are the first member's.

    Args:
        members: the teachers, at least one.
        combine: mean of the members' probabilities ("probs") or of their logits ("logits").
        weights: one positive number per member, scaled to sum to 1; none: equal.

    Raises:
        ConfigError: unknown `combine`, or weights that do not fit.
        ModelError: the members differ in classes or input size.
    """

    def __init__(
        self,
        members: Sequence[TeacherView],
        combine: Combine = "probs",
        weights: Sequence[float] | None = None,
    ):
        if not members:
            raise ConfigError("an ensemble needs at least one teacher")
        if combine not in ("probs", "logits"):
            raise ConfigError("combine: not known", got=combine, allowed=["probs", "logits"])
        if weights is not None and (len(weights) != len(members) or not all(0 < w < math.inf for w in weights)):
            raise ConfigError(f"weights: one positive number per teacher ({len(members)})", got=list(weights))
        first = members[0]
        for other in members[1:]:
            _require_same(first, other)
        names = next((m.class_names for m in members if m.class_names), None)
        super().__init__(
            nn.ModuleList(m.module for m in members),
            first.mean,
            first.std,
            input_size=first.input_size,
            num_classes=first.num_classes,
            class_names=names,
            name="+".join(m.name for m in members),
        )
        self.teachers = list(members)
        self.combine_by: Combine = combine
        self.weights = [w / sum(weights) for w in weights] if weights else [1 / len(members)] * len(members)

    def to(self, device: torch.device | str, *, channels_last: bool = False):
        """Move every member."""
        super().to(device)
        for member in self.teachers:
            member.to(device, channels_last=channels_last)
        return self

    def all_logits(self, images: Tensor) -> list[Tensor]:
        """Logits (B, K) float32 of every member for [0, 1] images (B, C, H, W)."""
        return [member(images).float() for member in self.teachers]

    def combined(self, members: Sequence[Tensor]) -> Tensor:
        """The ensemble's logits (B, K) from the members' (`all_logits`)."""
        return combine_logits(members, self.combine_by, self.weights)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) float32 of [0, 1] images (B, C, H, W)."""
        return self.combined(self.all_logits(images))

    def _refuse(self, what: str) -> NoReturn:
        raise ModelError(
            f"{self.name}: an ensemble of {len(self.teachers)} teachers has no {what}",
            hint="name one teacher, or use a loss of logits",
        )

    def normalize(self, images: Tensor) -> Tensor:
        """Refused: every member has its own constants."""
        self._refuse("common normalisation")

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Refused: the members' features have nothing in common."""
        self._refuse("common features")

    @property
    def last_linear(self) -> None:
        """None: every member has its own."""

    @property
    def classifier(self) -> nn.Linear:
        """Refused: every member has its own."""
        self._refuse("common classifier")

    def batchnorms(self) -> list[nn.BatchNorm2d]:
        """None: statistics of several networks are no statistics of one."""
        return []


def _require_same(first: TeacherView, other: TeacherView) -> None:
    if other.input_size != first.input_size:
        raise ModelError(
            f"teachers {first.name} and {other.name} take images of different size: {first.input_size}",
            got=other.input_size,
            hint="ensemble only teachers of one input size, that of the bank",
        )
    if other.num_classes != first.num_classes:
        raise ModelError(
            f"teachers {first.name} and {other.name} know different numbers of classes: {first.num_classes}",
            got=other.num_classes,
        )
    if first.class_names and other.class_names and first.class_names != other.class_names:
        raise ModelError(
            f"teachers {first.name} and {other.name} order or name their classes differently",
            hint="correct class_names in the card of one, if they mean the same",
        )
