"""A network as a function of one flat parameter vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class FlatNetwork:
    """`network(theta, images)` with theta (P,) in the order of `network.parameters()`; always in train mode."""

    def __init__(self, network: nn.Module):
        self.module = network.train().requires_grad_(False)
        named = list(network.named_parameters())
        self._names = [name for name, _ in named]
        self._shapes = [p.shape for _, p in named]
        self._sizes = [p.numel() for _, p in named]
        self.size = sum(self._sizes)

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        # one split, not P slices: its backward is a single concatenation
        parts = theta.split(self._sizes)
        weights = {n: p.view(shape) for n, p, shape in zip(self._names, parts, self._shapes, strict=True)}
        return torch.func.functional_call(self.module, weights, (images,))


def flattened(network: nn.Module) -> Tensor:
    """A copy of all parameters as one vector (P,) on the network's device (never a view of them)."""
    return torch.cat([p.detach().flatten() for p in network.parameters()])
