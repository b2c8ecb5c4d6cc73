"""Gathering rows that lie in many memory maps as fast as from one array."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided


class RowGather:
    """Rows of several equally shaped arrays, addressed as one.

    Grouping a batch by shard costs a few microseconds per shard, more than the copy of the rows themselves. Instead
    all arrays are seen through one strided view that begins at the lowest address and steps by the greatest common
    divisor of all row addresses; a table turns row numbers into steps. One indexing operation then copies any batch.
    Only addresses from the table are ever touched, and the arrays stay referenced here.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self._parts = list(parts)
        self._starts = np.cumsum([0] + [len(p) for p in self._parts])
        self._view: np.ndarray | None = None
        if len(self._parts) > 1 and all(p.flags.c_contiguous and len(p) for p in self._parts):
            self._join()

    def _join(self) -> None:
        addresses = np.array([p.__array_interface__["data"][0] for p in self._parts], dtype=np.int64)
        first = self._parts[int(addresses.argmin())]
        row_bytes = first.strides[0]
        step = int(np.gcd.reduce(np.append(addresses - addresses.min(), row_bytes)))
        offsets = (addresses - addresses.min()) // step
        span = int(offsets.max()) + max(len(p) for p in self._parts) * (row_bytes // step)
        if span * math.prod(first.shape[1:]) * first.itemsize >= 2**62:  # numpy refuses larger views; group instead
            return
        shape, strides = (span, *first.shape[1:]), (step, *first.strides[1:])
        self._view = as_strided(first, shape=shape, strides=strides, writeable=False)
        counts = [np.arange(len(p), dtype=np.int64) for p in self._parts]
        self._table = np.concatenate([o + c * (row_bytes // step) for o, c in zip(offsets, counts, strict=True)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The rows `indices` (int64, every one in range: the caller has checked) as a fresh array."""
        if len(self._parts) == 1:
            return self._parts[0][indices]
        if self._view is not None:
            return self._view[self._table[indices]]
        return self._grouped(indices)

    def _grouped(self, indices: np.ndarray) -> np.ndarray:
        part = np.searchsorted(self._starts, indices, side="right") - 1
        rows = np.empty((len(indices), *self._parts[0].shape[1:]), dtype=self._parts[0].dtype)
        for number in np.unique(part):
            chosen = np.flatnonzero(part == number)
            rows[chosen] = self._parts[number][indices[chosen] - self._starts[number]]
        return rows
