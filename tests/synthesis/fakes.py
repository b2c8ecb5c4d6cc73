"""Synthesizers that are no optimisation: what the engine owes to any method, seen without a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from synthkit.synthesis.base import ImageBatch, Requires, Snapshot, Task


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Uniform pixels."""

    batch: int = 7
    """Images per batch."""
    floats: bool = False
    """Yield floats in [0, 1] instead of bytes."""
    lacking: int = 0
    """How many images fewer than asked for are made."""


class Noise:
    """Images without any training: no student, no snapshot, no logits, no difficulty."""

    requires: ClassVar[Requires] = Requires(grad=False)
    Config: ClassVar[type] = NoiseConfig

    def __init__(self, config: NoiseConfig, task: Task):
        self.config, self.task, self.draw = config, task, task.rng("noise")
        self.step, self.total_steps = 0, task.images

    def generate(self) -> Iterator[ImageBatch]:
        wanted = self.task.images - self.config.lacking
        while self.step < wanted:
            n = min(self.config.batch, wanted - self.step)
            pixels = torch.randint(0, 256, (n, *self.task.teacher.input_size), dtype=torch.uint8, generator=self.draw)
            self.step += n
            images = pixels.float() / 255 if self.config.floats else pixels
            yield ImageBatch(images=images, labels=torch.zeros(n, dtype=torch.int64), step=self.step)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "draw": self.draw.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.draw.set_state(state["draw"])

    def estimate(self) -> dict[str, float]:
        return {"seconds": 1e-3, "memory_bytes": 1.0}

    def snapshot(self) -> Snapshot | None:
        return None

    def student(self) -> None:
        return None


class NeedsBatchNorm(Noise):
    """The same, but it claims to look at BatchNorm layers."""

    requires: ClassVar[Requires] = Requires(batchnorm=True)
