"""What every generator method can be told, and the usual student of a teacher. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
class GeneratorConfig:
    """Fields that every generator method has."""

    student: str = "auto"
    """Architecture of the co-trained student; auto takes the usual partner of the teacher."""
    epochs: int = 250
    """Epochs of `ep_steps` student steps; the ramp and the learning rate move per epoch."""
    ep_steps: int = 400
    """Student steps per epoch."""
    kd_steps: int = 10
    """Student steps per cycle."""
    g_steps: int = 1
    """Generator steps per cycle."""
    batch_size: int = 512
    """Images per generator step and per student step."""
    lr: float = 0.1
    """Student learning rate (SGD, cosine over the epochs)."""
    momentum: float = 0.9
    """Student SGD momentum."""
    weight_decay: float = 1e-4
    """Student weight decay."""
    lr_g: float = 1e-3
    """Generator learning rate (one persistent Adam)."""
    betas_g: tuple[float, float] = (0.9, 0.99)
    """Generator Adam betas."""
    generator: str = "cud"
    """Generator network (models.generators)."""
    nz: int = 512
    """Latent dimension."""
    depth: int = 2
    """Number of x2 upsamplings of the generator."""
    width: int = 64
    """Base width (ngf) of the generator."""
    loss: Literal["l1", "kl", "l2"] = "l1"
    """KD loss of the student, and the difficulty of an image: mean |s - t|, T^2 KL at T, or mean (s - t)^2."""
    T: float = 20.0
    """KD temperature."""
    store_from: float = 0.1
    """Fraction of the run after which images are stored in the bank (earlier ones come from an untrained generator)."""
    snapshots: int = 8
    """Generator snapshots kept in the bank, spread over the second half of the run (0: none)."""

    def __post_init__(self) -> None:
        for name in ("epochs", "ep_steps", "kd_steps", "g_steps", "batch_size", "nz", "depth", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"method.{name} must be at least 1", got=getattr(self, name))
        for name in ("lr", "lr_g", "T"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"method.{name} must be positive", got=getattr(self, name))
        if self.snapshots < 0:
            raise ConfigError("method.snapshots must not be negative", got=self.snapshots)
        if not 0 <= self.store_from < 1:
            raise ConfigError("method.store_from must be in [0, 1)", got=self.store_from)
