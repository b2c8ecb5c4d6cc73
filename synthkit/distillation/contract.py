"""What flows between the trainer, the sources and the losses. No torch at import.

A loss derives from `Loss`, has a nested frozen `Config`, a class attribute `requires` (`LossNeeds`) and
`__call__(student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]`, each value one number per sample (B,), so
that a curriculum can weigh samples, or a scalar () where only the batch has a value; the trainer adds the means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Feature = Literal["pooled", "maps", "preact"]
FEATURES: tuple[Feature, ...] = ("pooled", "maps", "preact")


@dataclass(frozen=True, kw_only=True)
class LossNeeds:
    """What a distillation loss must be given; checked before any work."""

    labels: bool = False
    """Hard labels of every image."""
    live_teacher: bool = False
    """The teacher itself, not only its stored logits (implied by features of the teacher and its classifier)."""
    student: tuple[Feature, ...] = ()
    """Features of the student."""
    teacher: tuple[Feature, ...] = ()
    """Features of the teacher."""
    teacher_classifier: bool = False
    """The teacher's last linear layer, frozen."""
    index: bool = False
    """A fixed row number of every image in a finished bank: no fresh images, no bank that still grows."""
    relational: bool = False
    """Compares the samples of a batch: gets the whole global batch, gathered over ranks and micro-batches."""
    smallest_batch: int = 2
    """Global batches below this are noted as too small for the loss's batch statistics."""
    teachers: int = 1
    """At least so many teachers."""
    deploys: bool = False
    """Whether further modules are deployed with the student (`Loss.deploy`)."""


@dataclass(kw_only=True)
class Taps:
    """What a network gave for a batch."""

    logits: Tensor
    """(B, K) float32."""
    pooled: Tensor | None = None
    """(B, D): input of the classifier."""
    maps: list[Tensor] | None = None
    """(B, C, h, w) each: the ends of the stages, from fine to coarse; the stem is not among them."""
    preact: list[Tensor] | None = None
    """(B, C, h, w) each: the same before the last ReLU of each stage."""
    members: list[Tensor] | None = None
    """(B, K) float32 each: the logits of every teacher, where there are several."""


@dataclass(kw_only=True)
class Batch:
    """One rank's slice of a global batch, on the device (for a relational loss: the whole batch)."""

    images: Tensor
    """(B, C, H, W) float32 in [0, 1], augmented, never normalised."""
    labels: Tensor | None = None
    """(B,) int64: the labels of the bank or of the data."""
    logits: Tensor | None = None
    """(B, K) float32: the teacher logits that the bank stores."""
    index: Tensor | None = None
    """(B,) int64: rows of the bank; -1 where an image is drawn anew."""
    epoch: float = 0.0
    """Epochs since the start, with fraction."""
    progress: float = 0.0
    """Share of the run that is done, in [0, 1)."""
    draw: Callable[[str], torch.Generator] | None = None
    """`draw("negatives")`: a CPU generator that depends on the run's seed, the name and the step, not on the rank."""


@dataclass(kw_only=True)
class Shapes:
    """Shapes of one network's taps, without the batch dimension; empty where they were not asked for."""

    pooled: int = 0
    maps: list[tuple[int, int, int]] = field(default_factory=list)
    preact: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(kw_only=True)
class Setup:
    """What a loss builds its modules from; handed to `Loss.setup` before training."""

    student: Shapes
    teacher: Shapes
    num_classes: int
    batch_size: int
    """Global batch size."""
    epochs: int
    images: int
    """Images of the bank: `Batch.index` is below it."""
    student_points: list[str] = field(default_factory=list)
    """Dotted paths behind the student's maps, in their order."""
    student_classifier: nn.Linear | None = None
    """The student's last linear layer, in training (None where the network has none)."""
    teacher_classifier: nn.Linear | None = None
    """The teacher's, frozen."""
    bank_labels: Tensor | None = None
    """(images,) int64: the label of every image of the bank under the label policy, where the loss needs labels and
    an index; else None."""
    seed: int = 0
    """For initial weights: the loss builds its modules inside `synthkit.models.init.seeded_init`."""


@dataclass(kw_only=True)
class Look:
    """One unaugmented batch of the bank, for `Loss.prepare`."""

    teacher: Taps
    labels: Tensor | None
    index: Tensor


class Loss:
    """Base of the distillation losses: no state, no modules, nothing deployed."""

    Config: ClassVar[Any]
    requires: LossNeeds = LossNeeds()
    beta: ClassVar[float] = 1.0
    """The weight under which the loss's numbers were published beside a cross-entropy of weight 1."""
    aux: nn.Module | None = None
    """Trainable modules and buffers of the loss: optimised, checkpointed and moved with the student."""

    def __init__(self, config: Any = None):
        self.config = config or self.Config()

    @property
    def stands_alone(self) -> bool:
        """Whether what is used after training learns to classify. A loss of features alone leaves the student's
        classifier as it began, and is used beside one of the logits."""
        return not self.requires.student or self.requires.deploys

    def setup(self, setup: Setup) -> None:
        """Build `aux` from the probed shapes. Raises `ConfigError` where the loss cannot work on these networks."""

    def prepare(self, looks: Callable[[], Iterator[Look]]) -> None:
        """A phase before the first step: every call of `looks` is a pass over the bank in order, on the device,
        without gradient. What it finds must be kept in buffers of `aux`, which the state stores."""

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def parameter_groups(self, student: nn.Module) -> list[dict[str, Any]] | None:
        """Groups of the optimiser over `student` and `aux` (each with `params` and what differs from the plan, a
        factor `lr_scale` among it); None is one group with everything."""
        return None

    def on_step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """Called before every optimiser step, after the learning rate was set."""

    def deploy(self, student: nn.Module) -> nn.Module | None:
        """The network that is used after training instead of `student`: normalised images (B, C, H, W) to logits
        (B, K), eval mode, sharing its tensors; None where the student stands alone."""
        return None

    def deployed_settings(self) -> dict[str, Any]:
        """Plain values from which `rebuild` makes the deployed network again."""
        return {}

    @classmethod
    def rebuild(cls, student: nn.Module, settings: dict[str, Any]) -> nn.Module:
        """The deployed network around a fresh `student`, with fresh weights, to load a state dict into."""
        raise NotImplementedError
