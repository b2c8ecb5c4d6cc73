"""The order in which an epoch reads a bank, as a pure function of (seed, epoch), and the cut of a batch for the ranks.

Two orders. `random_order` is a permutation drawn uniformly. `block_order` is for banks larger than memory: blocks of
neighbouring rows in random order, and the rows shuffled inside a window of `window` blocks, so that one window after
another is read and a disk sees whole blocks only.

How far `block_order` is from uniform: two rows of one block always lie within one window. The worst bank for it has
constant blocks (every block one class). A batch of B rows then has a mean whose variance is about (1 + B / window)
times that of a uniform order, for a window much smaller than the bank; with the default of 1,024 blocks and B = 128
that is 1.13 times, in the worst case. Where neighbouring rows are independent (a bank of synthetic images from random
latents), the two orders are equally good. Across epochs the blocks meet in other windows.

Nothing here depends on rank and world but `rank_rows`: the global batch of a step is the same for every number of
processes, and any step of an epoch can be computed without the steps before it.

Built from raw generator bits (PCG64) and stable sorts, so that no numpy release can change an order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from synthkit.errors import UsageError

BLOCK_BYTES = 256 << 10  # a disk reads pieces of this size at nearly its full rate
WINDOW_BLOCKS = 1024  # 256 MiB of the default blocks
_BLOCKS, _ROWS = 0x626C6F636B73, 0x726F7773  # separate the streams of random bits

Shuffle = Literal["random", "blocks"]


def _permutation(n: int, *entropy: int) -> np.ndarray:
    bits = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n)
    return np.argsort(bits, kind="stable")


def random_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation (int64) of `n` rows, every one equally likely."""
    _check(n, seed, epoch)
    return _permutation(n, seed, epoch)


@dataclass(frozen=True, kw_only=True)
class BlockOrder:
    """The block-shuffled order of one epoch; any part of it is computed on its own, without the whole."""

    n: int
    """Rows."""
    seed: int
    epoch: int
    block: int
    """Neighbouring rows that stay in one window (the last block may be shorter)."""
    window: int = WINDOW_BLOCKS
    """Blocks that are shuffled together."""

    def __post_init__(self):
        _check(self.n, self.seed, self.epoch)
        for name in ("block", "window"):
            if getattr(self, name) < 1:
                raise UsageError(f"block order: {name} must be at least 1", got=getattr(self, name))
        blocks = -(-self.n // self.block)
        order = _permutation(blocks, self.seed, self.epoch, _BLOCKS)
        sizes = np.full(blocks, self.block, np.int64)
        if blocks:
            sizes[-1] = self.n - (blocks - 1) * self.block
        ends = np.cumsum(sizes[order])
        stops = ends[np.minimum(np.arange(self.window - 1, blocks + self.window - 1, self.window), blocks - 1)]
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_edges", np.concatenate([[0], stops]).astype(np.int64))

    def __len__(self) -> int:
        return self.n

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(self.edges) - 1

    @property
    def edges(self) -> np.ndarray:
        """(windows + 1,) positions of the order at which windows begin."""
        return self.__dict__["_edges"]

    def blocks_of(self, window: int) -> np.ndarray:
        """Sorted rows of window `window`: whole blocks, as they lie on the disk."""
        first = np.sort(self.__dict__["_order"][window * self.window : (window + 1) * self.window]) * self.block
        rows = (first[:, None] + np.arange(self.block)).reshape(-1)
        return rows[rows < self.n]

    def rows_of(self, window: int) -> np.ndarray:
        """Rows of window `window`, shuffled."""
        rows = self.blocks_of(window)
        return rows[_permutation(len(rows), self.seed, self.epoch, _ROWS, window)]

    def part(self, start: int, stop: int) -> np.ndarray:
        """Positions `start` to `stop` of the order; costs the windows that they touch."""
        start, stop = max(0, start), min(stop, self.n)
        if start >= stop:
            return np.zeros(0, np.int64)
        first, last = self.window_at(start), self.window_at(stop - 1)
        rows = np.concatenate([self.rows_of(w) for w in range(first, last + 1)])
        begin = start - int(self.edges[first])
        return rows[begin : begin + stop - start]

    def window_at(self, position: int) -> int:
        """The window that holds `position` of the order."""
        return int(np.searchsorted(self.edges, position, side="right")) - 1


def block_order(n: int, seed: int, epoch: int, *, block: int, window: int = WINDOW_BLOCKS) -> np.ndarray:
    """A permutation (int64) of `n` rows: blocks of `block` rows in random order, shuffled inside windows of blocks.

    Its quality is described at the top of this file; `BlockOrder` gives parts of it without the whole.
    """
    return BlockOrder(n=n, seed=seed, epoch=epoch, block=block, window=window).part(0, n)


def block_rows(row_bytes: int) -> int:
    """Rows of a block of about `BLOCK_BYTES`."""
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def steps(n: int, batch_size: int) -> int:
    """Global batches of an epoch, the last, smaller one included."""
    return -(-n // batch_size)


def check_ranks(batch_size: int, rank: int, world: int) -> None:
    """Raise `UsageError` unless `world` processes can share a batch and `rank` is one of them."""
    if batch_size < 1:
        raise UsageError("batch_size must be at least 1", got=batch_size)
    if world < 1 or batch_size % world:
        raise UsageError(f"batch_size {batch_size} must be a multiple of the number of processes (world)", got=world)
    if not 0 <= rank < world:
        raise UsageError(f"rank must be 0 to {world - 1}", got=rank)


def rank_rows(batch: np.ndarray, rank: int, world: int) -> np.ndarray:
    """This rank's rows of a global batch: every `world`-th, so that the ranks of a step add up to the batch.

    A last, smaller batch is cut in the same way: every rank has the same number of steps, but in that one some have a
    row fewer (perhaps none).
    """
    return batch[rank::world]


def _check(n: int, seed: int, epoch: int) -> None:
    for name, value in (("n", n), ("seed", seed), ("epoch", epoch)):
        if not isinstance(value, (int, np.integer)) or value < 0:
            raise UsageError(f"order: {name} must be a whole number, 0 or more", got=value)
