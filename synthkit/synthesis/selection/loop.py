"""What methods without optimisation share: every row is a pure function of (seed, row), so shards are independent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit.errors import ConfigError
from synthkit.lazy import torch
from synthkit.synthesis.base import ImageBatch, Makes, Requires, Snapshot, Task

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """What the family's methods have in common."""

    batch_size: int = 256
    """Images made, and labelled by the teacher, at once."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError("method.batch_size must be at least 1", got=self.batch_size)


class SelectionLoop:
    """Makes rows batch by batch, shard by shard, and lets the teacher (if there is one) look at them.

    A method adds `rows(start, count)`: images uint8 (count, C, H, W) and labels int64 (count,) or None.
    """

    requires: ClassVar[Requires]
    makes: ClassVar[Makes]
    Config: ClassVar[type] = SelectionConfig

    def __init__(self, config: SelectionConfig, task: Task):
        self.config, self.task = config, task
        self.step, self.total_steps = 0, task.images

    def rows(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Images and labels of the rows `start` to `start + count`."""
        raise NotImplementedError

    def generate(self) -> Iterator[ImageBatch]:
        """All rows from `step` on: the shards one after the other."""
        while self.step < self.task.images:
            end = min(self.task.images, (self.step // self.task.per_shard + 1) * self.task.per_shard)
            yield from self._batches(self.step, end)

    def generate_shard(self, index: int, count: int) -> Iterator[ImageBatch]:
        """The `count` rows of shard `index`."""
        start = index * self.task.per_shard
        self.step = start
        yield from self._batches(start, start + count)

    def _batches(self, start: int, end: int) -> Iterator[ImageBatch]:
        for first in range(start, end, self.config.batch_size):
            count = min(self.config.batch_size, end - first)
            batch = self._batch(first, count)
            self.step = first + count
            if self.task.tick:
                self.task.tick(count)
            yield batch

    def _batch(self, start: int, count: int) -> ImageBatch:
        images, labels = self.rows(start, count)
        logits = None
        if self.task.teachers:
            with torch.inference_mode():
                logits = self.task.teacher(images.to(self.task.runtime.device)).float().clone()
            if labels is None:
                labels = logits.argmax(1)
        return ImageBatch(images=images, labels=labels, logits=logits, step=start + count)

    def state_dict(self) -> dict[str, Any]:
        """The next row is all there is."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at that row."""
        self.step = int(state["step"])

    def estimate(self) -> dict[str, float]:
        """{"seconds", "memory_bytes"} of the whole run, from one batch."""
        count = min(self.config.batch_size, self.task.images)
        begun = time.perf_counter()
        batch = self._batch(0, count)
        seconds = (time.perf_counter() - begun) * self.task.images / count
        return {"seconds": max(seconds, 1e-6), "memory_bytes": float(8 * batch.images.numel())}

    def snapshot(self) -> Snapshot | None:
        """None: there is no generator."""
        return None

    def student(self) -> None:
        """None: there is no student."""
        return None
