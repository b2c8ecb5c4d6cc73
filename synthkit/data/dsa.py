"""Differentiable siamese augmentation (DSA): random transforms as records that can be replayed on any batch.

`draw` takes every random number of one call from an explicit generator and keeps it in a `DSARecord`; `apply` is then a
pure, differentiable function of images and record. The images live in training space (normalised or whitened pixels):
nothing is clamped and vacated pixels become 0. Method card `matching` 1.4 and 10.3.

With u ~ U(0, 1), independent per image, or one for all images of a siamese record:

- color: brightness x + (u - 1/2); saturation m + 2u (x - m), m the mean over channels; contrast m + (u + 1/2) (x - m),
  m the mean over channels and pixels; in this order
- crop: y[i, j] = x[i + a, j + b], a and b integers in [-s, s], s = floor(side / 8 + 1/2)
- cutout: a square of side floor(side / 2 + 1/2), centred anywhere, clipped at the border
- flip: left to right with probability 1/2
- scale: each axis of the sampling grid times U(1/1.2, 1.2); below 1 zooms in
- rotate: the grid turned by U(-15, 15) degrees

Source: DSA (Zhao and Bilen, ICML 2021, arXiv 2102.08259), VICO-UoE/DatasetCondensation@53f63a6 utils.py.
Differs from source: a record is drawn once and shared, where the source seeds the global generator again before every
    call and hopes that the first number drawn does not hang on the batch size.
Cost: one pass over the batch per transform; scale and rotate sample bilinearly, the others are elementwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from synthkit.errors import ConfigError

FAMILIES = ("color", "crop", "cutout", "flip", "scale", "rotate")
STRATEGY = "_".join(FAMILIES)
"""What the literature uses, but for digits."""
DIGITS_STRATEGY = "color_crop_cutout_scale_rotate"
"""The same without the mirror, which turns one digit into no digit or another."""

CROP_SHARE, CUTOUT_SHARE, SCALE, ROTATION_DEGREES = 0.125, 0.5, 1.2, 15.0


@dataclass(frozen=True)
class DSARecord:
    """What one call does: the transforms in order, each with its raw random numbers.

    Attributes: `ops`, pairs (name of `OPS`, draws), each draw a tensor (n,) with n = 1 for a siamese record, which
    fits any batch, or one number per image; `side` of the images that it was drawn for.
    """

    ops: tuple[tuple[str, tuple[Tensor, ...]], ...]
    side: int

    def to(self, device: torch.device | str) -> DSARecord:
        """The same record on `device`."""
        moved = ((name, tuple(d.to(device, non_blocking=True) for d in draws)) for name, draws in self.ops)
        return DSARecord(tuple(moved), self.side)


def default_strategy(class_names: Sequence[str]) -> str:
    """The strategy of the literature for data with these classes: no mirror where the classes are the ten digits."""
    return DIGITS_STRATEGY if sorted(class_names) == [str(digit) for digit in range(10)] else STRATEGY


def families(strategy: str) -> tuple[str, ...]:
    """The families that a strategy such as "color_crop_rotate" names; none for "none".

    Raises:
        ConfigError: an unknown family, or one named twice.
    """
    names = () if strategy in ("", "none") else tuple(strategy.lower().replace(",", "_").split("_"))
    for name in names:
        if name not in FAMILIES:
            raise ConfigError("dsa: not a family of transforms", got=name, allowed=FAMILIES)
    if len(set(names)) < len(names):
        raise ConfigError("dsa: a family is named twice", got=strategy)
    return names


def draw(
    strategy: str,
    count: int,
    side: int,
    generator: torch.Generator,
    *,
    siamese: bool,
    mode: Literal["S", "M"] = "S",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> DSARecord:
    """Draw the transforms of one batch of `count` square images.

    Args:
        strategy: families joined by "_".
        side: height and width of the images in pixels.
        generator: source of all random numbers; the record does not depend on the device it is moved to.
        siamese: one draw for all images, so that the record fits batches of any size (`count` is not used).
        mode: S takes one family at random for the whole batch, M applies all of them in order.
        device: where the record goes; none leaves it on the generator's device.
        dtype: of the real numbers drawn.

    Raises:
        ConfigError: unknown family or mode.
    """
    names = families(strategy)
    if mode not in ("S", "M"):
        raise ConfigError("dsa: not a mode", got=mode, allowed=("S", "M"))
    if mode == "S" and names:
        names = (names[int(torch.randint(len(names), (), generator=generator, device=generator.device))],)
    n = 1 if siamese else count

    def uniform() -> Tensor:
        return torch.rand(n, generator=generator, device=generator.device, dtype=dtype)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (n,), generator=generator, device=generator.device)

    ops: list[tuple[str, tuple[Tensor, ...]]] = []
    for name in names:
        if name == "color":
            ops += [(part, (uniform(),)) for part in ("brightness", "saturation", "contrast")]
        elif name == "crop":
            shift = int(side * CROP_SHARE + 0.5)
            ops.append((name, (integers(-shift, shift + 1), integers(-shift, shift + 1))))
        elif name == "cutout":
            centres = side + 1 - _cutout_side(side) % 2  # an even square may be centred on the far border as well
            ops.append((name, (integers(0, centres), integers(0, centres))))
        else:
            ops.append((name, (uniform(), uniform()) if name == "scale" else (uniform(),)))
    record = DSARecord(tuple(ops), side)
    return record if device is None else record.to(device)


def apply(images: Tensor, record: DSARecord) -> Tensor:
    """The images transformed as the record says: differentiable in the images, any number of times.

    Args:
        images: float (B, C, side, side); B is free for a siamese record, else the count it was drawn for.

    Raises:
        ConfigError: the images do not fit the record.
    """
    if images.shape[2:] != (record.side, record.side):
        raise ConfigError(f"dsa: the record is for images of side {record.side}", got=tuple(images.shape))
    for name, draws in record.ops:
        if len(draws[0]) not in (1, len(images)):
            raise ConfigError(f"dsa: the record is for {len(draws[0])} images", got=tuple(images.shape))
        images = OPS[name](images, *draws)
    return images


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """(n,) as (n, 1, 1, 1) in the dtype of the images."""
    return values.to(like.dtype).view(-1, 1, 1, 1)


def brightness(x: Tensor, u: Tensor) -> Tensor:
    """x + (u - 1/2)."""
    return x + (_wide(u, x) - 0.5)


def saturation(x: Tensor, u: Tensor) -> Tensor:
    """m + 2u (x - m), m the mean over channels."""
    mean = x.mean(1, keepdim=True)
    return mean + (x - mean) * (2.0 * _wide(u, x))


def contrast(x: Tensor, u: Tensor) -> Tensor:
    """m + (u + 1/2) (x - m), m the mean over channels and pixels."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (_wide(u, x) + 0.5)


