"""Random resized crops, shuffled patches, mixup and CutMix of a batch, as the post-training of distilled banks uses.

Mixed images have no label of their own: the teacher scores the mixed image (kd.md 2.23, largescale.md 1), and a hard
label that goes with it is that of the image that was there first. Pixel space, shapes and generators as in augment.py.
Cost: as augment.py; a resized crop takes about twice the time of crop_flip, mixing a third of it.

Source: VILA-Lab/SRe2L@8d00cba364bf (`utils_fkd.py`) and LINs-lab/RDED@3f6453d8b18b (`ShufflePatches`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from synthkit.bank.labels.views import RATIO, beta_quantile, crop_views, cutmix_boxes, random_crops

CUTMIX_ALPHA = 1.0
MIXUP_ALPHA = 0.8
Scale = tuple[float, float]


def _numbers(shape: tuple[int, ...], generator: torch.Generator) -> np.ndarray:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).cpu().numpy()


def _like(values: Tensor, images: Tensor) -> Tensor:
    """float32 pixels in [0, 1] as the images are stored."""
    if images.dtype == torch.uint8:
        return values.mul(255).round_().clamp_(0, 255).to(torch.uint8)
    return values.to(images.dtype)


def resized_crop_flip(
    images: Tensor, generator: torch.Generator, *, scale: Scale = (0.08, 1.0), size: tuple[int, int] | None = None
) -> Tensor:
    """Every image cropped (torchvision's RandomResizedCrop, antialiased), resized to `size`, half of them mirrored."""
    height, width = images.shape[2:]
    drawn = _numbers((len(images), 23), generator)
    crop = random_crops(drawn[:, :22], (height, width), scale, RATIO)
    return _like(crop_views(images, crop, drawn[:, 22] < 0.5, size or (height, width)), images)


def permute_strips(images: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Column strips, then row strips of every image in a new order; what does not divide is cut off.

    Args:
        images: (B, C, H, W). columns, rows: (B, f) int64, new strip i is old strip `columns[:, i]`.

    Returns:
        (B, C, H // f * f, W // f * f).
    """
    batch, channels, height, width = images.shape
    parts = columns.shape[1]
    high, wide = height // parts, width // parts
    x = (columns[:, :, None] * wide + torch.arange(wide, device=images.device)).view(batch, 1, 1, -1)
    y = (rows[:, :, None] * high + torch.arange(high, device=images.device)).view(batch, 1, -1, 1)
    found = images.gather(3, x.expand(-1, channels, height, -1))
    return found.gather(2, y.expand(-1, channels, -1, parts * wide))


def shuffled_patches(images: Tensor, generator: torch.Generator, *, parts: int = 2) -> Tensor:
    """`permute_strips` in an order drawn for every image."""
    drawn = torch.rand((2, len(images), parts), generator=generator, device=generator.device)
    columns, rows = drawn.argsort(dim=2).to(images.device)
    return permute_strips(images, columns, rows)


def paste_box(images: Tensor, partner: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """CutMix: the box (top, left, bottom, right) of every image is that of image `partner` (B,) of the batch."""
    top, left, bottom, right = box
    out = images.clone()
    out[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    return out


def cutmix(images: Tensor, generator: torch.Generator, *, alpha: float = CUTMIX_ALPHA) -> Tensor:
    """CutMix with one share, one box and one permutation for the batch, as released."""
    partner = torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)
    drawn = _numbers((1, 3), generator)
    size = (images.shape[2], images.shape[3])
    top, left, bottom, right = cutmix_boxes(beta_quantile(drawn[:, 0], alpha), drawn[:, 1:], size)[0].tolist()
    return paste_box(images, partner, (top, left, bottom, right))


def blend(images: Tensor, partner: Tensor, share: float) -> Tensor:
    """mixup: `share` of every image and the rest of image `partner` (B,) of the batch."""
    mixed = images.float() * share + images[partner].float() * (1 - share)
    return mixed.round_().to(images.dtype) if images.dtype == torch.uint8 else mixed.to(images.dtype)


def mixup(images: Tensor, generator: torch.Generator, *, alpha: float = MIXUP_ALPHA) -> Tensor:
    """mixup with one share and one permutation for the batch, as released."""
    partner = torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)
    return blend(images, partner, float(beta_quantile(_numbers((1,), generator), alpha)[0]))
