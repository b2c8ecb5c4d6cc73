"""Training on stored views (FKD): batches in stored order, made by the function that made them for the teacher.

A batch is a run of rows of the label set, so any batch size and any number of processes read the same sequence, and a
resumed run needs nothing but the step. Targets and records are read from the maps of the set, images from the store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from synthkit.bank.labels.stored import StoredLogits
from synthkit.bank.labels.views import Views, apply_views
from synthkit.distillation.contract import Batch
from synthkit.distillation.stores import Store
from synthkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from synthkit.bank import LabelSet


class ViewRows:
    """The rows of a label set in which no held-out image is seen, numbered from 0 in stored order.

    Args:
        labels: a complete set of kind views.
        held: bool (images,), true for held-out images.
    """

    def __init__(self, labels: LabelSet, held: np.ndarray):
        self.labels, self.held = labels, held
        self.piece = labels.spec.images  # rows are looked at one view epoch at a time
        pieces = -(-len(labels) // self.piece)
        if held.any():
            counts = [len(self._kept(piece)) for piece in range(pieces)]
        else:
            counts = [min(self.piece, len(labels) - piece * self.piece) for piece in range(pieces)]
        self._starts = np.cumsum([0, *counts])
        self._cache: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def at(self, first: int, count: int) -> np.ndarray:
        """Rows of the set at the places first to first + count - 1, beginning again after the last."""
        places = (first + np.arange(count)) % len(self)
        piece = np.searchsorted(self._starts, places, side="right") - 1
        rows = np.empty(count, np.int64)
        for number in np.unique(piece).tolist():
            chosen = np.flatnonzero(piece == number)
            rows[chosen] = self._piece(number)[places[chosen] - self._starts[number]]
        return rows

    def _piece(self, number: int) -> np.ndarray:
        if number not in self._cache:
            for old in list(self._cache)[:-1]:
                del self._cache[old]
            self._cache[number] = self._kept(number)
        return self._cache[number]

    def _kept(self, number: int) -> np.ndarray:
        rows = np.arange(number * self.piece, min((number + 1) * self.piece, len(self.labels)))
        if not self.held.any():
            return rows
        views = self.labels.views(rows)
        seen = self.held[views.sample]
        seen[np.flatnonzero(views.mixed)] |= self.held[views.partner_sample]
        return rows[~seen]


class ViewSource:
    """Batches of stored views with their stored logits.

    Args:
        labels: a complete label set of kind views.
        store: the bank's images (without logits).
        rows: which rows may be shown.
        images: training images of the bank: what an epoch is counted by.
        batch_size: global batch size. rank, world: this process and how many there are.
    """

    def __init__(
        self,
        labels: LabelSet,
        store: Store,
        rows: ViewRows,
        batch_size: int,
        *,
        images: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device,
    ):
        if batch_size % world:
            raise ConfigError(f"batch_size must be a multiple of the {world} processes", got=batch_size)
        if not len(rows):
            raise DataError(f"label set {labels.name!r}: every view shows a held-out image", hint="lower --holdout")
        assert labels.spec.size is not None  # kind views has one
        self.labels, self.store, self.rows, self.size = labels, store, rows, labels.spec.size
        self.batch_size, self.rank, self.world, self.device = batch_size, rank, world, device
        self.steps_per_epoch = max(1, images // batch_size)
        self._targets = StoredLogits(labels)
        self._read: tuple[int, np.ndarray, Views] | None = None

    def views(self, step: int) -> tuple[np.ndarray, Views]:
        """(rows, records) of this rank's slice of the global batch of `step`."""
        if self._read is None or self._read[0] != step:
            rows = self.rows.at(step * self.batch_size, self.batch_size)[self.rank :: self.world]
            self._read = (step, rows, self.labels.views(rows))
        return self._read[1], self._read[2]

    def batch(self, step: int) -> Batch:
        """This rank's slice of the global batch of `step`; `labels` are those of the views' own images."""
        rows, views = self.views(step)
        targets = self._targets.read(rows).to(self.device, non_blocking=True)
        found = self.store.gather(np.concatenate([views.sample, views.partner_sample]))
        own, partners = found.images[: len(rows)], found.images[len(rows) :]
        images = apply_views(own, views, self.size, partners)
        _, following = self.views(step + 1)
        self.store.announce(np.concatenate([following.sample, following.partner_sample]))
        labels = None if found.labels is None else found.labels[: len(rows)]
        index = torch.from_numpy(np.asarray(views.sample, np.int64)).to(self.device)
        return Batch(images=images, labels=labels, logits=targets.dense(), index=index)

    def close(self) -> None:
        """Stop reading."""
        self.store.close()