def crop(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """y[i, j] = x[i + down, j + right], 0 outside."""
    batch, channels, height, width = x.shape
    rows = down[:, None] + torch.arange(height, device=x.device)
    columns = right[:, None] + torch.arange(width, device=x.device)
    outside = ((rows < 0) | (rows >= height))[:, :, None] | ((columns < 0) | (columns >= width))[:, None, :]
    index = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    index = index.view(-1, 1, height * width).expand(batch, channels, -1)
    taken = x.reshape(batch, channels, -1).gather(2, index).view(x.shape)
    return taken.masked_fill(outside[:, None], 0.0)


def _cutout_side(side: int) -> int:
    return int(side * CUTOUT_SHARE + 0.5)


def cutout(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """0 in a square around (row, column); clipped indices leave at least the border line of it."""

    def within(centre: Tensor, side: int) -> Tensor:
        size = _cutout_side(side)
        first = centre - size // 2
        low, high = first.clamp(0, side - 1), (first + size - 1).clamp(0, side - 1)
        at = torch.arange(side, device=x.device)
        return (at >= low[:, None]) & (at <= high[:, None])

    hole = within(row, x.shape[2])[:, :, None] & within(column, x.shape[3])[:, None, :]
    return x.masked_fill(hole[:, None], 0.0)


def flip(x: Tensor, u: Tensor) -> Tensor:
    """Mirrored left to right where u < 1/2."""
    return torch.where((u < 0.5).view(-1, 1, 1, 1), x.flip(3), x)


def scale(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The sampling grid times 1/1.2 + u (1.2 - 1/1.2) along x, and with v along y."""
    across, along = (1 / SCALE + w * (SCALE - 1 / SCALE) for w in (u, v))
    zero = torch.zeros_like(across)
    return _warp(x, across, zero, zero, along)


def rotate(x: Tensor, u: Tensor) -> Tensor:
    """The sampling grid turned by (2u - 1) 15 degrees."""
    angle = (u - 0.5) * (2 * math.radians(ROTATION_DEGREES))
    return _warp(x, angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def _warp(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Sample at [[a, b], [c, d]] p for every output position p in [-1, 1]^2 (bilinear, 0 outside)."""
    zero = torch.zeros_like(a)
    matrix = torch.stack([torch.stack([a, b, zero], 1), torch.stack([c, d, zero], 1)], 1).to(x.dtype)
    grid = F.affine_grid(matrix, [len(a), *x.shape[1:]], align_corners=False)
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), "bilinear", "zeros", align_corners=False)


OPS: dict[str, Callable[..., Tensor]] = {
    "brightness": brightness,
    "saturation": saturation,
    "contrast": contrast,
    "crop": crop,
    "cutout": cutout,
    "flip": flip,
    "scale": scale,
    "rotate": rotate,
}
