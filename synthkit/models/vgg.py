"""VGG-8/11/13/16/19 for 32x32 (and 64x64) images, with BatchNorm or without (`_nobn`); one linear classifier.

Source: method card `kd` 3.1 (HobbitLong/RepDistiller@b84f547). Convolutions (with bias) start from
N(0, sqrt(2 / (k k out))), the classifier from N(0, 0.01), biases 0. State-dict names are theirs.
"""

from __future__ import annotations

from torch import Tensor, nn

from synthkit.errors import ModelError
from synthkit.models.init import fan_out_normal_init

_WIDTHS = (64, 128, 256, 512, 512)
_CONVS = {  # convolutions in each of the five blocks
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """(B, C, H, W) -> logits (B, K).

    Max-pooling follows the first three blocks, and the fourth only for inputs of at least 64 pixels.
    """

    tap_points = ("relu0", "relu1", "relu2", "relu3", "relu4", "flatten")

    def __init__(self, convs: tuple[int, ...], *, norm: bool, num_classes: int, in_channels: int):
        super().__init__()
        channels = in_channels
        blocks, relus = [], []
        for i, (count, width) in enumerate(zip(convs, _WIDTHS, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1),
                    *([nn.BatchNorm2d(width)] if norm else []),
                    nn.ReLU(),
                ]
                channels = width
            # The block's last ReLU stands beside it, so that the map can be tapped on either side.
            blocks.append(nn.Sequential(*layers[:-1]))
            relus.append(layers[-1])
            self.add_module(f"block{i}", blocks[-1])
            self.add_module(f"relu{i}", relus[-1])
        self.pool = nn.MaxPool2d(2)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, num_classes)
        fan_out_normal_init(self, linear_std=0.01, linear_bias=0.0)

    def forward(self, x: Tensor) -> Tensor:
        large = x.shape[-1] >= 64
        for i in range(5):
            x = self.get_submodule(f"relu{i}")(self.get_submodule(f"block{i}")(x))
            if i < 3 or (i == 3 and large):
                x = self.pool(x)
        return self.classifier(self.flatten(self.gap(x)))


def build(name: str, *, num_classes: int, in_channels: int, image_size: int) -> VGG:
    """The network called `name`; three halvings need at least 8 pixels."""
    if image_size < 8:
        raise ModelError(f"{name} needs images of at least 8x8", got=image_size)
    convs = _CONVS[name.removesuffix("_nobn")]
    return VGG(convs, norm=not name.endswith("_nobn"), num_classes=num_classes, in_channels=in_channels)
