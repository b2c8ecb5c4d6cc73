"""What every inversion method can be told. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from synthkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """Fields that every inversion method has; the defaults are the published CIFAR-10 settings of DeepInversion."""

    batch_size: int = 256
    """Images optimised together; BatchNorm statistics are matched over them. Batches never cross a shard."""
    iterations: int = 2000
    """Iterations at full resolution."""
    coarse_iterations: int = 0
    """Iterations before those, on the pixels average-pooled by `coarse` (2000 in ImageNet setting 0)."""
    coarse: int = 2
    """Pooling factor of the coarse stage."""
    lr: float = 0.1
    """Adam learning rate on the pixels (in the teacher's normalised space)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam betas."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the iterations of each stage."""
    warmup: int = 0
    """Iterations at the start of each stage over which the learning rate rises linearly (100 on ImageNet)."""
    init: Literal["noise", "real", "mosaic"] = "noise"
    """Start from normal noise in normalised space, from real images (--data), or from tiles of several real images."""
    noise: float = 1.0
    """Standard deviation of the starting noise (published: 1; less leaves less of it in the images)."""
    mosaic: int = 2
    """Tiles per side of a mosaic."""
    jitter: int = 2
    """Largest roll of the view in pixels, both ways on both axes (divided by `coarse` in the coarse stage)."""
    flip: bool = False
    """Mirror half of the views."""
    crop: float | None = None
    """Smallest area share of a random resized crop (0.08 on ImageNet); none looks at whole images. With an
    easy-to-hard curriculum the bound falls from 1 to this value as in CDA, else it is constant."""
    crop_form: Literal["cosine", "linear", "step"] = "cosine"
    """How the bound falls under the curriculum."""
    crop_milestone: float = 1.0
    """Share of the iterations after which the bound has reached `crop`."""
    per_image: bool = False
    """Draw a view for every image; else one for the whole batch, as the published codes do."""
    clamp: bool = False
    """Keep the pixels within the valid range after every step (ImageNet and the later methods do)."""
    ce: float = 1.0
    """Weight of the cross-entropy to the intended class."""
    bn: float = 100.0
    """Weight of the BatchNorm-statistics term; 0 works with teachers without BatchNorm."""
    bn_first: float = 1.0
    """Factor on the first BatchNorm layer (10 on ImageNet)."""
    bn_variance: float = 1.0
    """Factor on the variance part of every layer (DWA: 2 to 11)."""
    bn_layers: tuple[float, ...] | None = None
    """One factor per BatchNorm layer in module order, on top of `bn_first`; none is 1 for all."""
    tv_l2: float = 2.5e-5
    """Weight of the total variation as four norms of shifted differences."""
    tv_l1: float = 0.0
    """Weight of the total variation as four means of absolute shifted differences."""
    priors_of: Literal["view", "pixels"] = "view"
    """Priors of the view that the teacher sees, or of the pixels themselves (zju benchmark)."""
    l2: float = 0.0
    """Weight of mean_i ||x_i||_2 (ImageNet form)."""
    l2_batch: float = 0.0
    """Weight of the norm of the whole batch (CIFAR form)."""
    competition: float = 0.0
    """Weight of the competition with a student: images on which teacher and student differ."""
    competition_form: Literal["clamped", "raw"] = "clamped"
    """1 - clamp(JS, 0, 1) (NVIDIA), or -JS (zju benchmark)."""
    competition_T: float = 3.0
    """Temperature of the competition and of the stored difficulty."""
    committee: Literal["sum", "cycle"] = "sum"
    """Several teachers: their weighted sum in every iteration, or one after the other."""
    teacher_weights: tuple[float, ...] | None = None
    """One weight per teacher (sum to 1 is not enforced); none is their mean."""
    verifier: str | None = None
    """Model spec of a network that takes no part: how often it sees the intended class is logged and recorded."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "iterations", "coarse", "mosaic"):
            if getattr(self, name) < 1:
                raise ConfigError(f"method.{name} must be at least 1", got=getattr(self, name))
        for name in ("coarse_iterations", "warmup", "jitter"):
            if getattr(self, name) < 0:
                raise ConfigError(f"method.{name} must not be negative", got=getattr(self, name))
        for name in ("lr", "competition_T", "noise"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"method.{name} must be positive", got=getattr(self, name))
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ConfigError("method.crop must be in (0, 1]", got=self.crop)
        if not 0 <= self.crop_milestone <= 1:
            raise ConfigError("method.crop_milestone must be in [0, 1]", got=self.crop_milestone)
