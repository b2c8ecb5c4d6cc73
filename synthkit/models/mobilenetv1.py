"""MobileNetV1 at width 1.0 for ImageNet: the student of the ResNet-50 rows of the distillation tables.

Source: method card `kd` 3.1 and 11.10 (megvii-research/mdistiller@a08d46f). Torch's default initialisation. State-dict
names are theirs (model.0.0, ..., fc).
Differs from source: global average pooling instead of one of 7x7, the same at 224x224.
"""

from __future__ import annotations

from torch import Tensor, nn

from synthkit.errors import ModelError

_STEM = 32
# (channels, stride) of the depthwise-separable units
_UNITS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)


def _conv_bn_relu(cin: int, cout: int, kernel: int, *, stride: int = 1, groups: int = 1) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(cin, cout, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(cout), nn.ReLU()


class MobileNetV1(nn.Module):
    """(B, C, H, W) -> logits (B, K)."""

    # the stem of the convention is the map at half the side, so that the stages pair with those of a ResNet
    tap_points = ("model.1", "model.3", "model.5", "model.11", "model.13", "flatten")

    def __init__(self, *, num_classes: int, in_channels: int):
        super().__init__()
        self.model = nn.Sequential(nn.Sequential(*_conv_bn_relu(in_channels, _STEM, 3, stride=2)))
        channels = _STEM
        for width, stride in _UNITS:
            depthwise = _conv_bn_relu(channels, channels, 3, stride=stride, groups=channels)
            self.model.append(nn.Sequential(*depthwise, *_conv_bn_relu(channels, width, 1)))
            channels = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.model(x))))


def build(name: str, *, num_classes: int, in_channels: int, image_size: int) -> MobileNetV1:
    """The network called `name`; five halvings need at least 32 pixels."""
    if image_size < 32:
        raise ModelError(f"{name} needs images of at least 32x32", got=image_size)
    return MobileNetV1(num_classes=num_classes, in_channels=in_channels)
