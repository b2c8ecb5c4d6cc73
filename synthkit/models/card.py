"""Model cards: what a weights file does not say about itself. YAML or JSON; no torch here."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from synthkit.config import safe_yaml
from synthkit.errors import ConfigError, ModelError, nearest

SUFFIXES = (".yaml", ".yml", ".json")
_MOST_CLASSES = 1 << 20
_SIZE_CAP = 2_000_000  # bytes; a card with 20,000 class names stays far below


@dataclass(kw_only=True)
class ModelCard:
    """Everything needed to use a trained classifier: architecture, input, normalisation, classes, origin."""

    arch: str
    """Architecture name (`synthkit list models`), `timm:NAME` or `torchvision:NAME`."""
    num_classes: int
    """Number of logits."""
    input_size: tuple[int, int, int]
    """(C, H, W) of the images."""
    mean: list[float]
    """Mean per channel of images in [0, 1]."""
    std: list[float]
    """Standard deviation per channel of images in [0, 1]."""
    weights: str | None = None
    """Weights file, relative to the card."""
    sha256: str | None = None
    """sha256 of the weights file, checked at every load."""
    class_names: list[str] | None = None
    """Names of the classes in the order of the logits."""
    accuracy: dict[str, Any] | float | None = None
    """Measured test accuracy: one number or {data: number}."""
    source: str | None = None
    """Where the weights come from."""
    licence: str | None = None
    """Licence of the weights."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else; kept, not read."""

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_dict(cls, data: Any, origin: str = "card") -> ModelCard:
        """A card from the parsed file; `origin` names the file in messages.

        Raises:
            ConfigError: unknown or missing keys, values of the wrong type or out of range.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"{origin}: a model card is a mapping of keys to values", got=type(data).__name__)
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                close = nearest(str(key), known)
                hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"
                raise ConfigError(f"{origin}: unknown key {key!r} in the model card; {hint}")
        required = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [n for n in required if n not in data]:
            raise ConfigError(
                f"{origin}: the model card lacks {', '.join(missing)}", hint="see recipes/teachers/*.yaml"
            )
        try:
            return cls(**data)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> ModelCard:
        """Read a card.

        Raises:
            ModelError: the file is not there or is no .yaml, .yml or .json.
            ConfigError: its content is not a valid card.
        """
        path = Path(path)
        _check_suffix(path)
        if not path.is_file():
            raise ModelError("model card: no such file", got=str(path))
        if path.stat().st_size > _SIZE_CAP:
            raise ConfigError(f"{path}: {path.stat().st_size:,} bytes are too many for a model card")
        try:
            text = safe_yaml.read_text(path, _SIZE_CAP)
            data = json.loads(text) if path.suffix.lower() == ".json" else safe_yaml.loads(text, "it", _SIZE_CAP)
        except (ConfigError, ValueError, RecursionError) as error:  # ValueError: also an int of thousands of digits
            what = f"{path}: not readable as a model card (a mapping of names to values): "
            raise ConfigError(what + " ".join(str(error).split())) from None
        return cls.from_dict(data or None, str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, keys that are not set left out."""
        data = dataclasses.asdict(self)
        data["input_size"] = list(self.input_size)
        return {k: v for k, v in data.items() if v is not None and v != {}}

    def save(self, path: str | Path) -> Path:
        """Write the card as YAML or JSON, by the suffix of `path`."""
        path = Path(path)
        _check_suffix(path)
        data = self.to_dict()
        if path.suffix.lower() == ".json":
            text = json.dumps(data, indent=2) + "\n"
        else:
            text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ModelError("model card: unknown file type", got=path.name, hint="a card is a .yaml, .yml or .json file")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(what: str, value: Any, channels: int) -> list[float]:
    if not isinstance(value, list | tuple) or not all(_is_number(v) for v in value):
        raise ConfigError(f"{what} must be a list of numbers", got=value)
    if len(value) != channels:
        raise ConfigError(f"{what} needs {channels} numbers, one per channel of input_size", got=list(value))
    return [float(v) for v in value]


def _check(card: ModelCard) -> None:
    """Validate and normalise in place; ConfigError names the key."""
    for key in ("arch", "weights", "sha256", "source", "licence"):
        value = getattr(card, key)
        if (value is None and key != "arch") or (isinstance(value, str) and value):
            continue
        raise ConfigError(f"{key} must be text", got=value)
    if not _is_int(card.num_classes) or not 1 <= card.num_classes <= _MOST_CLASSES:
        raise ConfigError(f"num_classes must be a positive whole number up to {_MOST_CLASSES}", got=card.num_classes)
    size: Any = card.input_size
    if not isinstance(size, list | tuple) or len(size) != 3 or not all(_is_int(v) and 0 < v <= 1 << 14 for v in size):
        raise ConfigError("input_size must be three positive whole numbers: channels, height, width", got=size)
    card.input_size = (size[0], size[1], size[2])
    card.mean = _numbers("mean", card.mean, size[0])
    card.std = _numbers("std", card.std, size[0])
    if min(card.std) <= 0:
        raise ConfigError("std must be positive", got=card.std)
    if card.sha256 is not None:
        card.sha256 = card.sha256.lower()
        if not re.fullmatch(r"[0-9a-f]{64}", card.sha256):
            raise ConfigError("sha256 must be 64 hexadecimal digits", got=card.sha256)
    names: Any = card.class_names
    if names is not None:
        if not isinstance(names, list | tuple) or not all(isinstance(n, str | int) for n in names):
            raise ConfigError("class_names must be a list of names", got=names)
        if len(names) != card.num_classes:
            raise ConfigError(f"class_names has {len(names)} names for {card.num_classes} classes")
        card.class_names = [str(n) for n in names]
    if card.accuracy is not None and not isinstance(card.accuracy, dict) and not _is_number(card.accuracy):
        raise ConfigError("accuracy must be a number or a mapping of data to number", got=card.accuracy)
    if not isinstance(card.extra, dict):
        raise ConfigError("extra must be a mapping", got=card.extra)
