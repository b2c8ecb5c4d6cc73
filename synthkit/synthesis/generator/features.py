"""Features of images at a network's layers, and a bank of those of earlier images (CMI).

Source: zju-vipa/CMI@9e79fa9 `datafree/hooks.py`, `datafree/synthesis/contrastive.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from synthkit.errors import RequirementError
from synthkit.lazy import torch
from synthkit.synthesis.base import widened

if TYPE_CHECKING:
    from torch import Tensor, nn

    from synthkit.models.view import ModelView


def tap_layers(view: ModelView, taps: Literal["bn", "stages"]) -> list[nn.Module]:
    """Layers whose inputs describe an image: every BatchNorm, or the stages `layer1`, `layer2`, ... of a ResNet.

    A network without BatchNorm is tapped at its convolutions and linear layers but the first, whose input is the image.

    Raises:
        RequirementError: the network has no such stages, or nothing to tap.
    """
    module = view.module
    if taps == "stages":
        layers = [child for name, child in module.named_children() if name.startswith(("layer", "block"))]
        if not layers:
            raise RequirementError(f"{view.name} has no stages layer1, layer2, ...", hint="use --method.taps bn")
        return layers
    if view.has_batchnorm:
        return [*view.batchnorms()]
    inner = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)][1:]
    if not inner:
        raise RequirementError(f"{view.name} has one layer only: it has no features inside")
    return [*inner]


@contextlib.contextmanager
def instance_means(layers: list[nn.Module]) -> Iterator[Callable[[], Tensor]]:
    """While open, a function gives the features (B, D) of the latest forward: spatial means of the layers' inputs,
    joined, with gradient. Nothing stays attached."""
    found: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found[layer] = widened(arguments[0]).flatten(2).mean(2) if arguments[0].ndim > 2 else widened(arguments[0])

    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        yield lambda: torch.cat([found[layer] for layer in layers], dim=1)
    finally:
        for handle in handles:
            handle.remove()


class FeatureBank:
    """The newest `size` rows of (., width) features, in CPU memory."""

    def __init__(self, size: int, width: int):
        self.rows = torch.empty(size, width)  # untouched, hence unpaid, until features come
        self.added = 0

    @property
    def filled(self) -> int:
        """Rows that hold features."""
        return min(self.added, len(self.rows))

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Up to `count` different rows, uniformly."""
        return self.rows[torch.randperm(self.filled, generator=rng)[:count]]

    def add(self, features: Tensor) -> None:
        """Write rows over the oldest ones."""
        size = len(self.rows)
        place = (self.added + torch.arange(len(features))) % size
        self.rows[place] = features.detach().to(self.rows)
        self.added += len(features)

    def state(self) -> dict[str, Any]:
        """The filled rows and how many were ever added."""
        return {"rows": self.rows[: self.filled], "added": self.added}

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self.added = int(state["added"])
        self.rows[: self.filled] = state["rows"]
