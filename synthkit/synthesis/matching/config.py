"""What every matching method can be told. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from synthkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """Fields that every matching method has."""

    arch: str = "convnet"
    """Architecture of the networks that are matched (convnet_w32, convnet_bn, convnet_d4, ...; fresh weights)."""
    iterations: int = 1000
    """Outer iterations."""
    lr_img: float = 0.1
    """Learning rate of the pixels (SGD), which live in normalised (or whitened) space and are never clamped."""
    momentum: float = 0.5
    """SGD momentum of the pixels."""
    init: Literal["noise", "real"] = "noise"
    """First images: normal noise, or random real images of their class."""

    def __post_init__(self) -> None:
        self._at_least_one("iterations")
        self._positive("lr_img")
        if not 0 <= self.momentum < 1:
            raise ConfigError("method.momentum must be in [0, 1)", got=self.momentum)

    def _at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigError(f"method.{name} must be at least 1", got=getattr(self, name))

    def _positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ConfigError(f"method.{name} must be positive", got=getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ClasswiseConfig(MatchingConfig):
    """Fields of the methods that compare real and synthetic images class by class (DC, DSA, DM)."""

    batch_real: int = 256
    """Real images of each class per step."""
    strategy: str = "none"
    """Siamese augmentation: families joined by _ (color_crop_cutout_flip_scale_rotate), none, or auto: all of them, but
    without the mirror for digits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("batch_real")
