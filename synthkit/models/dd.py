"""The other evaluation networks of dataset distillation: MLP, LeNet, AlexNet, VGG-11 and ResNet-18 without BatchNorm.

Source: method card `matching` 1.3 (VICO-UoE/DatasetCondensation@53f63a6 and GeorgeCazenavette/mtt-distillation@50dccea
networks.py). "_in" is their InstanceNorm: GroupNorm with one channel per group, affine. "_ap" replaces each strided
convolution by one of stride 1 and 2x2 average pooling, and keeps the last map whole. Torch's default initialisation;
state-dict names are synthkit's own. ResNet-18 with BatchNorm is `resnet18`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from synthkit.errors import ModelError

_VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "bn" else nn.GroupNorm(channels, channels)


class Chain(nn.Module):
    """(B, C, H, W) -> logits (B, K): `features`, flattened, then `classifier`."""

    def __init__(self, features: nn.Sequential, classifier: nn.Module):
        super().__init__()
        self.features, self.flatten, self.classifier = features, nn.Flatten(), classifier
        self.tap_points = ("flatten",)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.features(x)))


def _mlp(classes: int, channels: int, side: int) -> Chain:
    sizes = (channels * side * side, 128, 128)
    hidden = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
    return Chain(nn.Sequential(), nn.Sequential(*hidden, nn.Linear(128, classes)))


def _lenet(classes: int, channels: int, side: int) -> Chain:
    if side != (28 if channels == 1 else 32):
        raise ModelError("lenet_dd takes grey images of 28x28 or colour images of 32x32", got=(channels, side, side))
    features = nn.Sequential(
        *(nn.Conv2d(channels, 6, 5, padding=2 if channels == 1 else 0), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
    )
    head = (nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes))
    return Chain(features, nn.Sequential(*head))


def _alexnet(classes: int, channels: int, side: int, norm: str | None) -> Chain:
    grey = channels == 1
    layers: list[nn.Module] = []
    for width, kernel, pool in ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True)):
        padding = 4 if grey and not layers else kernel // 2  # 28x28 becomes 32x32
        layers.append(nn.Conv2d(channels, width, kernel, padding=padding))
        layers += [_norm(norm, width)] if norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)] if pool else [nn.ReLU()]
        channels = width
    left = (side + 4 * grey) // 8
    return Chain(nn.Sequential(*layers), nn.Linear(192 * left * left, classes))


def _vgg11(classes: int, channels: int, norm: str) -> Chain:
    layers: list[nn.Module] = []
    for width in _VGG11:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
            continue
        padding = 3 if channels == 1 else 1  # 28x28 becomes 32x32
        layers += [nn.Conv2d(channels, width, 3, padding=padding), _norm(norm, width), nn.ReLU()]
        channels = width
    return Chain(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)), nn.Linear(512, classes))


class Block(nn.Module):
    """conv3x3-norm-ReLU-conv3x3-norm, plus the shortcut, ReLU; halves the side if `half`."""

    def __init__(self, cin: int, cout: int, *, half: bool, norm: str, average: bool):
        super().__init__()
        stride = 2 if half and not average else 1
        self.half_by_average = half and average
        self.conv1 = nn.Conv2d(cin, cout, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _norm(norm, cout)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, cout)
        self.shortcut = nn.Sequential()
        if half or cin != cout:
            self.shortcut.append(nn.Conv2d(cin, cout, 1, stride=stride, bias=False))
            if self.half_by_average:
                self.shortcut.append(nn.AvgPool2d(2))
            self.shortcut.append(_norm(norm, cout))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.norm1(self.conv1(x)))
        if self.half_by_average:
            out = F.avg_pool2d(out, 2)
        return self.relu2(self.norm2(self.conv2(out)) + self.shortcut(x))


def _resnet18(classes: int, channels: int, side: int, norm: str, average: bool) -> Chain:
    features = nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1, bias=False), _norm(norm, 64), nn.ReLU())
    channels = 64
    for stage in range(4):
        for block in range(2):
            half = stage > 0 and block == 0
            features.append(Block(channels, 64 * 2**stage, half=half, norm=norm, average=average))
            channels = 64 * 2**stage
    if not average:
        features.append(nn.AdaptiveAvgPool2d(1))
    left = side // 8 if average else 1
    return Chain(features, nn.Linear(channels * left * left, classes))


def build(name: str, *, num_classes: int, in_channels: int, image_size: int) -> Chain:
    """The network called `name`.

    Raises:
        ModelError: the images are too small, or of a size that LeNet cannot take.
    """
    least = {"mlp": 1, "alexnet_dd": 8, "alexnet_dd_bn": 8}.get(name, 28)
    if image_size < least:
        raise ModelError(f"{name} needs images of at least {least}x{least}", got=image_size)
    norm = "bn" if name.endswith("_bn") else "instance"
    if name == "mlp":
        return _mlp(num_classes, in_channels, image_size)
    if name == "lenet_dd":
        return _lenet(num_classes, in_channels, image_size)
    if name.startswith("alexnet"):
        return _alexnet(num_classes, in_channels, image_size, "bn" if norm == "bn" else None)
    if name.startswith("vgg11"):
        return _vgg11(num_classes, in_channels, norm)
    return _resnet18(num_classes, in_channels, image_size, norm, "_ap" in name)
