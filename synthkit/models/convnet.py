"""The ConvNet of the dataset-distillation papers: D blocks of conv-norm-ReLU-pool, then one linear layer.

Source: method card `matching` 1.2 (VICO-UoE/DatasetCondensation and its descendants; RDED's conv3..conv6 are the
BatchNorm form). Torch's default initialisation. State-dict names are synthkit's own.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from synthkit.errors import ModelError

NAME = re.compile(r"convnet(?:_d(\d+))?(?:_w(\d+))?(?:_(bn|none|group|layer))?")
_POOL = 2
_GROUPS = 4


def _norm(kind: str, channels: int, side: int) -> nn.Module:
    if kind == "instance":  # the papers' "InstanceNorm": affine, no running statistics
        return nn.GroupNorm(channels, channels)
    if kind == "group":
        return nn.GroupNorm(_GROUPS, channels)
    if kind == "layer":
        return nn.LayerNorm([channels, side, side])
    return nn.BatchNorm2d(channels) if kind == "bn" else nn.Identity()


class ConvNet(nn.Module):
    """(B, C, H, W) -> logits (B, K) for images of one fixed side.

    Args:
        depth: number of blocks; each halves the side (rounding down).
        width: channels of every block.
        norm: instance (GroupNorm with one channel per group), bn, group (4 groups), layer or none.
    """

    stemless = True

    def __init__(self, depth: int, width: int, norm: str, *, num_classes: int, in_channels: int, image_size: int):
        super().__init__()
        self.features = nn.Sequential()
        channels, side = in_channels, image_size
        for i in range(depth):
            # One-channel 28x28 images are padded to 32 by the first convolution.
            padding = 3 if i == 0 and in_channels == 1 else 1
            side += 2 * padding - 2
            block = nn.Sequential()
            block.add_module("conv", nn.Conv2d(channels, width, 3, padding=padding))
            block.add_module("norm", _norm(norm, width, side))
            block.add_module("relu", nn.ReLU())
            block.add_module("pool", nn.AvgPool2d(_POOL))
            self.features.append(block)
            channels, side = width, side // _POOL
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(width * side * side, num_classes)
        self.tap_points = (*(f"features.{i}.relu" for i in range(depth)), "flatten")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.features(x)))


def build(name: str, *, num_classes: int, in_channels: int, image_size: int) -> ConvNet:
    """The network called `name`: convnet[_dD][_wW][_NORM], default depth 3, width 128, instance norm."""
    found = NAME.fullmatch(name)
    assert found is not None, name  # only checked names get here
    depth, width, norm = int(found[1] or 3), int(found[2] or 128), found[3] or "instance"
    if norm == "group" and width % _GROUPS:
        raise ModelError(f"{name}: the width must be a multiple of {_GROUPS} for group norm", got=width)
    if image_size < 2**depth:
        raise ModelError(f"{name}: {depth} halvings need images of at least {2**depth}x{2**depth}", got=image_size)
    return ConvNet(depth, width, norm, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
