"""Augmentations of the distillation protocols beside DSA: DC's own, IDC's mixture, and CutMix. All batched.

Images live in training space (normalised or whitened) unless said otherwise; every number comes from an explicit
generator. Method card `matching` 1.4 (last paragraph) and 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from synthkit.data import dsa

CROP_PAD, SCALE, ROTATION_DEGREES, NOISE = 4, 0.2, 45, 0.001


def dc_augment(images: Tensor, ops: Sequence[str], generator: torch.Generator) -> Tensor:
    """DC's evaluation augmentation: for every image one of `ops` at random.

    crop: shifted by up to 4 pixels, vacated pixels get the channel's mean. scale: height and width times U(0.8, 1.2)
    each (nearest), zero around. rotate: a whole degree in [-45, 45), filled with the mean. noise: N(0, 0.001).

    Args:
        images: float (B, C, H, W).
        ops: of crop, scale, rotate, noise.

    Differs from source: on the device for the whole batch (there image by image on the CPU), and the rotation is
        bilinear instead of a cubic spline.
    """
    batch, _, height, width = images.shape
    draw = _Draws(batch, generator, images)
    chosen = draw.integers(0, len(ops))
    zero, one = draw.zeros(), draw.zeros() + 1
    angle, sx, sy, right, down, fill = zero, one, one, zero, zero, images.new_zeros(batch, images.shape[1], 1, 1)
    mean = images.mean((0, 2, 3)).view(1, -1, 1, 1)
    if "crop" in ops:
        here = chosen == ops.index("crop")
        right = torch.where(here, draw.integers(-CROP_PAD, CROP_PAD + 1) * 2.0 / width, right)
        down = torch.where(here, draw.integers(-CROP_PAD, CROP_PAD + 1) * 2.0 / height, down)
        fill = torch.where(here.view(-1, 1, 1, 1), mean, fill)
    if "scale" in ops:
        here = chosen == ops.index("scale")
        sx = torch.where(here, 1 / (1 - SCALE + 2 * SCALE * draw.uniform()), sx)
        sy = torch.where(here, 1 / (1 - SCALE + 2 * SCALE * draw.uniform()), sy)
    turned = chosen == (ops.index("rotate") if "rotate" in ops else -1)
    if "rotate" in ops:
        degrees = draw.integers(-ROTATION_DEGREES, ROTATION_DEGREES)
        angle = torch.where(turned, torch.deg2rad(degrees.float()), angle)
        fill = torch.where(turned.view(-1, 1, 1, 1), mean.mean(), fill)
    rows = [torch.stack([sx * angle.cos(), -sy * angle.sin(), right], 1)]
    rows.append(torch.stack([sx * angle.sin(), sy * angle.cos(), down], 1))
    grid = F.affine_grid(torch.stack(rows, 1).to(images.dtype), list(images.shape), align_corners=False)
    shifted = images - fill
    moved = F.grid_sample(shifted, grid, "nearest", "zeros", align_corners=False)
    if "rotate" in ops:
        smooth = F.grid_sample(shifted, grid, "bilinear", "zeros", align_corners=False)
        moved = torch.where(turned.view(-1, 1, 1, 1), smooth, moved)
    moved = moved + fill
    if "noise" in ops:
        noisy = (chosen == ops.index("noise")).view(-1, 1, 1, 1)
        moved = moved + torch.where(noisy, NOISE * draw.normal(images.shape), images.new_zeros(()))
    return moved


class _Draws:
    """Random numbers per image, drawn where the generator lives and moved to the images."""

    def __init__(self, count: int, generator: torch.Generator, like: Tensor):
        self.count, self.generator, self.like = count, generator, like

    def _moved(self, values: Tensor) -> Tensor:
        return values.to(self.like.device, non_blocking=True)

    def integers(self, low: int, high: int) -> Tensor:
        g = self.generator
        return self._moved(torch.randint(low, high, (self.count,), generator=g, device=g.device))

    def uniform(self) -> Tensor:
        return self._moved(torch.rand(self.count, generator=self.generator, device=self.generator.device))

    def normal(self, shape: Sequence[int]) -> Tensor:
        drawn = torch.randn(list(shape), generator=self.generator, device=self.generator.device)
        return self._moved(drawn).to(self.like.dtype)

    def zeros(self) -> Tensor:
        return torch.zeros(self.count, device=self.like.device)


def idc_augment(images: Tensor, strategy: str, generator: torch.Generator, *, cutout: bool) -> Tensor:
    """IDC's mixture of the DSA families of `strategy`: flip and colour, one of crop, scale and rotate, then cutout.

    Args:
        images: pixels in [0, 1], before normalisation; each image gets its own parameters.
        cutout: whether the last step is taken (off beside CutMix of probability below 1, as NCFM has it).

    Differs from source: its further family `translate` is not among those of a DSA strategy.
    """
    have = dsa.families(strategy)
    side, count = images.shape[-1], len(images)
    always = [name for name in ("flip", "color") if name in have]
    one_of = [name for name in ("crop", "scale", "rotate") if name in have]
    last = ["cutout"] if cutout and "cutout" in have else []
    modes: tuple[Literal["M", "S"], ...] = ("M", "S", "M")
    for names, mode in zip((always, one_of, last), modes, strict=True):
        record = dsa.draw("_".join(names), count, side, generator, siamese=False, mode=mode, device=images.device)
        images = dsa.apply(images, record)
    return images


def cutmix(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One box for the whole batch, pasted from another image; targets are mixed by the area that is left.

    With share s ~ U(0, 1) (beta 1) the box has sides floor(H sqrt(1 - s)) and floor(W sqrt(1 - s)), is centred anywhere
    and clipped at the border.

    Args:
        images: (B, C, H, W). targets: (B, K) class probabilities.

    Source: CutMix (Yun et al. 2019) as in IDC, snu-mllab/Efficient-Dataset-Condensation@ceac95a.
    """
    height, width = images.shape[2:]
    side = math.sqrt(1 - float(torch.rand((), generator=generator, device=generator.device)))
    place = torch.rand(2, generator=generator, device=generator.device).tolist()
    other = torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)
    tall, wide = int(height * side), int(width * side)
    row, column = int(place[0] * height), int(place[1] * width)
    top, bottom = max(row - tall // 2, 0), min(row + tall // 2, height)
    left, right = max(column - wide // 2, 0), min(column + wide // 2, width)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, kept * targets + (1 - kept) * targets[other]
