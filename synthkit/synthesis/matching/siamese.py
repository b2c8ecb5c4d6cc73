"""What the class-wise methods do to a network's input: siamese augmentation, and BatchNorm statistics held still."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from synthkit.synthesis.base import ImageSpec
    from synthkit.synthesis.matching.pool import RealPool

STATISTICS_IMAGES = 16  # real images per class from which BatchNorm statistics are taken


def strategy_of(strategy: str, spec: ImageSpec) -> str:
    """The strategy itself, checked; auto becomes the usual one for the classes of `spec`."""
    from synthkit.data.dsa import default_strategy, families

    name = default_strategy(spec.class_names or []) if strategy == "auto" else strategy
    families(name)
    return name


def augmented(images: Tensor, strategy: str, draws: torch.Generator) -> Tensor:
    """Every image of the batch under a random transform of its own."""
    from synthkit.data.dsa import apply, draw

    if strategy == "none":
        return images
    return apply(images, draw(strategy, len(images), images.shape[-1], draws, siamese=False, device=images.device))


def augmented_pair(left: Tensor, right: Tensor, strategy: str, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both batches, of any sizes, under one and the same random transform."""
    from synthkit.data.dsa import apply, draw

    if strategy == "none":
        return left, right
    record = draw(strategy, len(left), left.shape[-1], draws, siamese=True, device=left.device)
    return apply(left, record), apply(right, record)


def has_batchnorm(network: nn.Module) -> bool:
    """Whether any layer normalises over the batch."""
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in network.modules())


def freeze_statistics(network: nn.Module, real: RealPool, draws: torch.Generator) -> None:
    """Take BatchNorm statistics from real images of all classes and hold them: single-class batches have none."""
    network.train()
    rows = [real.draw(label, STATISTICS_IMAGES, draws) for label in range(len(real.rows))]
    with torch.no_grad():
        network(real.take(torch.cat(rows)))
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
