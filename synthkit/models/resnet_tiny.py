"""ResNet-18/34/50 for 64x64 images: torchvision's network with a 3x3 stem at full resolution and no max-pooling.

Source: method card `dfkd` 1.4 and 9 (the Tiny-ImageNet teacher of ljrprocc/DataFree@bf3096b; its new first convolution
keeps a bias). torchvision's initialisation; the stem's is torch's default. State-dict names are torchvision's.
"""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet18, resnet34, resnet50

_BASE = {"resnet18_tiny": resnet18, "resnet34_tiny": resnet34, "resnet50_tiny": resnet50}


def build(name: str, *, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The network called `name`; `image_size` does not change its layers."""
    net = _BASE[name](weights=None, num_classes=num_classes)
    net.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1)
    net.maxpool = nn.Identity()  # type: ignore[assignment]  # torchvision annotates the concrete class
    return net
