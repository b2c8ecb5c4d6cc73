"""What flows between the trainer, the sources and the losses. No torch at import.

A loss is a class with a nested frozen `Config`, a class attribute `requires` (`LossNeeds`) and
`__call__(student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]`, each value one number per sample (B,),
so that a curriculum can weigh samples; the trainer adds the entries and takes the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossNeeds:
    """What a distillation loss must be given; checked before any work."""

    labels: bool = False
    """Hard labels of every image."""
    live_teacher: bool = False
    """The teacher itself, not only its stored logits."""


@dataclass(kw_only=True)
class Taps:
    """What a network gave for a batch."""

    logits: Tensor
    """(B, K) float32."""


@dataclass(kw_only=True)
class Batch:
    """One rank's slice of a global batch, on the device."""

    images: Tensor
    """(B, C, H, W) float32 in [0, 1], augmented, never normalised."""
    labels: Tensor | None = None
    """(B,) int64: the labels of the bank or of the data."""
    logits: Tensor | None = None
    """(B, K) float32: the teacher logits that the bank stores."""


class DistillationLoss(Protocol):
    """See the module's docstring."""

    Config: ClassVar[Any]
    requires: ClassVar[LossNeeds]

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]: ...
