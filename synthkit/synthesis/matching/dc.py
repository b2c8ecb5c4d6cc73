"""DC: dataset condensation with gradient matching."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from synthkit.errors import ConfigError
from synthkit.lazy import F, torch
from synthkit.synthesis.matching.config import ClasswiseConfig
from synthkit.synthesis.matching.distances import Distance, gradient_distance
from synthkit.synthesis.matching.loop import MatchingLoop
from synthkit.synthesis.matching.siamese import augmented, augmented_pair, freeze_statistics, has_batchnorm, strategy_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from synthkit.synthesis.base import Task

LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10), 100: (100, 2)}
"""Images per class -> (matching steps per network, epochs of the network between two of them)."""


@dataclass(frozen=True, kw_only=True)
class DCConfig(ClasswiseConfig):
    """Gradient matching; the defaults are the published ones."""

    outer: int | None = None
    """Matching steps per network; none takes the published number for the images per class."""
    inner: int | None = None
    """Epochs on the synthetic set between two matching steps; none takes the published number."""
    lr_net: float = 0.01
    """Learning rate of the network on the synthetic set (SGD without momentum)."""
    batch_train: int = 256
    """Batch size of that training."""
    distance: Distance = "rows"
    """Distance of the gradients: rows (cosine of every output row), mse, or cos (one cosine over everything)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("lr_net")
        self._at_least_one("batch_train")
        for name in ("outer", "inner"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"method.{name} must be at least 1", got=value)


class DC(MatchingLoop):
    """Learn images on which networks have the gradients that they have on real images of the same class.

    L = sum_c D(grad_theta l(S_c), grad_theta l(T_c)), l the mean cross-entropy, S_c all synthetic and T_c `batch_real`
    real images of class c; D = sum over layers and output rows r of 1 - <a_r, b_r> / (|a_r| |b_r| + 1e-6). Per
    iteration a fresh network theta; `outer` times an SGD step of the pixels on L, with `inner` epochs of theta on the
    synthetic set in between.

    Shapes: pixels (N, C, H, W) in normalised space, never clamped; labels (N,), row r has class r mod K.
    Source: Zhao, Mopuri and Bilen, "Dataset condensation with gradient matching" (ICLR 2021, arXiv 2006.05929);
        VICO-UoE/DatasetCondensation@53f63a6 main.py, utils.py.
    Differs from source: exactly `iterations` networks (there one more); every class's gradient reaches its own rows at
        once, so that the graph of one class at a time is held (the same sum); (outer, inner) of other numbers of
        images per class are those of the next smaller published one (there an error).
    Cost: per matching step K (batch_real 3 F + m 9 F), F the forward cost of an image, m images per class; memory of
        the double backward of m images.
    """

    Config: ClassVar[type] = DCConfig
    config: DCConfig

    def __init__(self, config: DCConfig, task: Task):
        super().__init__(config, task)
        self.strategy = strategy_of(config.strategy, self.spec)
        outer, inner = loops_of(self.ipc)
        self.outer, self.inner = config.outer or outer, config.inner or inner

    def iteration(self, draws: torch.Generator) -> dict[str, Tensor]:
        """One network: `outer` matching steps with training in between."""
        network = self.fresh_network(f"network-{self.done}")
        totals: list[dict[str, Tensor]] = []
        for repeat in range(self.outer):
            totals.append(self.matching_step(network, draws))
            if repeat < self.outer - 1:
                for _ in range(self.inner):
                    self.train_epoch(network, draws)
        return {name: torch.stack([t[name] for t in totals]).mean() for name in totals[0]}

    def matching_step(self, network: nn.Module, draws: torch.Generator) -> dict[str, Tensor]:
        """One SGD step of the pixels on the distances of all classes."""
        if has_batchnorm(network):
            freeze_statistics(network, self.real, draws)
        weights = [p for p in network.parameters() if p.ndim > 1 or self.config.distance != "rows"]
        gradient, total = torch.zeros_like(self.pixels), torch.zeros((), device=self.device)
        for label, places in self.classes:
            real = self.real.take(self.real.draw(label, self.config.batch_real, draws))
            synthetic = self.pixels[places].requires_grad_()
            real, seen = augmented_pair(real, synthetic, self.strategy, draws)
            wanted = self.gradient(network, real, label, weights)
            found = self.gradient(network, seen, label, weights, create_graph=True)
            distance = gradient_distance(found, wanted, self.config.distance)
            gradient[places] = torch.autograd.grad(distance, synthetic)[0]
            total += distance.detach()
        self.update(gradient)
        return {"matching_loss": total / len(self.classes), "grad_norm": gradient.norm()}

    def gradient(
        self, network: nn.Module, images: Tensor, label: int, weights: Sequence[Tensor], *, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """Gradient of the mean cross-entropy of images (B, C, H, W) of class `label` for `weights`."""
        labels = torch.full((len(images),), label, device=self.device)
        loss = F.cross_entropy(network(images), labels)
        return torch.autograd.grad(loss, weights, create_graph=create_graph)

    def train_epoch(self, network: nn.Module, draws: torch.Generator) -> None:
        """One epoch of the network on the synthetic set as it stands."""
        network.train()
        parameters = list(network.parameters())
        for places in torch.randperm(self.task.images, generator=draws).split(self.config.batch_train):
            images = augmented(self.pixels[places], self.strategy, draws)
            gradients = torch.autograd.grad(F.cross_entropy(network(images), self.targets[places]), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(gradient, alpha=self.config.lr_net)

    def measured_iteration(self) -> float:
        """One matching step and one epoch, each times how often it comes."""
        draws, network = self.task.rng("estimate", "cpu"), self.fresh_network("estimate")
        begun = time.perf_counter()
        self.matching_step(network, draws)
        matched = time.perf_counter()
        if self.outer > 1:
            self.train_epoch(network, draws)
        trained = time.perf_counter() - matched
        return self.outer * (matched - begun) + (self.outer - 1) * self.inner * trained


def loops_of(ipc: int) -> tuple[int, int]:
    """(outer, inner) for `ipc` images per class: those of the largest published number that is not above it."""
    return LOOPS[max(n for n in LOOPS if n <= max(1, ipc))]
