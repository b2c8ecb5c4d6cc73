"""From a model spec to a network: fresh (`build_model`) or with weights (`load_model`)."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from synthkit.errors import ModelError, WeightsError
from synthkit.models import external, names, normalisation, own, sources
from synthkit.models.card import ModelCard
from synthkit.models.init import seeded
from synthkit.models.weights import (
    State,
    align_keys,
    count_parameters,
    file_sha256,
    fit_state_dict,
    mismatches,
    read_state_dict,
)

__all__ = ["LoadedModel", "build_model", "count_parameters", "load_model"]

log = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """A network and what is known about it."""

    module: nn.Module
    """The network on the CPU; in eval mode when weights were loaded, else in train mode."""
    card: ModelCard
    """The card given, or one made from the spec (`extra["assumed"]` names what had to be guessed)."""
    spec: str
    """The spec as the user wrote it."""
    path: Path | None
    """The weights file, if any."""
    sha256: str | None
    """sha256 of the weights file, if any."""


def build_model(
    name: str, *, num_classes: int, in_channels: int = 3, image_size: int = 32, seed: int | None = None
) -> nn.Module:
    """A network with fresh weights from its published initialisation.

    Args:
        name: architecture name or alias, `timm:NAME` or `torchvision:NAME`.
        num_classes: number of logits.
        in_channels: image channels.
        image_size: side of the square images; checked where the layers depend on it.
        seed: seed of the weights; none draws from torch's global generator.

    Raises:
        ModelError: unknown name, or an input that the architecture cannot take.
    """
    name = names.resolve_name(name)
    for what, value in (("num_classes", num_classes), ("in_channels", in_channels), ("image_size", image_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{name}: {what} must be a positive whole number", got=value)
    with seeded(seed):
        if name.startswith(own.PREFIXES):
            return own.build(name, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        if name.startswith(names.EXTERNAL):
            return external.build(name, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        module, _, function = names.entry(name)[0].partition(":")
        builder = getattr(importlib.import_module(module), function)
        return builder(name, num_classes=num_classes, in_channels=in_channels, image_size=image_size)


def load_model(
    spec: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    weights: Literal["required", "optional"] = "required",
    seed: int | None = None,
) -> LoadedModel:
    """The network that a model spec names.

    Classes, channels and image size come from the card, else from the arguments, else from the weights file, else from
    the architecture's default. An argument that contradicts the card or the file is an error, except that the card's
    image size wins silently.

    Args:
        spec: NAME, NAME@FILE, a card, a run directory, timm:NAME[@FILE], torchvision:NAME[@FILE], hf:REPO[@REV], or a
            network of the user: py:FILE.py:NAME[@FILE].
        weights: "required" (a teacher) looks for a bare name's weights in the assets, the local store or its library;
            "optional" (a student) gives fresh weights for a bare name or a card without a file.
        seed: seed of fresh weights; none draws from torch's global generator.

    Raises:
        ModelError: the spec cannot be resolved. WeightsError: its weights are missing, unsafe or do not fit.
    """
    source = sources.resolve(spec, weights=weights)
    asked = (num_classes, in_channels, image_size)
    if source.card is not None:
        return _from_card(spec, source.card, source.file, asked, weights, seed)
    if source.file is None and source.pretrained:
        return _pretrained(spec, source.arch, asked)
    state = None if source.file is None else read_state_dict(source.file)
    card, module = _assemble(source.arch, asked, state, str(source.file), seed)
    sha256 = None if source.file is None else file_sha256(source.file)
    if source.file is not None:
        card = replace(card, weights=str(source.file), sha256=sha256)
        log.warning("%s: no card, so %s is assumed; write a card to be sure", spec, card.extra["assumed"])
        module.eval()
    return LoadedModel(module=module, card=card, spec=spec, path=source.file, sha256=sha256)


Asked = tuple[int | None, int | None, int | None]


def _from_card(
    spec: str, card: ModelCard, file: Path | None, asked: Asked, weights: str, seed: int | None
) -> LoadedModel:
    arch = names.resolve_name(card.arch)
    _agree(f"{spec}: the card says", asked, card)
    shape = {"num_classes": card.num_classes, "in_channels": card.input_size[0], "image_size": card.input_size[2]}
    if file is None:
        if weights == "required":
            raise WeightsError(
                f"{spec}: the card names no weights file", hint="add `weights: FILE` to it, or use NAME@FILE"
            )
        return LoadedModel(module=build_model(arch, **shape, seed=seed), card=card, spec=spec, path=None, sha256=None)
    if not file.is_file():
        raise WeightsError(
            f"{spec}: the weights file of the card is not there",
            got=str(file),
            hint=card.source and f"source: {card.source}",
        )
    sha256 = file_sha256(file)
    if card.sha256 is not None and sha256 != card.sha256:
        raise WeightsError(
            f"{spec}: {file} is not the file that the card describes",
            hint=f"sha256 of the file {sha256}, of the card {card.sha256}; fetch the file again or correct the card",
        )
    state = read_state_dict(file)
    head = card.extra.get("head")
    module = _fitted(arch, state, str(file), **shape) if head is None else _with_head(arch, head, state, spec, **shape)
    return LoadedModel(module=module, card=card, spec=spec, path=file, sha256=sha256)


def _with_head(arch: str, head: Any, state: State, spec: str, **shape: int) -> nn.Module:
    """A student with the modules that its loss deployed, built again by the loss."""
    from synthkit.tables import lookup

    if (
        not isinstance(head, dict)
        or not isinstance(head.get("loss"), str)
        or not isinstance(head.get("settings"), dict)
    ):
        raise ModelError(f"{spec}: the card's head must hold loss and settings", got=head)
    kind = lookup("loss", head["loss"])
    if not kind.requires.deploys:
        raise ModelError(f"{spec}: the card's head names a loss that deploys nothing", got=head["loss"])
    module = kind.rebuild(build_model(arch, **shape, seed=0), head["settings"])
    fit_state_dict(module, state, f"{spec} ({arch} with {head['loss']})")
    return module.eval()


def _pretrained(spec: str, arch: str, asked: Asked) -> LoadedModel:
    module, card = external.pretrained(arch)
    _agree(f"{spec}: the library's weights have", asked, card, hint=f"give a file: {arch}@FILE")
    return LoadedModel(module=module.eval(), card=card, spec=spec, path=None, sha256=None)


def _agree(who: str, asked: Asked, card: ModelCard, *, hint: str | None = None) -> None:
    for what, want, has in (("classes", asked[0], card.num_classes), ("channels", asked[1], card.input_size[0])):
        if want is not None and want != has:
            raise ModelError(f"{who} {has} {what}, the task has {want}", hint=hint)


def _assemble(
    arch: str, asked: Asked, state: State | None, source: str, seed: int | None
) -> tuple[ModelCard, nn.Module]:
    """Network and card for an architecture without a card; sizes from `asked`, else the file, else the default."""
    classes, channels, side = asked
    if state is not None:
        found_classes, found_channels = infer_sizes(arch, state, channels, side)
        if classes is not None and found_classes not in (None, classes):
            raise WeightsError(
                f"weights {source}: the file's classifier has {found_classes} classes, "
                f"the architecture was asked for {classes}"
            )
        if channels is not None and found_channels not in (None, channels):
            raise WeightsError(
                f"weights {source}: the file takes {found_channels}-channel images, "
                f"the architecture was asked for {channels}"
            )
        classes, channels = classes or found_classes, channels or found_channels
    default_channels, default_side = names.default_input(arch, channels)
    channels, side = channels or default_channels, side or external.default_size(arch) or default_side
    shape = {"num_classes": classes or names.default_classes(arch), "in_channels": channels, "image_size": side}
    module = build_model(arch, **shape, seed=seed) if state is None else _fitted(arch, state, source, **shape)
    mean, std, assumed = normalisation.guess(arch, channels, side, shape["num_classes"], module)
    card = ModelCard(
        arch=arch,
        num_classes=shape["num_classes"],
        input_size=(channels, side, side),
        mean=mean,
        std=std,
        extra={"assumed": assumed},
    )
    return card, module


def infer_sizes(
    arch: str, state: State, in_channels: int | None, image_size: int | None
) -> tuple[int | None, int | None]:
    """(classes, channels) that a state dict was made for, read off the last linear and the first convolution."""
    channels, side = names.default_input(arch, in_channels)
    with torch.device("meta"):
        template = build_model(
            arch,
            num_classes=names.default_classes(arch),
            in_channels=in_channels or channels,
            image_size=image_size or side,
        )
    state = align_keys(template, state)
    convs = [n for n, m in template.named_modules() if isinstance(m, nn.Conv2d)]
    linears = [n for n, m in template.named_modules() if isinstance(m, nn.Linear)]
    first = state.get(f"{convs[0]}.weight") if convs else None
    last = state.get(f"{linears[-1]}.weight") if linears else None
    return (
        None if last is None or last.ndim != 2 else int(last.shape[0]),
        None if first is None or first.ndim != 4 else int(first.shape[1]),
    )


def _fitted(arch: str, state: State, source: str, **shape: int) -> nn.Module:
    module = build_model(arch, **shape, seed=0)  # the values are overwritten; the seed keeps the global RNG untouched
    aligned = align_keys(module, state)
    hint = None
    if any(mismatches(module, aligned).values()):
        classes = infer_sizes(arch, state, shape["in_channels"], shape["image_size"])[0]
        if classes is not None and classes != shape["num_classes"]:
            raise WeightsError(
                f"weights {source}: the file's classifier has {classes} classes, "
                f"the architecture was asked for {shape['num_classes']}"
            )
        first = next((v for v in state.values() if v.ndim == 4), None)  # of the first convolution: (out, in, k, k)
        fits = architectures_that_fit(state, **{**shape, **({} if first is None else {"in_channels": first.shape[1]})})
        hint = f"the file fits {' or '.join(repr(n) for n in fits[:3])}; use that architecture" if fits else None
    fit_state_dict(module, aligned, f"{source} ({arch})", hint=hint)
    return module.eval()


def architectures_that_fit(state: State, **shape: int) -> list[str]:
    """Names of the own architectures whose every tensor `state` fills (tried without allocating memory)."""
    fits = []
    for name in names.ARCHITECTURES:
        try:
            with torch.device("meta"):
                template = build_model(name, **shape)
        except ModelError:  # this one cannot take such images, so it is no candidate
            continue
        if not any(mismatches(template, align_keys(template, state)).values()):
            fits.append(name)
    return fits
