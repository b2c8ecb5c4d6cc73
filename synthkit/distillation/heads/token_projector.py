"""Logits from a map of tokens, through attention blocks: OFA's projector for ViT and MLP students."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthkit.errors import ConfigError

GRID = 7  # tokens per side after merging: that of a ViT's 14 x 14 after one merger
HEADS = 4


class Merger(nn.Module):
    """Neighbouring 2 x 2 tokens become one: (B, h, w, D) to (B, h/2, w/2, out)."""

    def __init__(self, dim: int, out: int, act: bool):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out, bias=False)
        self.act = nn.GELU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.act(self.reduction(self.norm(torch.cat(corners, dim=-1))))


class Block(nn.Module):
    """Pre-norm attention and a fourfold MLP, each with a residual sum: (B, N, D) to the same."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, count, 3, HEADS, dim // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, dim)
        x = x + self.proj(mixed)
        return x + self.mlp(self.norm2(x))


class TokenProjector(nn.Module):
    """Map (B, channels, side, side) of tokens to logits (B, num_classes).

    Tokens are merged 2 x 2 while the grid stays at least 7 x 7 (the first merger leads to `dim`), pass `blocks`
    attention blocks of 4 heads, are averaged and classified.

    Raises:
        ConfigError: `dim` is no multiple of the heads, or the grid cannot be halved.
    """

    def __init__(self, channels: int, side: int, dim: int, blocks: int, num_classes: int):
        super().__init__()
        mergers = max((side // GRID).bit_length() - 1, 0)
        if side % 2**mergers:
            raise ConfigError(f"ofa: a grid of {side} x {side} tokens cannot be halved {mergers} times", got=side)
        if dim % HEADS:
            raise ConfigError(
                f"ofa: the token projector needs a pooled width that {HEADS} divides",
                got=dim,
                hint="--loss.projector conv",
            )
        dims = [channels, *[dim] * mergers]
        # the first merger has an activation whatever follows; of the others all but the last
        self.merge = nn.Sequential(
            *(Merger(dims[i], dim, act=i == 0 or i < mergers - 1) for i in range(mergers)),
        )
        # without a merger the source takes equal widths for granted
        self.fit = nn.Identity() if dims[-1] == dim else nn.Linear(dims[-1], dim)
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(blocks)))
        self.head = nn.Linear(dim, num_classes)

    def forward(self, maps: Tensor) -> Tensor:
        tokens = self.fit(self.merge(maps.permute(0, 2, 3, 1)).flatten(1, 2))
        return self.head(self.blocks(tokens).mean(dim=1))
