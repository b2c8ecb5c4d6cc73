"""The experts of a task: trained where they are missing, read where a run needs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.errors import DataError
from synthkit.lazy import torch
from synthkit.synthesis.matching.experts import ExpertBuffer, train_expert
from synthkit.synthesis.matching.siamese import augmented

if TYPE_CHECKING:
    from torch import Tensor, nn

    from synthkit.synthesis.base import ImageSpec
    from synthkit.synthesis.matching.mtt_config import MTTConfig
    from synthkit.synthesis.matching.pool import RealPool


class Trajectories:
    """Experts of `config` on `real`; `build(seed)` makes a fresh network."""

    def __init__(
        self, config: MTTConfig, real: RealPool, spec: ImageSpec, strategy: str, build: Callable[[int], nn.Module]
    ):
        self.config, self.real, self.strategy, self.build = config, real, strategy, build
        if config.expert_images is not None and config.expert_images > len(real):
            raise DataError("method.expert_images: more than the data has", got=(config.expert_images, len(real)))
        identity = self._identity(spec)
        self.buffer = ExpertBuffer(Path(config.experts).expanduser() if config.experts else None, identity)

    def _identity(self, spec: ImageSpec) -> dict[str, Any]:
        from synthkit.synthesis.identity import data_identity

        c, data = self.config, self.real.data
        facts = data_identity(data.name, data, pixels=True)
        return {
            "data": {name: facts[name] for name in ("shape", "images", "sha256")},
            "arch": c.arch,
            "classes": spec.num_classes,
            "space": "zca" if c.zca else {"mean": list(spec.mean), "std": list(spec.std)},
            "strategy": self.strategy,
            "sgd": {"lr": c.expert_lr, "momentum": c.expert_momentum, "weight_decay": c.expert_weight_decay},
            "batch": c.expert_batch,
            "sample": c.expert_images,
            "seed": c.expert_seed,
        }

    def theta(self, index: int, epoch: int) -> Tensor:
        """Weights (P,) of expert `index` after `epoch` epochs."""
        return self.buffer.theta(index, epoch, self.real.labels.device)

    def missing(self) -> int:
        """How many experts are still to be trained."""
        return sum(self.buffer.epochs(index) < self.config.epochs for index in range(self.config.expert_count))

    def ensure(self, index: int, say: Callable[[str], None]) -> None:
        """Train expert `index` unless it is there for long enough."""
        c = self.config
        if self.buffer.epochs(index) >= c.epochs:
            return
        theta, facts = self.train(index, c.epochs)
        self.buffer.write(index, theta, facts)
        say(
            f"expert {index + 1} of {c.expert_count}: {c.epochs} epochs in {facts['seconds']:.0f} s,"
            f" loss {facts['loss'][0]:.3f} to {facts['loss'][-1]:.3f}"
        )

    def train(self, index: int, epochs: int, rows: Tensor | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Trajectory float32 (epochs + 1, P) of expert `index` (on the images `rows`), and what is known of it."""
        c = self.config
        return train_expert(
            self.build(self._seed(index)),
            self.real,
            self._rows() if rows is None else rows,
            epochs=epochs,
            lr=c.expert_lr,
            momentum=c.expert_momentum,
            weight_decay=c.expert_weight_decay,
            batch_size=c.expert_batch,
            augment=lambda images, draws: augmented(images, self.strategy, draws),
            draws=lambda epoch: torch.Generator().manual_seed(self._seed(index, epoch)),
        )

    def _rows(self) -> Tensor:
        n = self.config.expert_images
        if n is None:
            return torch.arange(len(self.real))
        return torch.randperm(len(self.real), generator=torch.Generator().manual_seed(self._seed()))[:n]

    def _seed(self, *numbers: int) -> int:
        sequence = np.random.SeedSequence([self.config.expert_seed, *numbers])
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
