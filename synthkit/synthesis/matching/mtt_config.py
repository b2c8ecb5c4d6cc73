"""What trajectory matching can be told. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from synthkit.errors import ConfigError
from synthkit.synthesis.matching.config import MatchingConfig


@dataclass(frozen=True, kw_only=True)
class MTTConfig(MatchingConfig):
    """Trajectory matching (MTT; DATM with soft labels and a growing window). Published settings are in the recipes."""

    iterations: int = 5000
    """Outer iterations."""
    lr_img: float = 1000.0
    """Learning rate of the pixels (SGD), which live in normalised or whitened space and are never clamped."""
    init: Literal["noise", "real", "correct"] = "real"
    """First images: normal noise, random real images, or real images that an expert classifies correctly."""
    zca: bool = False
    """Whiten the pixels (ZCA, eps 0.1); the matrices are stored in the bank."""
    syn_steps: int = 30
    """N: steps of the student on the synthetic set per outer iteration."""
    batch_syn: int | None = None
    """Synthetic images per student step; none is all of them."""
    strategy: str = "auto"
    """Augmentation of experts and student steps (DSA, one transform per image): families joined by _, none, or auto."""
    engine: Literal["sweep", "unroll", "tesla", "tesla_as_released", "auto"] = "sweep"
    """Gradient engine: sweep is exact with the memory of one step, unroll exact with that of all, tesla an
    approximation (as_released: with the released code's half image gradient), auto measures whether unroll pays."""
    alpha: float = 0.01
    """Step size of the student at the start; it is learnt."""
    lr_alpha: float = 1e-5
    """Learning rate of the step size (SGD, momentum 0.5)."""
    alpha_min: float = 1e-6
    """Floor of the step size."""
    labels: Literal["hard", "soft"] = "hard"
    """Labels: the classes, or logits that start from the experts' and are learnt along."""
    lr_labels: float = 2.0
    """Learning rate of learnt label logits (SGD, momentum 0.9)."""
    threshold: float | None = None
    """Iterations whose matching loss is above it change nothing; none applies all (DATM: 1)."""
    expert_epochs: int = 2
    """M: epochs of the expert that the student's N steps are to reproduce."""
    min_start_epoch: int = 0
    """First epoch from which a stretch may start."""
    max_start_epoch: int = 20
    """End (exclusive) of the epochs from which a stretch may start, at the end of the curriculum."""
    first_start_epoch: int | None = None
    """The same at the first iteration, under a curriculum with a ramp; none is half of max_start_epoch."""
    grow_iterations: int | None = None
    """Iterations over which that end grows; none is a tenth of all."""
    experts: str | None = None
    """Folder of the expert trajectories, made or reused; none is one of its own in $SYNTHKIT_HOME/experts."""
    expert_count: int = 100
    """Experts to train and to match."""
    expert_length: int | None = None
    """Epochs of each expert; none trains only those that are read."""
    expert_images: int | None = None
    """Real images that the experts are trained on (a random sample); none is all."""
    expert_seed: int = 0
    """Seed of the experts; runs with other --seed share them."""
    expert_lr: float = 0.01
    """Learning rate of the experts (SGD, constant)."""
    expert_momentum: float = 0.0
    """Momentum of the experts."""
    expert_weight_decay: float = 0.0
    """Weight decay of the experts."""
    expert_batch: int = 256
    """Batch size of the experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("syn_steps", "expert_epochs", "max_start_epoch", "expert_count", "expert_batch")
        self._positive("alpha", "alpha_min", "expert_lr", "lr_labels")
        for name in ("batch_syn", "grow_iterations", "expert_images"):
            if getattr(self, name) is not None:
                self._at_least_one(name)
        first = self.first_window
        if not 0 <= self.min_start_epoch < first <= self.max_start_epoch:
            raise ConfigError(
                "method: 0 <= min_start_epoch < first_start_epoch <= max_start_epoch must hold",
                got=(self.min_start_epoch, first, self.max_start_epoch),
            )
        if self.epochs_read > self.epochs:
            raise ConfigError(
                "method.expert_length: too short",
                got=self.expert_length,
                hint=f"max_start_epoch - 1 + expert_epochs = {self.epochs_read} epochs are read",
            )

    @property
    def first_window(self) -> int:
        """End of the start epochs at the first iteration."""
        if self.first_start_epoch is not None:
            return self.first_start_epoch
        return max(self.min_start_epoch + 1, (self.max_start_epoch + 1) // 2)

    @property
    def epochs_read(self) -> int:
        """Epochs of an expert that any iteration can read."""
        return self.max_start_epoch - 1 + self.expert_epochs

    @property
    def epochs(self) -> int:
        """Epochs that each expert is trained for."""
        return self.epochs_read if self.expert_length is None else self.expert_length
