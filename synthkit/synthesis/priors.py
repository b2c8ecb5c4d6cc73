"""Image priors: how smooth and how large pixels are. Pure functions of (B, C, H, W) pixels; each returns a scalar.

Source: NVlabs/DeepInversion@2413af1 `deepinversion.py:get_image_prior_losses`; zju-vipa/CMI@9e79fa9
`datafree/criterions.py`. The four neighbours of a pixel are the right, the lower and both lower diagonal ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def shifted_differences(pixels: Tensor) -> list[Tensor]:
    """Differences to the right, lower, lower left and lower right neighbour."""
    left, right = pixels[..., :-1], pixels[..., 1:]
    return [
        right - left,
        pixels[..., 1:, :] - pixels[..., :-1, :],
        left[..., 1:, :] - right[..., :-1, :],
        right[..., 1:, :] - left[..., :-1, :],
    ]


def tv_l2(pixels: Tensor) -> Tensor:
    """Sum of the four norms ||difference||_2 over the whole batch (so it grows with the root of the batch)."""
    return torch.stack([torch.linalg.vector_norm(d) for d in shifted_differences(pixels)]).sum()


def tv_l1(pixels: Tensor) -> Tensor:
    """Sum of the four means of |difference|."""
    return torch.stack([d.abs().mean() for d in shifted_differences(pixels)]).sum()


def l2_mean(pixels: Tensor) -> Tensor:
    """mean_i ||x_i||_2."""
    return torch.linalg.vector_norm(pixels.flatten(1), dim=1).mean()


def l2_batch(pixels: Tensor) -> Tensor:
    """||x||_2 of the whole batch."""
    return torch.linalg.vector_norm(pixels)
