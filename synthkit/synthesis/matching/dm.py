"""DM: distribution matching in the feature space of random networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from synthkit.lazy import torch
from synthkit.synthesis.base import widened
from synthkit.synthesis.matching.config import ClasswiseConfig
from synthkit.synthesis.matching.distances import mean_distance
from synthkit.synthesis.matching.loop import MatchingLoop
from synthkit.synthesis.matching.siamese import augmented_pair, has_batchnorm, strategy_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from synthkit.synthesis.base import Task


@dataclass(frozen=True, kw_only=True)
class DMConfig(ClasswiseConfig):
    """Distribution matching; the defaults are the published ones."""

    iterations: int = 20_000
    """Outer iterations, each with a fresh random network."""
    lr_img: float = 1.0
    """Learning rate of the pixels (published: 1 up to 50 images per class, 10 from 100 on)."""
    init: Literal["noise", "real"] = "real"
    """First images: normal noise, or random real images of their class."""
    strategy: str = "auto"
    """Siamese augmentation: families joined by _ (color_crop_cutout_flip_scale_rotate), none, or auto: all of them, but
    without the mirror for digits."""


class DM(MatchingLoop):
    """Learn images whose mean feature, under random networks, is that of real images of the same class.

    L = sum_c || mean phi(A_w T_c) - mean phi(A_w S_c) ||^2, phi the input of the last linear layer of a fresh network
    (train mode, weights frozen), T_c `batch_real` real and S_c all synthetic images of class c, w drawn per class.

    Shapes: pixels (N, C, H, W) in normalised space, never clamped; features (N, D); row r has class r mod K.
    Source: Zhao and Bilen, "Dataset condensation with distribution matching" (WACV 2023, arXiv 2110.04181);
        VICO-UoE/DatasetCondensation@53f63a6 main_DM.py.
    Differs from source: the synthetic images of all classes go through the network in one batch (the same numbers where
        the network normalises per image).
    Cost: K (batch_real F + m 3 F) per iteration, F the forward cost of an image, m images per class; no second order.
    """

    Config: ClassVar[type] = DMConfig
    config: DMConfig

    def __init__(self, config: DMConfig, task: Task):
        super().__init__(config, task)
        self.strategy = strategy_of(config.strategy, self.spec)

    def iteration(self, draws: torch.Generator) -> dict[str, Tensor]:
        """One random network, one SGD step of the pixels."""
        network = feature_network(self.fresh_network(f"network-{self.done}"))
        pixels = self.pixels.detach().requires_grad_()
        real: list[Tensor] = []
        synthetic: list[Tensor] = []
        for label, places in self.classes:
            images = self.real.take(self.real.draw(label, self.config.batch_real, draws))
            images, seen = augmented_pair(images, pixels[places], self.strategy, draws)
            real.append(images)
            synthetic.append(seen)
        with self.task.runtime.autocast():
            with torch.no_grad():
                # BatchNorm must see all classes at once; else class by class, which needs a K-th of the memory
                wanted = (
                    network(torch.cat(real)).split([len(part) for part in real])
                    if has_batchnorm(network)
                    else [network(part) for part in real]
                )
            found = network(torch.cat(synthetic)).split([len(part) for part in synthetic])
        loss = distribution_loss([widened(f) for f in wanted], [widened(f) for f in found])
        (gradient,) = torch.autograd.grad(loss, pixels)
        self.update(gradient)
        return {"matching_loss": loss.detach() / len(self.classes), "grad_norm": gradient.norm()}


def distribution_loss(real: list[Tensor], synthetic: list[Tensor]) -> Tensor:
    """sum_c || mean real_c - mean synthetic_c ||^2 of features (n_c, D) and (m_c, D), scalar."""
    return torch.stack([mean_distance(r, s) for r, s in zip(real, synthetic, strict=True)]).sum()


def feature_network(network: nn.Module) -> nn.Module:
    """`network` (consumed) that ends before its last linear layer and has no weight that takes a gradient."""
    name = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)][-1]
    network.set_submodule(name, torch.nn.Identity())
    return network.requires_grad_(False)
