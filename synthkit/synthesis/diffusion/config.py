"""What every diffusion method can be told. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from synthkit.errors import ConfigError

Sampler = Literal["auto", "ddim", "dpmpp", "ddpm", "lcm", "consistency"]
STEPS = {"ddim": 25, "dpmpp": 20, "ddpm": 250, "lcm": 4, "consistency": 2}
"""Network calls per image where the config does not say."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Fields that every diffusion method has."""

    model: str | None = None
    """The diffusion model: a folder (of `synthkit teach --arch unet`, or any diffusers pipeline saved there), a
    .safetensors file beside its config.json, or a hub repository OWNER/NAME[@REVISION]."""
    offline: bool = False
    """Never ask the hub: take a hub repository from the local cache, or fail."""
    sampler: Sampler = "auto"
    """ddim, dpmpp (DPM-Solver++, order 2), ddpm (ancestral), lcm (few steps, for networks distilled so), consistency;
    auto is consistency for a consistency model, else ddim."""
    steps: int | None = None
    """Network calls per image; none is 25 (ddim), 20 (dpmpp), 250 (ddpm), 4 (lcm) or 2 (consistency)."""
    spacing: Literal["auto", "leading", "trailing", "linspace"] = "auto"
    """How the times are spread; auto is what the checkpoint says, else leading (trailing for v-prediction)."""
    eta: float = 0.0
    """Noise that ddim adds in every step (0 none, 1 as much as ddpm)."""
    cfg: float = 1.0
    """Classifier-free guidance scale s of eps_null + s (eps_y - eps_null); 1 is off and saves half of the calls."""
    classes: tuple[int, ...] | None = None
    """The model's class for every class of the bank, in order; none matches them by name, else by number."""
    prompt: str = "a photo of a {}"
    """Text of a text-conditioned model; {} becomes the name of the class."""
    negative_prompt: str = ""
    """Text of its "no class" (used with cfg other than 1)."""
    batch_size: int = 100
    """Images painted at once."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ConfigError("method.steps must be at least 1", got=self.steps)
        if not 0 <= self.eta <= 1:
            raise ConfigError("method.eta must be in [0, 1]", got=self.eta)
        if self.cfg < 0:
            raise ConfigError("method.cfg must not be negative", got=self.cfg)
        if "{}" not in self.prompt:
            raise ConfigError("method.prompt must contain {} where the class name belongs", got=self.prompt)
