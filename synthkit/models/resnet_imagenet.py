"""ResNet-10/18/34 of double width for ImageNet: torchvision's basic blocks with 128-256-512-1024 channels.

Source: DefangChen/SimKD@2b389c3, whose ImageNet tables use them beside torchvision's own ResNets. torchvision's
initialisation and state-dict names; the stem keeps its 64 channels.
"""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

_BLOCKS = {
    "resnet10x2_imagenet": (1, 1, 1, 1),
    "resnet18x2_imagenet": (2, 2, 2, 2),
    "resnet34x2_imagenet": (3, 4, 6, 3),
}


def build(name: str, *, num_classes: int, in_channels: int, image_size: int) -> ResNet:
    """The network called `name`; `image_size` does not change its layers."""
    net = ResNet(BasicBlock, list(_BLOCKS[name]), num_classes=num_classes)
    net.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    channels = 64
    for stage, count in enumerate(_BLOCKS[name]):
        layer = nn.Sequential()
        for i in range(count):
            width, stride = 128 * 2**stage, 2 if i == 0 and stage > 0 else 1
            shortcut = None
            if channels != width:
                shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            layer.append(BasicBlock(channels, width, stride, shortcut))
            channels = width
        setattr(net, f"layer{stage + 1}", layer)
    net.fc = nn.Linear(channels, num_classes)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net
