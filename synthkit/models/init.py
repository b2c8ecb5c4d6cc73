"""Initialisers shared by the families, and a fence around torch's global random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw the weights of the modules built inside from `seed`; the global CPU generator is put back afterwards.

    torch's default initialisers know no explicit generator, hence the fence. With `seed=None` nothing is done and the
    modules draw from the global generator, as in plain torch.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def dcgan_init(module: nn.Module) -> None:
    """In place: conv and linear weights N(0, 0.02), BN weights N(1, 0.02), all biases 0."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(m.weight, 0.0, 0.02)
        elif isinstance(m, nn.BatchNorm2d) and m.affine:
            nn.init.normal_(m.weight, 1.0, 0.02)
        else:
            continue
        if m.bias is not None:
            nn.init.zeros_(m.bias)


def fan_out_normal_init(
    module: nn.Module, *, linear_std: float | None = None, linear_bias: float | None = None
) -> None:
    """In place: conv weights N(0, sqrt(2 / (k k out))) with k k out the fan-out, conv biases 0, BN 1/0.

    Args:
        linear_std: std of the linear weights; none leaves torch's default.
        linear_bias: constant of the linear biases; none leaves torch's default.
    """
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            spread = (2.0 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)) ** 0.5
            nn.init.normal_(m.weight, 0.0, spread)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            if linear_std is not None:
                nn.init.normal_(m.weight, 0.0, linear_std)
            if linear_bias is not None:
                nn.init.constant_(m.bias, linear_bias)


def uniform_init(module: nn.Module, bound: float) -> None:
    """In place: conv and linear weights U(-bound, bound), their biases 0; BatchNorm stays as it is."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.uniform_(m.weight, -bound, bound)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
