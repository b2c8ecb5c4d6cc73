"""Images by index on the device: a bank resident there, or streamed from disk."""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from synthkit.bank.labels.stored import StoredLogits, Targets, pixel_column
from synthkit.bank.reading.resident import free_memory
from synthkit.distillation.contract import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.bank import Bank

RESIDENT_SHARE = 0.4  # of the free memory of the device


class Store(Protocol):
    """Images by index, on the device."""

    resident: bool
    nbytes: int

    def gather(self, index: np.ndarray) -> Batch: ...
    def announce(self, index: np.ndarray) -> None: ...
    def load_ahead(self, index: np.ndarray) -> None: ...
    def close(self) -> None: ...


class ResidentStore:
    """The whole set as one tensor on the device (in main memory when the device has no room for it)."""

    resident = True

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        logits: Tensor | Targets | None,
        device: torch.device,
        home: torch.device | None = None,
    ):
        stored = Targets((logits,), logits.shape[1]) if isinstance(logits, torch.Tensor) else logits
        self.nbytes = images.nbytes + (0 if stored is None else stored.nbytes)
        self.device = device
        self.home = home or _home(self.nbytes, device)
        self.images = images.to(self.home)
        self.labels = None if labels is None else labels.to(self.home, torch.int64)
        self.targets = None if stored is None else stored.to(self.home)

    @classmethod
    def from_bank(cls, bank: Bank, device: torch.device, *, logits: StoredLogits | None) -> ResidentStore:
        """Read a bank whole to where it has room (`Bank.resident`)."""
        column = pixel_column(bank)
        home = _home(_needed(bank, logits), device)
        tensors = bank.resident(home, [column, *(["labels"] if bank.has("labels") else [])]).tensors
        stored = logits.read(np.arange(len(bank))) if logits is not None else None
        return cls(tensors[column], tensors.get("labels"), stored, device, home)

    def gather(self, index: np.ndarray) -> Batch:
        at = torch.from_numpy(index).to(self.home)
        return Batch(
            images=self.images.index_select(0, at).to(self.device),
            labels=None if self.labels is None else self.labels.index_select(0, at).to(self.device),
            logits=None if self.targets is None else self.targets.rows(at).to(self.device).dense(),
        )

    def announce(self, index: np.ndarray) -> None:
        """Nothing to do: everything is here."""

    def load_ahead(self, index: np.ndarray) -> None:
        """Nothing to do: everything is here."""

    def close(self) -> None:
        """Nothing to do."""


class StreamedStore:
    """A bank too large for the device: the next batch is read by a thread while the present one is trained on."""

    resident = False

    def __init__(self, bank: Bank, device: torch.device, *, logits: StoredLogits | None):
        self.bank, self.device, self.logits = bank, device, logits
        self.nbytes = 0
        self._column = pixel_column(bank)
        self._columns = [self._column, *(["labels"] if bank.has("labels") else [])]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="bank-prefetch")
        self._next: tuple[bytes, Future] | None = None

    def _read(self, index: np.ndarray) -> tuple[Tensor, Tensor | None, Targets | None]:
        found = self.bank.batch(index, self._columns)
        images = torch.from_numpy(np.ascontiguousarray(getattr(found, self._column)))
        labels = None if found.labels is None else torch.from_numpy(np.asarray(found.labels).astype(np.int64))
        targets = None if self.logits is None else self.logits.read(index)
        return images.pin_memory() if self.device.type == "cuda" else images, labels, targets

    def gather(self, index: np.ndarray) -> Batch:
        if self._next is not None and self._next[0] == index.tobytes():
            images, labels, targets = self._next[1].result()
        else:
            images, labels, targets = self._read(index)
        return Batch(
            images=images.to(self.device, non_blocking=True),
            labels=None if labels is None else labels.to(self.device, non_blocking=True),
            logits=None if targets is None else targets.to(self.device, non_blocking=True).dense(),
        )

    def announce(self, index: np.ndarray) -> None:
        """Start reading the batch that will be asked for next."""
        self._next = (index.tobytes(), self._pool.submit(self._read, index))

    def load_ahead(self, index: np.ndarray) -> None:
        """Ask the system to load these images, which will be needed later; returns at once."""
        if not self.bank.fits_memory:
            self._pool.submit(self.bank.will_need, index, [self._column])

    def close(self) -> None:
        """Stop the reading thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _needed(bank: Bank, logits: StoredLogits | None) -> int:
    pixels = math.prod(bank.shape) * (1 if pixel_column(bank) == "images" else 2)
    return len(bank) * (pixels + (logits.row_bytes if logits is not None else 0))


def _home(nbytes: int, device: torch.device) -> torch.device:
    return device if nbytes <= RESIDENT_SHARE * free_memory(device) else torch.device("cpu")


def bank_store(bank: Bank, device: torch.device, *, logits: StoredLogits | None) -> Store:
    """The bank resident on the device when it takes at most `RESIDENT_SHARE` of the free memory, else streamed."""
    if _needed(bank, logits) <= RESIDENT_SHARE * free_memory(device):
        return ResidentStore.from_bank(bank, device, logits=logits)
    return StreamedStore(bank, device, logits=logits)
