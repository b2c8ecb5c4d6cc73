"""LeNet-5 of the data-free papers, full and half width, plain and with BatchNorm.

Source: method card `dfkd` 1.4 (huawei-noah DAFL lenet.py, ljrprocc/DataFree@bf3096b lenet.py). Torch's default
initialisation. The BatchNorm forms are synthkit's: the same layers with a BatchNorm2d after each convolution, so that
methods which match BatchNorm statistics can be run on MNIST.
"""

from __future__ import annotations

from torch import Tensor, nn

from synthkit.errors import ModelError

# name -> (channels of the three convolutions, hidden width, BatchNorm)
_SIZES = {
    "lenet5": ((6, 16, 120), 84, False),
    "lenet5_half": ((3, 8, 60), 42, False),
    "lenet5_bn": ((6, 16, 120), 84, True),
    "lenet5_half_bn": ((3, 8, 60), 42, True),
}


class LeNet5(nn.Module):
    """(B, C, 32, 32) -> logits (B, K)."""

    tap_points = ("features.relu1", "features.relu2", "flatten")
    stemless = True

    def __init__(
        self, widths: tuple[int, int, int], hidden: int, *, batch_norm: bool, num_classes: int, in_channels: int
    ):
        super().__init__()
        self.features = nn.Sequential()
        channels = (in_channels, *widths)
        for i in (1, 2, 3):
            # The conv indices 0, 3, 6 of the plain form are those of the public checkpoints.
            name = str(3 * (i - 1))
            self.features.add_module(name, nn.Conv2d(channels[i - 1], channels[i], 5))
            if batch_norm:
                self.features.add_module(f"bn{i}", nn.BatchNorm2d(channels[i]))
            self.features.add_module(f"relu{i}", nn.ReLU())
            if i < 3:
                self.features.add_module(f"pool{i}", nn.MaxPool2d(2))
        self.flatten = nn.Flatten()
        self.fc = nn.Sequential(nn.Linear(widths[2], hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.features(x)))


def build(name: str, *, num_classes: int, in_channels: int, image_size: int) -> LeNet5:
    """The LeNet called `name`; its three 5x5 convolutions fix the input to 32x32."""
    if image_size != 32:
        raise ModelError(f"{name} takes 32x32 images", got=image_size, hint="resize the images to 32 (28x28 MNIST too)")
    widths, hidden, batch_norm = _SIZES[name]
    return LeNet5(widths, hidden, batch_norm=batch_norm, num_classes=num_classes, in_channels=in_channels)
