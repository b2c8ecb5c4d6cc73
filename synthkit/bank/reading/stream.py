"""One epoch of a bank as a stream of batches that are read ahead: for banks larger than memory, and for waiting less.

A thread reads the next batches while the present one is used. In block order the system is also asked to load the
blocks of the next window (256 MiB by default) while this one is read, a few blocks with every batch, so the disk works
evenly and only on whole blocks. What a batch holds is `bank.batch(order[...])`, to the byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from synthkit.bank.reading import order as orders
from synthkit.bank.reading.order import BlockOrder, Shuffle
from synthkit.errors import UsageError

if TYPE_CHECKING:
    from synthkit.bank.reader import Bank, BankBatch

SHUFFLES = ("random", "blocks")


def stream(
    bank: Bank,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    columns: Sequence[str] | None = None,
    shuffle: Shuffle | None = "random",
    prefetch: int = 2,
    block: int | None = None,
    window: int = orders.WINDOW_BLOCKS,
) -> Iterator[BankBatch]:
    """Yield this rank's batches of one epoch; see `Bank.stream`."""
    orders.check_ranks(batch_size, rank, world)
    if prefetch < 0 or start < 0:
        raise UsageError("stream: prefetch and start must be 0 or more", got=(prefetch, start))

    def mine(batch: np.ndarray) -> np.ndarray:
        return orders.rank_rows(batch, rank, world)

    rows, ahead = _plan(bank, batch_size, seed, epoch, shuffle, block, window, columns, mine)

    def read(step: int) -> BankBatch:
        if ahead is not None:
            ahead(step)  # what the steps behind this one need
        return bank.batch(mine(rows(step)), columns)

    return _read_ahead(read, range(start, orders.steps(len(bank), batch_size)), prefetch)


def _plan(
    bank: Bank, size: int, seed: int, epoch: int, shuffle: str | None, block: int | None, window: int,
    columns: Sequence[str] | None, mine: Callable[[np.ndarray], np.ndarray],
) -> tuple[Callable[[int], np.ndarray], Callable[[int], None] | None]:  # fmt: skip
    """(rows of the global batch of a step, what to ask the system for before a step is read)."""
    n = len(bank)
    if shuffle is None:
        distance = -(-32 * bank.block_rows // size)  # steps that make about 8 MiB of images

        def stored(step: int, steps: int = 1) -> np.ndarray:
            return np.arange(min(step * size, n), min((step + steps) * size, n))

        if bank.fits_memory:  # the system reads ahead by itself
            return stored, None
        return stored, lambda step: bank.will_need(mine(stored(step + distance)), columns)
    if shuffle == "random":
        order = orders.random_order(n, seed, epoch)

        def rows(step: int) -> np.ndarray:
            return order[step * size : (step + 1) * size]

        # rows in memory need no announcement, and it costs a system call per row
        return rows, None if bank.fits_memory else lambda step: bank.will_need(mine(rows(step + 1)), columns)
    if shuffle != "blocks":
        raise UsageError("stream: shuffle", got=shuffle, allowed=[*SHUFFLES, "None (stored order)"])
    order = BlockOrder(n=n, seed=seed, epoch=epoch, block=bank.block_rows if block is None else block, window=window)
    windows = _Windows(bank, order, size, columns)
    return windows.rows, windows.announce


class _Windows:
    """Block order: keeps the shuffled rows of the windows in use, and asks for blocks one window ahead."""

    def __init__(self, bank: Bank, order: BlockOrder, size: int, columns: Sequence[str] | None):
        self._bank, self._order, self._size, self._columns = bank, order, size, columns
        self._shuffled: tuple[int, int, np.ndarray] | None = None  # (first position, end, rows)
        self._blocks: tuple[int, np.ndarray] | None = None  # (window, its rows as they lie on the disk)
        self._asked: int | None = None  # position up to which the system was asked

    def rows(self, step: int) -> np.ndarray:
        edges, start = self._order.edges, step * self._size
        stop = min(start + self._size, len(self._order))
        if self._shuffled is None or start < self._shuffled[0] or stop > self._shuffled[1]:
            first, last = self._order.window_at(start), self._order.window_at(stop - 1)
            found = np.concatenate([self._order.rows_of(w) for w in range(first, last + 1)])
            self._shuffled = (int(edges[first]), int(edges[last + 1]), found)
        return self._shuffled[2][start - self._shuffled[0] : stop - self._shuffled[0]]

    def announce(self, step: int) -> None:
        """Ask for the blocks up to one window beyond the batch of `step`; those before were asked for earlier."""
        edges, start = self._order.edges, step * self._size
        present = self._order.window_at(start)
        if self._asked is None:
            self._asked = int(edges[present])
        target = min(len(self._order), start + self._size + int(edges[present + 1] - edges[present]))
        while self._asked < target:
            window = self._order.window_at(self._asked)
            begin, stop = int(edges[window]), min(target, int(edges[window + 1]))
            if self._blocks is None or self._blocks[0] != window:
                self._blocks = (window, self._order.blocks_of(window))
            self._bank.will_need(self._blocks[1][self._asked - begin : stop - begin], self._columns)
            self._asked = stop


def _read_ahead(read: Callable[[int], BankBatch], todo: range, prefetch: int) -> Iterator[BankBatch]:
    if not prefetch:
        yield from map(read, todo)
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="bank-stream")
    waiting: deque[Future[BankBatch]] = deque()
    try:
        for step in todo:
            waiting.append(pool.submit(read, step))
            if len(waiting) > prefetch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when the caller stops early
        pool.shutdown(wait=True, cancel_futures=True)
