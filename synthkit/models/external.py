"""Architectures of torchvision and timm under the prefixes `torchvision:` and `timm:`."""

from __future__ import annotations

from typing import Any

from torch import nn

from synthkit.errors import ModelError, WeightsError, nearest
from synthkit.models import normalisation
from synthkit.models.card import ModelCard

# In train mode these return a tuple with auxiliary logits, which no trainer here understands.
_AUXILIARY = ("googlenet", "inception_v3")


def build(name: str, *, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The library's network with fresh weights; `name` carries the prefix.

    Raises:
        ModelError: the library or the name is unknown, or the input does not suit it.
    """
    library, _, own = name.partition(":")
    if library == "timm":
        timm = _timm()
        _check_timm(timm, own)
        try:
            return timm.create_model(own, pretrained=False, num_classes=num_classes, in_chans=in_channels)
        except (TypeError, RuntimeError, AssertionError, ValueError) as error:
            raise ModelError(f"{name}: timm cannot build it: {error}") from None
    if in_channels != 3:
        raise ModelError(
            f"{name} takes 3-channel images", got=in_channels, hint="torchvision networks have a colour stem"
        )
    models = _torchvision(own)
    return models.get_model(own, weights=None, num_classes=num_classes)


def default_size(name: str) -> int | None:
    """Side of the images that timm's record of an architecture names; None for everything else."""
    if not name.startswith("timm:"):
        return None
    timm = _timm()
    own = name.partition(":")[2]
    _check_timm(timm, own)
    config = timm.get_pretrained_cfg(own)
    return int(config.input_size[-1]) if config is not None else None


def pretrained(name: str) -> tuple[nn.Module, ModelCard]:
    """Network with the library's default weights (from its cache, else downloaded) and a card from its record.

    Raises:
        WeightsError: the weights cannot be had; the remedy is a local file.
    """
    library, _, own = name.partition(":")
    return _timm_pretrained(name, own) if library == "timm" else _torchvision_pretrained(name, own)


def _timm() -> Any:
    try:
        import timm  # pyright: ignore[reportMissingImports]  # the optional extra [timm]
    except ImportError:
        raise ModelError("timm is not installed", hint="pip install synthkit[timm]") from None
    return timm


def _check_timm(timm: Any, own: str) -> None:
    if timm.is_model(own):
        return
    raise ModelError(
        f"timm:{own}: timm has no such model",
        hint=_offer("timm", own, timm.list_models()),
    )


def _offer(library: str, own: str, known: list[str]) -> str:
    close = nearest(own, known, n=3)
    return (
        f"did you mean {', '.join(f'{library}:{c}' for c in close)}?"
        if close
        else f"{library} knows {len(known)} models"
    )


def _torchvision(own: str) -> Any:
    from torchvision import models

    known = [n for n in models.list_models(module=models) if n not in _AUXILIARY]
    if own in _AUXILIARY:
        raise ModelError(f"torchvision:{own} has auxiliary classifiers, which synthkit does not train")
    if own not in known:
        raise ModelError(
            f"torchvision:{own}: torchvision has no such classifier", hint=_offer("torchvision", own, known)
        )
    return models


def _torchvision_pretrained(name: str, own: str) -> tuple[nn.Module, ModelCard]:
    models = _torchvision(own)
    weights = models.get_model_weights(own).DEFAULT  # type: ignore[attr-defined]  # an Enum made per model
    module = models.get_model(own, weights=None)
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network; or the download's hash is wrong
        raise WeightsError(
            f"{name}: cannot download the weights ({error})", hint=f"fetch {weights.url} and write {name}@FILE"
        ) from None
    module.load_state_dict(state)
    preset = weights.transforms()
    side = int(preset.crop_size[0])
    card = ModelCard(
        arch=name,
        num_classes=len(weights.meta["categories"]),
        input_size=(3, side, side),
        mean=list(preset.mean),
        std=list(preset.std),
        class_names=list(weights.meta["categories"]),
        source=weights.url,
    )
    return module, card


def _timm_pretrained(name: str, own: str) -> tuple[nn.Module, ModelCard]:
    timm = _timm()
    _check_timm(timm, own)
    try:
        module = timm.create_model(own, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"{name}: cannot get timm's weights ({error})",
            hint=f"give a file: {name}@FILE, or fresh weights for a student",
        ) from None
    config = module.pretrained_cfg
    channels, height, width = config["input_size"]
    card = ModelCard(
        arch=name,
        num_classes=int(module.num_classes),
        input_size=(channels, height, width),
        mean=list(config.get("mean", normalisation.IMAGENET[0])),
        std=list(config.get("std", normalisation.IMAGENET[1])),
        source=config.get("hf_hub_id") or config.get("url"),
        licence=config.get("license"),
    )
    return module, card
