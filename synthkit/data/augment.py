"""Batched augmentation on the device of the images, with every random number drawn from an explicit generator.

Pixel space in, pixel space out: uint8 or float in [0, 1], (B, C, H, W). The generator may live on the CPU while the
images are on a GPU; the same generator state then gives the same augmentation on every device.

Cost: one gather per call; crop_flip of 512x3x32x32 takes about 2 ms on one CPU thread.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from synthkit.data.policies import POLICIES, mixes
from synthkit.errors import ConfigError

SHIFT_PIXELS = 2
ROTATION_DEGREES = 15.0
SCALE_RANGE = 0.1
TRANSLATION = 0.1


def augment(images: Tensor, policy: str, generator: torch.Generator) -> Tensor:
    """Augment every image of a batch on its own.

    Args:
        images: (B, C, H, W), uint8 or float in [0, 1].
        policy: a name of `POLICIES`.
        generator: source of all random numbers; on the CPU or on the images' device.

    Returns:
        The same shape and dtype. `none` returns the tensor itself.

    Raises:
        ConfigError: the policy is unknown, or the images are not four-dimensional.
    """
    check_policy(policy)
    if images.ndim != 4:
        raise ConfigError("augment: images must be (B, C, H, W)", got=tuple(images.shape))
    if policy == "none" or len(images) == 0:
        return images
    if policy == "affine":
        return random_affine(images, generator)
    if policy == "shift":
        return _crop_flip(images, (SHIFT_PIXELS, SHIFT_PIXELS), False, generator)
    if policy.startswith(("rrc_flip", "patches_")) or mixes(policy):
        return _composed(images, policy, generator)
    pad = (0, 0) if policy == "flip" else (max(1, images.shape[2] // 8), max(1, images.shape[3] // 8))
    out = _crop_flip(images, pad, policy != "crop", generator)
    return cutout(out, generator) if policy == "crop_flip_cutout" else out


def _composed(images: Tensor, policy: str, generator: torch.Generator) -> Tensor:
    """Policies of several steps: where the pixels come from, then how images are mixed."""
    from synthkit.data import mixing  # reads the views of banks, which read augmented images

    size = (images.shape[2], images.shape[3])
    if policy.startswith("patches_"):
        images = mixing.shuffled_patches(images, generator)
        images = mixing.resized_crop_flip(images, generator, scale=(0.5, 1.0), size=size)
    elif policy.startswith("rrc_flip"):
        images = mixing.resized_crop_flip(images, generator, scale=(0.6 if policy == "rrc_flip_large" else 0.08, 1.0))
    else:
        images = augment(images, policy.removesuffix("_cutmix").removesuffix("_mixup"), generator)
    if policy.endswith("_cutmix"):
        return mixing.cutmix(images, generator)
    return mixing.mixup(images, generator) if policy.endswith("_mixup") else images


def check_policy(policy: str) -> str:
    """`policy` itself.

    Raises:
        ConfigError: not a known policy; the nearest one is offered.
    """
    if policy not in POLICIES:
        raise ConfigError("augment: not a known policy", got=policy, allowed=POLICIES)
    return policy


def _integers(high: int, count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, high, (count,), generator=generator, device=generator.device)
    return drawn.to(like.device, non_blocking=True)


def _uniform(low: float, high: float, count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.rand((count,), generator=generator, device=generator.device)
    return (low + (high - low) * drawn).to(like.device, non_blocking=True)


def _crop_flip(images: Tensor, pad: tuple[int, int], flip: bool, generator: torch.Generator) -> Tensor:
    """Zero-pad by (rows, columns), cut a random window of the old size, mirror half of them: one gather."""
    batch, channels, height, width = images.shape
    rows = _integers(2 * pad[0] + 1, batch, images, generator)
    columns = _integers(2 * pad[1] + 1, batch, images, generator)
    y = rows[:, None] + torch.arange(height, device=images.device)
    x = columns[:, None] + torch.arange(width, device=images.device)
    if flip:
        mirrored = _integers(2, batch, images, generator).bool()
        x = torch.where(mirrored[:, None], x.flip(1), x)
    padded = F.pad(images, (pad[1], pad[1], pad[0], pad[0])) if any(pad) else images
    index = (y[:, :, None] * padded.shape[3] + x[:, None, :]).view(batch, 1, height * width)
    flat = padded.reshape(batch, channels, -1).gather(2, index.expand(-1, channels, -1))
    return flat.view(batch, channels, height, width)


def cutout(images: Tensor, generator: torch.Generator) -> Tensor:
    """Set one square of half the side, centred anywhere, to the batch's channel means.

    Source: DeVries & Taylor 2017 (16x16 on CIFAR-10; the square may hang over the border). Differs from source: there
    the fill is 0 after normalisation, which is the data set's mean; pixel space has no such constant, so the mean of
    the batch stands for it.
    """
    batch, _, height, width = images.shape
    top = _integers(height, batch, images, generator)[:, None] - height // 4
    left = _integers(width, batch, images, generator)[:, None] - width // 4
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    in_y = (y >= top) & (y < top + height // 2)
    in_x = (x >= left) & (x < left + width // 2)
    hole = (in_y[:, :, None] & in_x[:, None, :])[:, None]
    mean = images.float().mean((0, 2, 3), keepdim=True)
    fill = mean.round().to(images.dtype) if images.dtype == torch.uint8 else mean.to(images.dtype)
    return torch.where(hole, fill, images)


def random_affine(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and translate by random amounts (bilinear, zero filled); the warp is kornia's.

    A point p goes to `c + m + s R(a) (p - c)`: c the centre, a in +-15 degrees (clockwise as one sees it), s in
    0.9 to 1.1, m in +-10 % of the side, each uniform.
    """
    from kornia.geometry.transform import warp_affine

    batch, _, height, width = images.shape
    angle = torch.deg2rad(_uniform(-ROTATION_DEGREES, ROTATION_DEGREES, batch, images, generator))
    scale = _uniform(1 - SCALE_RANGE, 1 + SCALE_RANGE, batch, images, generator)
    move_x = _uniform(-TRANSLATION, TRANSLATION, batch, images, generator) * width
    move_y = _uniform(-TRANSLATION, TRANSLATION, batch, images, generator) * height
    cos, sin = scale * angle.cos(), scale * angle.sin()
    x, y = (width - 1) / 2, (height - 1) / 2
    first = torch.stack([cos, -sin, x + move_x - cos * x + sin * y], 1)
    second = torch.stack([sin, cos, y + move_y - sin * x - cos * y], 1)
    warped = warp_affine(
        images.float(),
        torch.stack([first, second], 1),
        (height, width),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=True,
    )
    if images.dtype == torch.uint8:
        return warped.round_().clamp_(0, 255).to(torch.uint8)
    return warped.to(images.dtype)
