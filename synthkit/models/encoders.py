"""Encoders: images in, a distribution of latents out.

Source: kuluhan/PRE-DFKD@604010d `networks/generator.py` (method card `dfkd` 2.9), rebuilt from its layer list.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from synthkit.errors import ModelError
from synthkit.models.init import seeded, uniform_init


class VAEEncoder(nn.Module):
    """`forward(x)`: images (B, channels, image_size, image_size) -> (mu, log variance), each (B, latent_dim).

    Conv 3x3, BN, LeakyReLU twice, every second pixel, strided conv, BN, every second pixel, two linear heads. Columns
    of the images are scaled to unit length first, so brightness of a column is not seen. PRE-DFKD feeds images in the
    teacher's normalised space. Weights start in U(-0.08, 0.08).

    Args:
        width: channels of the first convolution (published: 64); the others have twice as many.
        seed: seed of the weights; none draws from torch's global generator.

    Raises:
        ModelError: a size that three halvings cannot divide.
    """

    def __init__(self, *, latent_dim: int, image_size: int, channels: int, width: int = 64, seed: int | None = None):
        super().__init__()
        if image_size % 8 or image_size < 8:
            raise ModelError(
                "encoder: the image side must be a multiple of 8",
                got=image_size,
                hint="resize the images, or use a method without an encoder",
            )
        wide = 2 * width
        with seeded(seed):
            self.first = nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1),
                nn.BatchNorm2d(width, eps=0.8),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Conv2d(width, wide, 3, padding=1),
                nn.BatchNorm2d(wide, eps=0.8),
                nn.LeakyReLU(0.2, inplace=True),
            )
            self.second = nn.Sequential(nn.Conv2d(wide, wide, 3, stride=2, padding=1), nn.BatchNorm2d(wide))
            self.mu = nn.Linear(wide * (image_size // 8) ** 2, latent_dim)
            self.log_var = nn.Linear(wide * (image_size // 8) ** 2, latent_dim)
            uniform_init(self, 0.08)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents."""
        x = self.first(torch.nn.functional.normalize(x, dim=2))
        x = self.second(x[:, :, ::2, ::2])[:, :, ::2, ::2].flatten(1)
        return self.mu(x), self.log_var(x)
