"""What methods with independent shards share: a row is a pure function of (seed, row), in any order, on any machine.

A method adds `make_batch(start, count)`; this file owns the order of batches, progress and the (tiny) state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from synthkit.errors import ConfigError
from synthkit.synthesis.base import ImageBatch, Snapshot, Task

if TYPE_CHECKING:
    from synthkit.models.view import ModelView


class IndependentLoop:
    """Makes rows batch by batch, shard by shard. The config has a `batch_size`."""

    def __init__(self, config: Any, task: Task):
        if config.batch_size < 1:
            raise ConfigError("method.batch_size must be at least 1", got=config.batch_size)
        self.config, self.task = config, task
        self.step = 0

    def make_batch(self, start: int, count: int) -> ImageBatch:
        """The rows `start` to `start + count`: a pure function of (seed, start, count)."""
        raise TypeError(f"{type(self).__name__} must define make_batch")

    @property
    def work_per_image(self) -> int:
        """Steps of the progress line that one image costs (iterations of an optimisation, ...)."""
        return 1

    @property
    def total_steps(self) -> int:
        """Steps of the whole bank."""
        return self.task.images * self.work_per_image

    def advance(self, steps: int) -> None:
        """Tell the progress line that `steps` more are done; what a batch does not tell is told at its end."""
        self.step += steps
        if self.task.tick:
            self.task.tick(steps)

    def generate(self) -> Iterator[ImageBatch]:
        """All rows from `step` on: the shards one after the other."""
        while self.step < self.total_steps:
            row = self.step // self.work_per_image
            yield from self._batches(row, min(self.task.images, (row // self.task.per_shard + 1) * self.task.per_shard))

    def generate_shard(self, index: int, count: int) -> Iterator[ImageBatch]:
        """The `count` rows of shard `index`."""
        start = index * self.task.per_shard
        self.step = start * self.work_per_image
        yield from self._batches(start, start + count)

    def _batches(self, start: int, end: int) -> Iterator[ImageBatch]:
        for first in range(start, end, self.config.batch_size):
            count = min(self.config.batch_size, end - first)
            batch = self.make_batch(first, count)
            self.advance((first + count) * self.work_per_image - self.step)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """How far the run is."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.step = int(state["step"])

    def snapshot(self) -> Snapshot | None:
        """None: there is no generator."""
        return None

    def student(self) -> ModelView | None:
        """None: there is no student."""
        return None
