"""What a folder with a diffusion model does not say about itself: `diffusion.json`, written by `synthkit teach`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthkit.errors import ConfigError

CARD = "diffusion.json"
_SIZE_CAP = 2_000_000


@dataclass(frozen=True, kw_only=True)
class DiffusionCard:
    """Classes and pixels of a diffusion model."""

    image_size: tuple[int, int, int]
    """(C, H, W) of what it paints."""
    class_names: list[str]
    """Names of the classes in the order of its labels."""
    mean: list[float]
    """Channel means of the training images in [0, 1], for classifiers that will be trained on what it paints."""
    std: list[float]
    """Their standard deviations."""
    null_class: int | None = None
    """Label that stands for "no class", or None where the model was trained without it."""
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    """What [0, 1] pixels were mapped to."""
    source: str = ""
    """Where the weights come from."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else; kept, not read."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    @classmethod
    def load(cls, folder: Path) -> DiffusionCard | None:
        """The card in `folder`, or None where there is none.

        Raises:
            ConfigError: it is no valid card.
        """
        path = folder / CARD
        if not path.is_file():
            return None
        if path.stat().st_size > _SIZE_CAP:
            raise ConfigError(f"{path}: {path.stat().st_size:,} bytes are too many for a card")
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
            sizes = dataclasses.replace(
                found,
                image_size=tuple(int(n) for n in found.image_size),  # type: ignore[arg-type]  # length checked below
                pixel_range=tuple(float(n) for n in found.pixel_range),  # type: ignore[arg-type]
                class_names=[str(name) for name in found.class_names],
            )
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path}: no card of a diffusion model ({' '.join(str(error).split())})") from None
        channels = sizes.image_size[0] if len(sizes.image_size) == 3 else 0
        if channels < 1 or min(sizes.image_size) < 1 or len(sizes.mean) != channels or len(sizes.std) != channels:
            raise ConfigError(f"{path}: image_size must be [C, H, W], mean and std one number per channel",
                              got=list(sizes.image_size))  # fmt: skip
        if len(sizes.pixel_range) != 2 or sizes.pixel_range[0] >= sizes.pixel_range[1]:
            raise ConfigError(f"{path}: pixel_range must be [low, high]", got=list(sizes.pixel_range))
        return sizes
