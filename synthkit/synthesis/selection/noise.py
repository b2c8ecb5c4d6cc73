"""Noise: uniform random pixels, the lower control of every comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from synthkit.lazy import torch
from synthkit.synthesis.base import Makes, Requires
from synthkit.synthesis.selection.loop import SelectionConfig, SelectionLoop

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NoiseConfig(SelectionConfig):
    """Uniform noise; there is nothing to tune."""


class Noise(SelectionLoop):
    """Images whose pixels are independent and uniform, labelled by the teacher where there is one.

    x ~ U{0, ..., 255}^(C x H x W), y = argmax t(x).

    Shapes: images uint8 (B, C, H, W); logits (B, K). Size and classes are the teacher's, else those of `--data`
        (whose pixels are not looked at).
    Source: the "random noise" transfer set that data-free distillation is compared with (DAFL, Chen et al., ICCV 2019,
        arXiv 1904.01186); no code was taken.
    Differs from source: uniform bytes, where papers draw normal noise in the teacher's normalised space.
    Cost: one forward pass of the teacher per image; O(batch) memory.
    """

    requires: ClassVar[Requires] = Requires(teacher=False, grad=False, shardable=True, curriculum=False)
    makes: ClassVar[Makes] = Makes(label_kind="argmax")
    Config: ClassVar[type] = NoiseConfig
    config: NoiseConfig

    def rows(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Uniform bytes of the stream of row `start`: (count, C, H, W), and no labels."""
        shape = (count, *self.task.image_spec.shape)
        pixels = self.task.numpy_rng("noise", start).bytes(math.prod(shape))
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape), None
