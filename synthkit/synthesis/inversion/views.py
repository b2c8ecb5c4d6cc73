"""Views of pixels under optimisation: random resized crop, then roll, then flip; one draw per batch or per image.

A draw is a handful of numbers from an explicit generator; applying it is differentiable, deterministic on every
device, and one pair of small matrix products (crops, draws per image) or a roll and a flip (draws per batch).

Source: NVlabs/DeepInversion@2413af1 (roll, flip); VILA-Lab/SRe2L@8d00cba (crop by torchvision's RandomResizedCrop,
called once on the batch). Crop sizes are drawn as torchvision draws them; the resampling is bilinear like its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

RATIO = (3 / 4, 4 / 3)
"""Range of the aspect ratio of a crop."""
ATTEMPTS = 10
"""Draws of a crop before the whole image is taken."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """Draws of n views (n = 1: one for the whole batch, else one per image), as numpy arrays (n,)."""

    roll: np.ndarray
    """(n, 2) rows and columns by which the view is rolled."""
    flip: np.ndarray
    """(n,) bool."""
    box: np.ndarray | None = None
    """(n, 4) top, left, height, width of the crop in pixels; none is the whole image."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """The views of `pixels` (B, C, H, W), same shape, dtype and memory format."""
        if self.box is None and len(self.roll) == 1:
            rows, columns = map(int, self.roll[0])
            view = pixels.roll((rows, columns), (2, 3)) if rows or columns else pixels
            return view.flip(3) if self.flip[0] else view
        height, width = pixels.shape[2:]
        box = np.tile([0, 0, height, width], (len(self.roll), 1)) if self.box is None else self.box
        unmoved = np.zeros(len(self.flip), bool)
        down = torch.from_numpy(resampling(height, box[:, 0], box[:, 2], self.roll[:, 0], unmoved)).to(pixels)
        across = torch.from_numpy(resampling(width, box[:, 1], box[:, 3], self.roll[:, 1], self.flip)).to(pixels)
        return torch.matmul(torch.matmul(down[:, None], pixels), across[:, None].mT).contiguous(
            memory_format=torch.channels_last
            if pixels.is_contiguous(memory_format=torch.channels_last)
            else torch.contiguous_format  # fmt: skip
        )


def draw_views(
    rng: np.random.Generator,
    count: int,
    size: tuple[int, int],
    *,
    jitter: int = 0,
    flip: bool = False,
    smallest: float | None = None,
) -> Views:
    """Draw `count` views of images of `size` (H, W): rolls uniform in [-jitter, jitter], crops of at least `smallest`
    of the area (none: no crop)."""
    roll = rng.integers(-jitter, jitter + 1, (count, 2)) if jitter else np.zeros((count, 2), np.int64)
    mirrored = rng.random(count) < 0.5 if flip else np.zeros(count, bool)
    return Views(roll=roll, flip=mirrored, box=None if smallest is None else crop_boxes(rng, count, size, smallest))


def crop_boxes(rng: np.random.Generator, count: int, size: tuple[int, int], smallest: float) -> np.ndarray:
    """(count, 4) top, left, height, width: area share uniform in [smallest, 1], aspect ratio log-uniform in `RATIO`.

    The first of ten draws that fits is taken, else the whole image.
    """
    height, width = size
    area = height * width * rng.uniform(smallest, 1.0, (count, ATTEMPTS))
    ratio = np.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1]), (count, ATTEMPTS)))
    w, h = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = np.arange(count), fits.argmax(1)
    h, w = np.where(fits.any(1), h[first], height), np.where(fits.any(1), w[first], width)
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    return np.stack([top, left, h, w], 1)


def resampling(size: int, start: np.ndarray, extent: np.ndarray, roll: np.ndarray, flip: np.ndarray) -> np.ndarray:
    """(n, size, size) weights M: output i = sum_k M[i, k] input k, along one axis.

    The stretch [start, start + extent) is spread over the whole axis (bilinear, pixel centres, its own border
    repeated), rolled by `roll` (output i is element i - roll), then mirrored where `flip`.
    """
    out = np.arange(size)
    place = np.where(flip[:, None], out[::-1], out)
    place = (place - roll[:, None]) % size
    at = (place + 0.5) * (extent / size)[:, None] - 0.5
    at = np.clip(at, 0, (extent - 1)[:, None])
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, (extent - 1)[:, None])
    weights = np.zeros((len(roll), size, size))
    rows = np.arange(len(roll))[:, None], out[None]
    np.add.at(weights, (*rows, low + start[:, None]), 1 - (at - low))
    np.add.at(weights, (*rows, high + start[:, None]), at - low)
    return weights
