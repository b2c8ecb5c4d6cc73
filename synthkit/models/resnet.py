"""The small CIFAR ResNets (depth 6n+2, 16-32-64 channels) and their x2 and x4 forms.

Two families share the layers and differ in the shortcut where the shape changes:

- `resnet20`, `resnet8x4`, ...: 1x1 convolution + BN ("option B"). These are the networks of the distillation tables
  (HobbitLong/RepDistiller@b84f547, DefangChen/SimKD@2b389c3; method card `kd` 3). Convolutions start from
  N(0, sqrt(2 / fan_out)), BN at 1/0, the classifier from torch's default. State-dict names: downsample, fc.
- `resnet20_a`, ...: every second pixel, missing channels filled with zeros, no weights ("option A", He et al. 2016).
  Public checkpoints of akamaster/pytorch_resnet_cifar10@d5489e8 load into these. Convolutions and classifier start
  from N(0, sqrt(2 / fan_in)). State-dict names: linear.
"""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from synthkit.models.init import fan_out_normal_init

_NAME = re.compile(r"resnet(\d+)(?:x(\d+))?(_a)?")
_CHANNELS = {"1": (16, 16, 32, 64), "2": (16, 32, 64, 128), "4": (32, 64, 128, 256)}


class ZeroPadShortcut(nn.Module):
    """Option A: keep every `stride`-th pixel and put (cout - cin) / 2 zero channels on either side."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.stride, self.pad = stride, (cout - cin) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN, plus the shortcut, ReLU."""

    def __init__(self, cin: int, cout: int, stride: int, *, zero_pad: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            if zero_pad:
                self.downsample = ZeroPadShortcut(cin, cout, stride)
            else:
                self.downsample = nn.Sequential(
                    nn.Conv2d(cin, cout, 1, stride=stride, bias=False), nn.BatchNorm2d(cout)
                )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + self.downsample(x))


class SmallResNet(nn.Module):
    """(B, C, H, W) -> logits (B, K); any H = W of at least 4."""

    tap_points = ("relu", "layer1", "layer2", "layer3", "flatten")
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self, per_stage: int, channels: tuple[int, int, int, int], *, zero_pad: bool, num_classes: int, in_channels: int
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        for stage in (1, 2, 3):
            layer = nn.Sequential()
            for i in range(per_stage):
                cin = channels[stage - 1] if i == 0 else channels[stage]
                layer.append(BasicBlock(cin, channels[stage], 2 if i == 0 and stage > 1 else 1, zero_pad=zero_pad))
            self.add_module(f"layer{stage}", layer)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier_name = "linear" if zero_pad else "fc"
        self.add_module(self.classifier_name, nn.Linear(channels[3], num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        return getattr(self, self.classifier_name)(self.flatten(self.pool(x)))


def build(name: str, *, num_classes: int, in_channels: int, image_size: int) -> SmallResNet:
    """The network called `name` (resnetD, resnetDxW, resnetD_a); `image_size` does not change its layers."""
    found = _NAME.fullmatch(name)
    assert found is not None, name  # only names of the table get here
    depth, width, option_a = int(found[1]), found[2] or "1", found[3] is not None
    net = SmallResNet(
        (depth - 2) // 6, _CHANNELS[width], zero_pad=option_a, num_classes=num_classes, in_channels=in_channels
    )
    if option_a:
        for m in net.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(m.weight)
    else:
        fan_out_normal_init(net)
    return net
