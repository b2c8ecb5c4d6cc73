"""What normalisation to assume when a weights file comes without a card."""

from __future__ import annotations

from torch import nn

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
# Constants of the data-free literature (method card `dfkd` 1.4).
_BY_INPUT: dict[tuple[int, int, int], tuple[str, list[float], list[float]]] = {
    (3, 32, 10): ("CIFAR-10", [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    (3, 32, 100): ("CIFAR-100", [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
    (3, 64, 200): ("Tiny-ImageNet", [0.4802, 0.4481, 0.3975], [0.2302, 0.2265, 0.2262]),
    (1, 28, 10): ("MNIST", [0.1307], [0.3081]),
    (1, 32, 10): ("MNIST", [0.1307], [0.3081]),
}


def guess(arch: str, channels: int, side: int, classes: int, module: nn.Module) -> tuple[list[float], list[float], str]:
    """(mean, std, in words what was assumed) by the library's own record, else by channels, size and classes."""
    config = getattr(module, "pretrained_cfg", None)
    if arch.startswith("timm:") and isinstance(config, dict) and len(config.get("mean", ())) == channels:
        return list(config["mean"]), list(config["std"]), "timm's own mean/std"
    if (channels, side, classes) in _BY_INPUT:
        name, mean, std = _BY_INPUT[channels, side, classes]
        return list(mean), list(std), f"the mean/std of {name}"
    if channels == 3:
        return list(IMAGENET[0]), list(IMAGENET[1]), "the mean/std of ImageNet"
    return [0.5] * channels, [0.5] * channels, "mean 0.5 and std 0.5"
