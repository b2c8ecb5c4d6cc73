"""ShuffleNet V1 and V2 for 32x32 images.

Source: method card `kd` 3.1 (HobbitLong/RepDistiller@b84f547, DefangChen/SimKD@2b389c3): a 1x1 stem at full resolution
and three stages that halve it. Torch's default initialisation. State-dict names are theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from synthkit.errors import ModelError

_STEM = 24
_V1 = ((240, 4), (480, 8), (960, 4))  # (channels, blocks) of each stage
_V1_GROUPS = 3
_V2 = {  # ((channels, blocks after the first) of each stage, width of the closing convolution)
    "shufflenetv2_0_2": (((40, 3), (80, 3), (160, 3)), 512),
    "shufflenetv2_0_5": (((48, 3), (96, 7), (192, 3)), 1024),
    "shufflenetv2": (((116, 3), (232, 7), (464, 3)), 1024),
    "shufflenetv2_1_5": (((176, 3), (352, 7), (704, 3)), 1024),
    "shufflenetv2_2_0": (((224, 3), (488, 7), (976, 3)), 2048),
}


class ChannelShuffle(nn.Module):
    """Deal the channels out to `groups` hands and lay the hands side by side."""

    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def _pointwise(cin: int, cout: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 1, groups=groups, bias=False)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)


class UnitV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; added to the input, or beside its pooled form at stride 2.

    `cout` counts the channels after the concatenation.
    """

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        own = cout - cin if stride == 2 else cout
        mid = own // 4
        first_groups = 1 if cin == _STEM else _V1_GROUPS
        self.conv1, self.bn1, self.relu1 = _pointwise(cin, mid, first_groups), nn.BatchNorm2d(mid), nn.ReLU()
        self.shuffle1 = ChannelShuffle(first_groups)
        self.conv2, self.bn2, self.relu2 = _depthwise(mid, stride), nn.BatchNorm2d(mid), nn.ReLU()
        self.conv3, self.bn3, self.relu3 = _pointwise(mid, own, _V1_GROUPS), nn.BatchNorm2d(own), nn.ReLU()
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.shuffle1(self.relu1(self.bn1(self.conv1(x))))
        out = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(out)))))
        return self.relu3(out + x if self.pool is None else torch.cat([out, self.pool(x)], 1))


class UnitV2(nn.Module):
    """Half of the channels pass, the other half goes through 1x1, depthwise 3x3, 1x1; then shuffle."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1, self.relu1 = _pointwise(half, half), nn.BatchNorm2d(half), nn.ReLU()
        self.conv2, self.bn2 = _depthwise(half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3, self.relu3 = _pointwise(half, half), nn.BatchNorm2d(half), nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, dim=1)
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(out)))))
        # the kept half comes from ReLUs, so that the last ReLU leaves it as it is: its input is the tap before it
        return self.shuffle(self.relu3(torch.cat([kept, self.bn3(self.conv3(out))], 1)))


class DownV2(nn.Module):
    """Two branches at stride 2, each giving half of `cout`; then shuffle."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        half = cout // 2
        self.conv1, self.bn1 = _depthwise(cin, 2), nn.BatchNorm2d(cin)
        self.conv2, self.bn2, self.relu2 = _pointwise(cin, half), nn.BatchNorm2d(half), nn.ReLU()
        self.conv3, self.bn3, self.relu3 = _pointwise(cin, half), nn.BatchNorm2d(half), nn.ReLU()
        self.conv4, self.bn4 = _depthwise(half, 2), nn.BatchNorm2d(half)
        self.conv5, self.bn5, self.relu5 = _pointwise(half, half), nn.BatchNorm2d(half), nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        left = self.relu2(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(self.relu3(self.bn3(self.conv3(x)))))
        return self.shuffle(torch.cat([left, self.relu5(self.bn5(self.conv5(right)))], 1))


class ShuffleNet(nn.Module):
    """(B, C, H, W) -> logits (B, K). `last` is the width of a closing 1x1 convolution (V2), none for V1."""

    tap_points = ("relu1", "layer1", "layer2", "layer3", "flatten")

    def __init__(
        self, stages: list[nn.Sequential], width: int, last: int | None, *, num_classes: int, in_channels: int
    ):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = _pointwise(in_channels, _STEM), nn.BatchNorm2d(_STEM), nn.ReLU()
        self.layer1, self.layer2, self.layer3 = stages
        if last is not None:
            self.conv2, self.bn2, self.relu2 = _pointwise(width, last), nn.BatchNorm2d(last), nn.ReLU()
            # a ShuffleNetV2 stage ends in a shuffle, not in its last ReLU
            self.preact_points = tuple(f"layer{i}.{len(stage) - 1}.relu3@pre" for i, stage in enumerate(stages, 1))
        self.closing = last is not None
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(last or width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu1(self.bn1(self.conv1(x))))))
        if self.closing:
            x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(self.flatten(self.pool(x)))


def build(name: str, *, num_classes: int, in_channels: int, image_size: int) -> ShuffleNet:
    """The network called `name`; three halvings need at least 8 pixels."""
    if image_size < 8:
        raise ModelError(f"{name} needs images of at least 8x8", got=image_size)
    stages, channels, last = [], _STEM, None
    if name == "shufflenetv1":
        for cout, count in _V1:
            units = [UnitV1(channels if i == 0 else cout, cout, 2 if i == 0 else 1) for i in range(count)]
            stages.append(nn.Sequential(*units))
            channels = cout
    else:
        sizes, last = _V2[name]
        for cout, count in sizes:
            stages.append(nn.Sequential(DownV2(channels, cout), *(UnitV2(cout) for _ in range(count))))
            channels = cout
    return ShuffleNet(stages, channels, last, num_classes=num_classes, in_channels=in_channels)
