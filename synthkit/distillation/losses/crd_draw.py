"""Positives and negatives of CRD, drawn on the device for a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Classes:
    """The rows of a bank by class."""

    labels: Tensor
    """(N,) int64: place of each row's class among those that occur."""
    order: Tensor
    """(N,) int64: the rows, class by class."""
    starts: Tensor
    """(C,) int64: where each class begins in `order`."""
    counts: Tensor
    """(C,) int64: rows of each class."""
    fewest_others: int
    """The least number of rows that do not belong to a class."""

    @classmethod
    def of(cls, labels: Tensor) -> Classes:
        """From the label (N,) of every row."""
        _, places, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        starts = counts.cumsum(0) - counts
        return cls(places, places.argsort(stable=True), starts, counts, len(labels) - int(counts.max()))


def draw_positives(classes: Classes, index: Tensor, generator: torch.Generator) -> Tensor:
    """(B,) a row of the same class as each of `index` (B,), uniformly, the row itself among them."""
    own = classes.labels[index]
    share = torch.rand(len(index), generator=generator, device=index.device, dtype=torch.float64)
    return classes.order[classes.starts[own] + (share * classes.counts[own]).long()]


def draw_negatives(
    classes: Classes, index: Tensor, count: int, generator: torch.Generator, *, replacement: bool
) -> Tensor:
    """(B, count) rows of other classes than those of `index` (B,), uniformly.

    Without replacement each sample's rows are a uniform subset of the rows of other classes: a stretch, from a random
    place on, of one random order of the bank that skips the sample's own class. The order is shared by the batch (the
    sets of two samples depend on each other), so a step costs O(N log N + B count log N), not O(B N). With
    replacement every draw is independent.
    """
    device, images = index.device, len(classes.labels)
    own = classes.labels[index]
    starts, counts = classes.starts[own][:, None], classes.counts[own][:, None]
    others = images - counts  # (B, 1)
    if replacement:
        share = torch.rand(len(index), count, generator=generator, device=device, dtype=torch.float64)
        place = (share * others).long()
        return classes.order[torch.where(place < starts, place, place + counts)]
    mixed = torch.randperm(images, generator=generator, device=device)
    places = classes.labels[mixed].argsort(stable=True)  # of each class in the random order, ascending, class by class
    member = torch.arange(images - classes.fewest_others, device=device)  # as many as the largest class has
    at = places[(starts + member).clamp_max(images - 1)]
    before = torch.where(member < counts, at - member, images)  # others that precede each member
    turn = torch.rand(len(index), 1, generator=generator, device=device, dtype=torch.float64)
    wanted = ((turn * others).long() + torch.arange(count, device=device)) % others  # of the others in that order
    return mixed[wanted + torch.searchsorted(before, wanted, right=True)]
