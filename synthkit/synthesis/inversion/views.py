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

from synthkit.lazy import np, torch

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
        drawn = np.concatenate([box, self.roll, self.flip[:, None]], 1).T
        top, left, h, w, rows, columns, flip = torch.from_numpy(drawn).to(pixels.device, pixels.dtype)
        down = resampling(height, top, h, rows, torch.zeros_like(flip))
        across = resampling(width, left, w, columns, flip)
        channels_last = pixels.is_contiguous(memory_format=torch.channels_last)
        memory = torch.channels_last if channels_last else torch.contiguous_format
        return torch.matmul(torch.matmul(down[:, None], pixels), across[:, None].mT).contiguous(memory_format=memory)


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


def resampling(size: int, start: Tensor, extent: Tensor, roll: Tensor, flip: Tensor) -> Tensor:
    """(n, size, size) weights M along one axis: output i = sum_k M[i, k] input k; the arguments are (n,) floats.

    The stretch [start, start + extent) is spread over the whole axis (bilinear, pixel centres, its own border
    repeated), rolled by `roll` (output i is element i - roll), then mirrored where `flip` is 1.
    """
    out = torch.arange(size, dtype=start.dtype, device=start.device)
    start, extent, roll, flip = (v[:, None] for v in (start, extent, roll, flip))
    place = (torch.lerp(out, size - 1 - out, flip) - roll) % size
    at = (((place + 0.5) * (extent / size) - 0.5).clamp(min=0).minimum(extent - 1) + start)[:, :, None]
    return (1 - (at - out).abs()).clamp(min=0)
