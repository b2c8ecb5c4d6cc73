"""Random real images: the control that every distilled dataset must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from synthkit.errors import DataError, RequirementError
from synthkit.lazy import torch
from synthkit.synthesis.base import Makes, Requires, Task
from synthkit.synthesis.selection.loop import SelectionConfig, SelectionLoop

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RandomRealConfig(SelectionConfig):
    """Class-balanced random real images; there is nothing to tune."""


class RandomReal(SelectionLoop):
    """Real images drawn without replacement, equally many of every class, with their real labels.

    Row r is image pi_c(floor(r / K)) of class c = sigma(r mod K), with pi_c and sigma permutations drawn from the seed:
    every stretch of K rows holds every class once, so any part of the bank is balanced too.

    Shapes: images uint8 (B, C, H, W); labels (B,); logits (B, K) with a teacher.
    Source: the "random real images" baseline of dataset distillation (DC, Zhao et al., ICLR 2021,
        arXiv 2006.05929); no code was taken.
    Differs from source: rows alternate between the classes instead of standing class by class.
    Cost: O(N log N) once for the permutations; a forward pass per image with a teacher.
    """

    requires: ClassVar[Requires] = Requires(teacher=False, real_data=True, grad=False, shardable=True, curriculum=False)
    makes: ClassVar[Makes] = Makes(label_kind="real", contains_real=True)
    Config: ClassVar[type] = RandomRealConfig
    config: RandomRealConfig

    def __init__(self, config: RandomRealConfig, task: Task):
        super().__init__(config, task)
        if task.data is None:
            raise RequirementError("random_real needs real data", hint="give it: --data cifar10:DIR")
        self.data = task.data
        self.order = torch.from_numpy(balanced_rows(self.data.labels.cpu().numpy(), self.data.class_names, task))

    def rows(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Images (count, C, H, W) and labels (count,) of these rows."""
        chosen = self.order[start : start + count]
        return self.data.images[chosen], self.data.labels[chosen]


def balanced_rows(labels: np.ndarray, class_names: list[str], task: Task) -> np.ndarray:
    """Indices (task.images,) of a class-balanced sample of `labels` (N,), a pure function of the seed.

    Raises:
        DataError: a class has too few images; the message names it.
    """
    classes = len(class_names)
    turn = task.numpy_rng("classes").permutation(classes)
    rows = np.empty(task.images, np.int64)
    for place, label in enumerate(turn):
        wanted = len(range(place, task.images, classes))
        found = np.flatnonzero(labels == label)
        if len(found) < wanted:
            raise DataError(
                f"random_real: class {class_names[label]!r} has {len(found)} images, {wanted} are asked for",
                hint="lower --ipc or --images",
            )
        rows[place::classes] = task.numpy_rng("rows", int(label)).permutation(found)[:wanted]
    return rows
