"""How published methods label their images, as presets of `synthkit relabel`. No torch.

Sources: methods cards largescale.md 0.5, 1, 2.6, 2.7, 2.9 and 2.10, kd.md 2.25. What a preset cannot do is said in its
description, never left out silently.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from synthkit.config.schema import RelabelConfig
from synthkit.errors import ConfigError

_VIEW_FIELDS = ("crop_scale", "crop_ratio", "flip", "mix", "mix_alpha")


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """How images are labelled: the fields of `RelabelConfig` that a preset may set, all of them filled."""

    combine: Literal["probs", "logits"] = "probs"
    views: int = 0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    mix: Literal["none", "mixup", "cutmix"] = "none"
    mix_alpha: float = 1.0
    top_k: int | None = None
    bn: Literal["eval", "batch"] = "eval"
    batch_size: int = 256
    name: str = "custom"
    """The preset, where all its values hold."""


@dataclass(frozen=True, kw_only=True)
class RelabelPreset:
    """Fields of `RelabelConfig` with a line of description."""

    description: str
    values: dict[str, Any] = field(default_factory=dict)


PRESETS: dict[str, RelabelPreset] = {
    "sre2l": RelabelPreset(
        description="SRe2L, CDA on ImageNet: 300 views, crops .08-1, cutmix (one lambda per view here, per batch "
        "there), teacher in eval mode, 1024 rows at once",
        values={"views": 300, "mix": "cutmix", "batch_size": 1024},
    ),
    "cvdd": RelabelPreset(
        description="CV-DD, SRe2L++, FADRM: as sre2l with batch statistics over 8 rows (two halves of 16); several "
        "teachers by the mean of logits (CV-DD: --weights, softmax of their prior accuracies in % over 10)",
        values={"views": 300, "mix": "cutmix", "bn": "batch", "batch_size": 8, "combine": "logits"},
    ),
    "rded": RelabelPreset(
        description="RDED's views stored (its teacher is live: protocol rded): 300, crops .5-1, cutmix, eval mode; "
        "patches are not shuffled",
        values={"views": 300, "crop_scale": (0.5, 1.0), "mix": "cutmix", "batch_size": 100},
    ),
    "gvbsm": RelabelPreset(
        description="G-VBSM on ImageNet: as sre2l, mean of the logits of four teachers (--teacher A,B,C,D)",
        values={"views": 300, "mix": "cutmix", "batch_size": 1024, "combine": "logits"},
    ),
    "edc": RelabelPreset(
        description="EDC on ImageNet: crops .5-1, cutmix, mean of the logits of four teachers, 100 rows at once; "
        "patches are not shuffled",
        values={"views": 300, "crop_scale": (0.5, 1.0), "mix": "cutmix", "batch_size": 100, "combine": "logits"},
    ),
    "fkd": RelabelPreset(
        description="FKD: 500 crops of every image, not mixed, the 5 largest logits and the mass of the rest",
        values={"views": 500, "top_k": 5},
    ),
}


def labelling(cfg: RelabelConfig) -> Labelling:
    """Every value by its flag, else by the preset, else by default.

    Raises:
        ConfigError: no such preset (the nearest is offered), or a field of views where there are none.
    """
    if cfg.preset is not None and cfg.preset not in PRESETS:
        raise ConfigError("preset: not known", got=cfg.preset, allowed=PRESETS, hint="synthkit list presets")
    preset = PRESETS[cfg.preset].values if cfg.preset is not None else {}
    names = [f.name for f in fields(Labelling) if f.name != "name"]
    given = {name: getattr(cfg, name) for name in names if getattr(cfg, name) is not None}
    values = {**preset, **given}
    if cfg.preset is not None and all(values[name] == value for name, value in preset.items()):
        values["name"] = cfg.preset
    if values.get("views", 0) == 0:
        for name in _VIEW_FIELDS:
            if name in given:
                raise ConfigError(f"{name} is for views, but the images are labelled as they are", got=given[name],
                                  hint="give the number of views per image: --views 10")  # fmt: skip
            values.pop(name, None)
    return Labelling(**values)
