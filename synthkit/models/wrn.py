"""Wide residual networks WRN-d-k (d = 6n + 4), pre-activation, without dropout.

Source: method cards `dfkd` 1.4 and `kd` 3.1 (ljrprocc/DataFree@bf3096b, HobbitLong/RepDistiller@b84f547). Convolutions
start from N(0, sqrt(2 / (k k out))), BN at 1/0, the classifier bias at 0. State-dict names are theirs.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from synthkit.models.init import fan_out_normal_init

NAME = re.compile(r"wrn(\d+)_(\d+)")


class PreActBlock(nn.Module):
    """BN-ReLU-conv3x3-BN-ReLU-conv3x3 plus the input, or plus a bare 1x1 of the rectified input if channels change."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1, bias=False)
        self.convShortcut = None if cin == cout else nn.Conv2d(cin, cout, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        skip = x if self.convShortcut is None else self.convShortcut(active)
        return skip + self.conv2(self.relu2(self.bn2(self.conv1(active))))


class Stage(nn.Module):
    """`count` blocks; the first carries the stride."""

    def __init__(self, count: int, cin: int, cout: int, stride: int):
        super().__init__()
        self.layer = nn.Sequential(
            *(PreActBlock(cin if i == 0 else cout, cout, stride if i == 0 else 1) for i in range(count))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """(B, C, H, W) -> logits (B, K); any H = W of at least 4. Stage taps are raw sums, not rectified."""

    tap_points = ("conv1", "block1", "block2", "block3", "flatten")
    preact_points = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
    block1: Stage
    block2: Stage
    block3: Stage

    def __init__(self, depth: int, widen: int, *, num_classes: int, in_channels: int):
        super().__init__()
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        for stage in (1, 2, 3):
            block = Stage((depth - 4) // 6, widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            self.add_module(f"block{stage}", block)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(widths[3], num_classes)
        fan_out_normal_init(self, linear_bias=0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.flatten(self.pool(self.relu(self.bn1(x)))))


def build(name: str, *, num_classes: int, in_channels: int, image_size: int) -> WideResNet:
    """The network called `name` (wrnD_K); `image_size` does not change its layers."""
    found = NAME.fullmatch(name)
    assert found is not None, name  # only checked names get here
    return WideResNet(int(found[1]), int(found[2]), num_classes=num_classes, in_channels=in_channels)
