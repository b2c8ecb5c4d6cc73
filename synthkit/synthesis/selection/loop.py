"""What methods without optimisation share: a method says what the rows are, the teacher (if any) looks at them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from synthkit.errors import ConfigError
from synthkit.lazy import torch
from synthkit.synthesis.base import ImageBatch, Makes, Requires
from synthkit.synthesis.independent import IndependentLoop

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


class SelectionLoop(IndependentLoop):
    """A method adds `rows(start, count)`: images uint8 (count, C, H, W) and labels int64 (count,) or None."""

    requires: ClassVar[Requires]
    makes: ClassVar[Makes]
    Config: ClassVar[type] = SelectionConfig

    def rows(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Images and labels of the rows `start` to `start + count`."""
        raise NotImplementedError

    def make_batch(self, start: int, count: int) -> ImageBatch:
        """These rows with the teacher's logits."""
        images, labels = self.rows(start, count)
        logits = None
        if self.task.teachers:
            with torch.inference_mode():
                logits = self.task.teacher(images.to(self.task.runtime.device)).float().clone()
            if labels is None:
                labels = logits.argmax(1)
        return ImageBatch(images=images, labels=labels, logits=logits, step=start + count)

    def estimate(self) -> dict[str, float]:
        """{"seconds", "memory_bytes"} of the whole run, from one batch."""
        count = min(self.config.batch_size, self.task.images)
        begun = time.perf_counter()
        batch = self.make_batch(0, count)
        seconds = (time.perf_counter() - begun) * self.task.images / count
        return {"seconds": max(seconds, 1e-6), "memory_bytes": float(8 * batch.images.numel())}
