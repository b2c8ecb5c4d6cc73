"""Feature maps inside networks: the stages of a classifier, and those of a generator.

Source: method card `dfkd` 2.15 and 9 (skgyu/SpaceshipNet@30a76b0). There every network returns its maps itself; here
they are read from any classifier while a context is open, so nothing stays attached.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from synthkit.errors import ModelError
from synthkit.models.generators import Generator
from synthkit.models.view import ModelView

_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass
class StageMaps:
    """What one forward pass left behind."""

    stages: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """(B, C, h, w) by (h, w): the last map of every spatial size."""
    last: Tensor | None = None
    """The last map of all, which the classifier looks at (through a pooling)."""
    feature: Tensor | None = None
    """(B, D): input of the classifier."""


@contextlib.contextmanager
def stage_maps(view: ModelView) -> Iterator[StageMaps]:
    """The maps of the forward pass that runs while the context is open; they are part of its graph.

    Stages are the last of the network's `tap_points` at every spatial size (ResNets: layer1 to layer4), and the last
    map; a network without tap points has the last output of every size. Outputs of pooling layers are no stages.
    """
    found = StageMaps()
    taps = set(getattr(view.module, "tap_points", ()))

    def keep(tap: bool, leaf: bool):
        def hook(layer: nn.Module, args: tuple, out: object) -> None:
            if isinstance(out, Tensor) and out.ndim == 4 and not isinstance(layer, _POOLING):
                if tap or not taps:
                    found.stages[out.shape[2], out.shape[3]] = out
                if leaf:
                    found.last = out

        return hook

    def feed(layer: nn.Module, args: tuple) -> None:
        found.feature = args[0].flatten(1)

    handles = [view.classifier.register_forward_pre_hook(feed)]
    for name, layer in view.module.named_modules():
        tap, leaf = name in taps, not any(True for _ in layer.children())
        if tap or leaf:
            handles.append(layer.register_forward_hook(keep(tap, leaf)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    if found.last is not None:
        found.stages[found.last.shape[2], found.last.shape[3]] = found.last


def generator_cuts(generator: Generator) -> list[int]:
    """Places in `generator.main` behind which a feature map lies: its first BatchNorm, then every LeakyReLU.

    Raises:
        ModelError: the generator paints outside [0, 1] or has no such layers.
    """
    layers = list(generator.main)  # type: ignore[arg-type]  # a Sequential in all our generators
    cuts = [i + 1 for i, layer in enumerate(layers) if isinstance(layer, nn.LeakyReLU)]
    if not generator.bounded or not cuts or not isinstance(layers[0], nn.BatchNorm2d):
        raise ModelError(
            "this generator has no feature maps to exchange", hint="use --method.generator small, large or cud"
        )
    return [1, *cuts]


def generate_with_maps(generator: Generator, z: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Images (B, C, H, W) in [0, 1] of the latents, and the generator's feature maps from coarse to fine."""
    x, maps, start = generator.project(z), [], 0
    for cut in generator_cuts(generator):
        x = generator.main[start:cut](x)  # type: ignore[index]  # a Sequential
        maps.append(x)
        start = cut
    return generator.main[start:](x), maps  # type: ignore[index]


def decode(generator: Generator, maps: Tensor, depth: int) -> Tensor:
    """Images of feature maps of stage `depth` (0 is the coarsest), through the rest of the generator."""
    return generator.main[generator_cuts(generator)[depth] :](maps)  # type: ignore[index]
