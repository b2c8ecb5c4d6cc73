"""What every data-free method with a co-trained student can be told, and the usual student of a teacher. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from synthkit.errors import ConfigError

STUDENTS = {
    "resnet34": "resnet18",
    "resnet50": "resnet18",
    "wrn40_2": "wrn16_1",
    "wrn40_1": "wrn16_1",
    "wrn16_2": "wrn16_1",
    "lenet5": "lenet5_half",
    "lenet5_bn": "lenet5_half_bn",
    "vgg11": "resnet18",
    "vgg13": "vgg8",
    "resnet20_a": "resnet8",
    "resnet56_a": "resnet20",
    "resnet56": "resnet20",
    "resnet110": "resnet32",
    "resnet32x4": "resnet8x4",
}
"""Default co-trained student of a teacher architecture (the field's usual pairs); others get their own architecture."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The co-trained student and its curriculum."""

    student: str = "auto"
    """Architecture of the co-trained student; auto takes the usual partner of the teacher."""
    epochs: int = 250
    """Epochs of `ep_steps` student steps; the ramp and the learning rate move per epoch."""
    ep_steps: int = 400
    """Student steps per epoch."""
    batch_size: int = 512
    """Images per student step (and per generator step, where a generator runs along)."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimiser of the student."""
    lr: float = 0.1
    """Student learning rate."""
    momentum: float = 0.9
    """Student SGD momentum."""
    weight_decay: float = 1e-4
    """Weight decay of the student."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Learning rate over the epochs: half a cosine down to `lr_min`, times `gamma` at every milestone, or constant."""
    milestones: tuple[float, ...] = (0.4, 0.8)
    """Fractions of the epochs at which a step schedule falls."""
    gamma: float = 0.1
    """Factor of a step schedule."""
    lr_min: float = 0.0
    """Student learning rate at the end of the cosine."""
    clip: float = 0.0
    """Largest gradient norm of student and generator (0: not clipped)."""
    loss: Literal["l1", "kl", "l2"] = "l1"
    """KD loss of the student, and the difficulty of an image: mean |s - t|, T^2 KL at T, or mean (s - t)^2."""
    T: float = 20.0
    """KD temperature."""
    adv: float = 0.0
    """Weight of the adversary; its start under a curriculum with a ramp."""
    grad_adv: float = 0.5
    """Growth of the adversarial weight per epoch between `begin` and `end`, under a curriculum with a ramp."""
    begin: float = 0.25
    """Fraction of the epochs at which the ramp begins."""
    end: float = 0.75
    """Fraction of the epochs at which the ramp ends."""
    adv_T: float = 3.0
    """Temperature of the adversary, where it has one."""
    lambda_0: float = 2.0
    """Age parameter of the self-paced weights at the first step."""
    alpha: float = 1e-4
    """Growth of the age per student step (published: 1e-4 for CIFAR-10, 2e-5 elsewhere)."""
    granularity: Literal["sample", "batch"] = "sample"
    """Self-paced weight per sample (as the paper says) or one per batch (as the published code does)."""
    checkpoints: int = 0
    """States of the co-trained student kept along the run, for `synthkit select` (0: the last one only)."""

    def __post_init__(self) -> None:
        positive(self, "lr", "T", "adv_T", "gamma")
        at_least_one(self, "epochs", "ep_steps", "batch_size")
        not_negative(self, "momentum", "weight_decay", "lr_min", "clip", "checkpoints")
        if not 0 <= self.begin <= self.end <= 1:
            raise ConfigError(
                "method.begin and method.end must satisfy 0 <= begin <= end <= 1", got=(self.begin, self.end)
            )
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise ConfigError("method.milestones must be rising fractions between 0 and 1", got=self.milestones)
        if self.lambda_0 <= 0:
            raise ConfigError("method.lambda_0 must be positive", got=self.lambda_0)


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(StudentConfig):
    """Methods whose generator and student learn in turn."""

    kd_steps: int = 10
    """Student steps per cycle."""
    g_steps: int = 1
    """Generator steps per cycle."""
    lr_g: float = 1e-3
    """Generator learning rate (one persistent Adam)."""
    betas_g: tuple[float, float] = (0.9, 0.99)
    """Generator Adam betas."""
    schedule_g: Literal["constant", "cosine", "step"] = "constant"
    """Generator learning rate over the epochs, as `schedule`."""
    generator: str = "cud"
    """Generator network (models.generators)."""
    nz: int = 512
    """Latent dimension."""
    depth: int = 2
    """Number of x2 upsamplings of the generator (generator cud)."""
    width: int = 64
    """Base width (ngf) of the generator."""
    store_from: float = 0.1
    """Fraction of the run after which images are stored in the bank (earlier ones come from an untrained generator)."""
    snapshots: int = 8
    """Generator snapshots kept in the bank, spread over the second half of the run (0: none)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "kd_steps", "g_steps", "nz", "depth", "width")
        positive(self, "lr_g")
        not_negative(self, "snapshots")
        if not 0 <= self.store_from < 1:
            raise ConfigError("method.store_from must be in [0, 1)", got=self.store_from)


@dataclass(frozen=True, kw_only=True)
class PoolConfig(StudentConfig):
    """Methods that synthesise batch after batch into a memory bank, from which the student learns."""

    batch_size: int = 256
    """Images of the memory bank per student step."""
    loss: Literal["l1", "kl", "l2"] = "kl"
    """KD loss of the student, and the difficulty of an image: mean |s - t|, T^2 KL at T, or mean (s - t)^2."""
    synthesis_batch: int = 256
    """Images per synthesis call; the calls are spread evenly over the student's steps."""
    g_steps: int = 200
    """Iterations per synthesis call."""
    warmup: float = 0.0
    """Share of the synthesis calls that are made before the student starts, without adversary."""
    augment: str = "crop_flip"
    """Augmentation of the student's images (none, crop_flip, ...)."""
    views: str = "crop_flip"
    """Augmentation under which the networks see the images while they are made, where the method has one."""
    lr_g: float = 1e-3
    """Learning rate of the synthesis (Adam)."""
    betas_g: tuple[float, float] = (0.5, 0.999)
    """Adam betas of the synthesis."""
    generator: str = "small"
    """Generator network (models.generators), where the method has one."""
    nz: int = 256
    """Latent dimension."""
    width: int = 64
    """Base width (ngf) of the generator."""

    def __post_init__(self) -> None:
        from synthkit.data.policies import POLICIES

        super().__post_init__()
        at_least_one(self, "synthesis_batch", "g_steps", "nz", "width")
        positive(self, "lr_g")
        if not 0 <= self.warmup <= 1:
            raise ConfigError("method.warmup must be in [0, 1]", got=self.warmup)
        for name in ("augment", "views"):
            if getattr(self, name) not in POLICIES:
                raise ConfigError(f"method.{name}: no such policy", got=getattr(self, name), allowed=POLICIES)


def at_least_one(config: Any, *names: str) -> None:
    """Refuse fields below 1."""
    _check(config, names, lambda value: value >= 1, "must be at least 1")


def positive(config: Any, *names: str) -> None:
    """Refuse fields that are not above 0."""
    _check(config, names, lambda value: value > 0, "must be positive")


def not_negative(config: Any, *names: str) -> None:
    """Refuse fields below 0."""
    _check(config, names, lambda value: value >= 0, "must not be negative")


def _check(config: Any, names: tuple[str, ...], fits: Callable[[Any], bool], rule: str) -> None:
    for name in names:
        if not fits(getattr(config, name)):
            raise ConfigError(f"method.{name} {rule}", got=getattr(config, name))
