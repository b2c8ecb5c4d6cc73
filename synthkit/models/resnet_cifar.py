"""ResNet-18/34/50/101/152 for 32x32 images: 3x3 stem without pooling, 64-128-256-512 channels.

Source: method card `dfkd` 1.4 (the "kuangliu" networks of ljrprocc/DataFree@bf3096b and zju-vipa/CMI@9e79fa9).
Torch's default initialisation. State-dict names are theirs (conv1, bn1, layer1.0.conv1, shortcut.0, linear).
"""

from __future__ import annotations

from torch import Tensor, nn

_BLOCKS = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}


class Block(nn.Module):
    """Residual block: convolutions each followed by BN, ReLU between them and after the sum.

    Args:
        kernels: kernel sizes, (3, 3) basic or (1, 3, 1) bottleneck; the stride sits on the first 3x3.
        widths: output channels of each convolution.
    """

    def __init__(self, cin: int, widths: tuple[int, ...], kernels: tuple[int, ...], stride: int):
        super().__init__()
        self.depth = len(kernels)
        strided = kernels.index(3) + 1
        channels = (cin, *widths)
        for i, k in enumerate(kernels, start=1):
            conv = nn.Conv2d(
                channels[i - 1], channels[i], k, stride=stride if i == strided else 1, padding=k // 2, bias=False
            )
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels[i]))
        self.shortcut = nn.Sequential()
        if stride != 1 or cin != widths[-1]:
            self.shortcut = nn.Sequential(
                nn.Conv2d(cin, widths[-1], 1, stride=stride, bias=False), nn.BatchNorm2d(widths[-1])
            )
        for i in range(1, self.depth + 1):
            self.add_module(f"relu{i}", nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            if i == self.depth:
                out = out + self.shortcut(x)
            out = getattr(self, f"relu{i}")(out)
        return out


class ResNetCifar(nn.Module):
    """(B, C, H, W) -> logits (B, K); any H = W of at least 8."""

    tap_points = ("relu", "layer1", "layer2", "layer3", "layer4", "flatten")
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, bottleneck: bool, blocks: tuple[int, ...], *, num_classes: int, in_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        channels = 64
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            widths, kernels = ((width, width, 4 * width), (1, 3, 1)) if bottleneck else ((width, width), (3, 3))
            layer = nn.Sequential()
            for i in range(count):
                layer.append(Block(channels, widths, kernels, stride=2 if i == 0 and stage > 0 else 1))
                channels = widths[-1]
            self.add_module(f"layer{stage + 1}", layer)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.flatten(self.pool(x)))


def build(name: str, *, num_classes: int, in_channels: int, image_size: int) -> ResNetCifar:
    """The network called `name`; `image_size` does not change its layers."""
    bottleneck, blocks = _BLOCKS[name]
    return ResNetCifar(bottleneck, blocks, num_classes=num_classes, in_channels=in_channels)
