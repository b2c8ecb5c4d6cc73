"""MobileNetV2 for 32x32 images at width 0.5 ("mobile_half") and 1.0.

Source: method card `kd` 3.1 (HobbitLong/RepDistiller@b84f547, DefangChen/SimKD@2b389c3). No dropout; the 1280 channels
before the classifier do not shrink with the width. Convolutions start from N(0, sqrt(2 / (k k out))), the classifier
from N(0, 0.01), biases 0. State-dict names are theirs.
"""

from __future__ import annotations

from torch import Tensor, nn

from synthkit.errors import ModelError
from synthkit.models.init import fan_out_normal_init

_WIDTH = {"mobilenetv2_half": 0.5, "mobilenetv2": 1.0}
# (expansion, channels at width 1, blocks, stride of the first block)
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_LAST = 1280


def _conv_bn(
    cin: int, cout: int, kernel: int, *, stride: int = 1, groups: int = 1, relu: bool = True
) -> list[nn.Module]:
    conv = nn.Conv2d(cin, cout, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(cout), *([nn.ReLU()] if relu else [])]


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 depthwise, 1x1 down without ReLU; added to the input where the shapes agree."""

    def __init__(self, cin: int, cout: int, stride: int, expansion: int):
        super().__init__()
        wide = cin * expansion
        self.residual = stride == 1 and cin == cout
        self.conv = nn.Sequential(
            *_conv_bn(cin, wide, 1),
            *_conv_bn(wide, wide, 3, stride=stride, groups=wide),
            *_conv_bn(wide, cout, 1, relu=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """(B, C, H, W) -> logits (B, K). Stage taps are linear bottlenecks and may be negative."""

    tap_points = ("conv1", "blocks.1", "blocks.2", "blocks.4", "blocks.6", "flatten")

    def __init__(self, width: float, *, num_classes: int, in_channels: int):
        super().__init__()
        channels = int(32 * width)
        self.conv1 = nn.Sequential(*_conv_bn(in_channels, channels, 3, stride=2))
        self.blocks = nn.Sequential()
        for expansion, full, count, stride in _STAGES:
            stage = nn.Sequential()
            for i in range(count):
                stage.append(InvertedResidual(channels, int(full * width), stride if i == 0 else 1, expansion))
                channels = int(full * width)
            self.blocks.append(stage)
        self.conv2 = nn.Sequential(*_conv_bn(channels, _LAST, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(nn.Linear(_LAST, num_classes))
        fan_out_normal_init(self, linear_std=0.01, linear_bias=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.conv2(self.blocks(self.conv1(x))))))


def build(name: str, *, num_classes: int, in_channels: int, image_size: int) -> MobileNetV2:
    """The network called `name`; four halvings need at least 16 pixels."""
    if image_size < 16:
        raise ModelError(f"{name} needs images of at least 16x16", got=image_size)
    return MobileNetV2(_WIDTH[name], num_classes=num_classes, in_channels=in_channels)
