"""Gathering rows that lie in many memory maps as fast as from one array."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import as_strided

if TYPE_CHECKING:
    from synthkit.bank.reading.pread import FileRows


class RowGather:
    """Rows of several equally shaped arrays, addressed as one.

    Grouping a batch by shard costs a few microseconds per shard, more than the copy of the rows themselves. Instead
    all arrays are seen through one view that begins at the lowest address and steps by the greatest common divisor
    of all row addresses; a jump per array turns row numbers into steps. One operation then copies any batch: `take`
    where a step is a row (maps.py places the files so), indexing otherwise. Only addresses inside the arrays are ever
    touched, and the arrays stay referenced here.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self._parts = list(parts)
        self._starts = np.cumsum([0] + [len(p) for p in self._parts])
        self._view: np.ndarray | None = None
        self._jumps: np.ndarray | None = None
        if len(self._parts) == 1 and self._parts[0].flags.c_contiguous:
            self._view, self._scale = self._parts[0], 1
        elif len(self._parts) > 1 and all(p.flags.c_contiguous and p.size for p in self._parts):
            self._join()

    def _join(self) -> None:
        addresses = np.array([p.__array_interface__["data"][0] for p in self._parts], dtype=np.int64)
        first = self._parts[int(addresses.argmin())]
        row_bytes = first.strides[0]
        step = int(np.gcd.reduce(np.append(addresses - addresses.min(), row_bytes)))
        offsets = (addresses - addresses.min()) // step
        self._scale = row_bytes // step
        span = int(offsets.max()) + max(len(p) for p in self._parts) * self._scale
        if span * math.prod(first.shape[1:]) * first.itemsize >= 2**62:  # numpy refuses larger views; group instead
            return
        shape, strides = (span, *first.shape[1:]), (step, *first.strides[1:])
        self._view = as_strided(first, shape=shape, strides=strides, writeable=False)
        self._jumps = offsets - self._starts[:-1] * self._scale
        lengths = {len(p) for p in self._parts[:-1]}
        # shards are equally long but for the last one: then a division finds the shard, and no table is needed
        self._length = lengths.pop() if len(lengths) == 1 and len(self._parts[-1]) <= len(self._parts[0]) else 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self._parts[0].shape[1:]

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        return self._parts[0].dtype

    def rows(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The rows `indices` (int64, every one in range: the caller has checked) as a fresh array, or in `out`."""
        if self._view is None:
            return self._grouped(indices, out)
        if self._jumps is not None:
            part = indices // self._length if self._length else np.searchsorted(self._starts, indices, "right") - 1
            indices = (indices if self._scale == 1 else indices * self._scale) + self._jumps.take(part)
        if self._view.flags.c_contiguous:  # otherwise `take` would copy the whole view first
            return self._view.take(indices, 0, out, "clip")  # "clip": the other modes buffer `out`
        if out is None:
            return self._view[indices]
        out[...] = self._view[indices]
        return out

    def _grouped(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        part = np.searchsorted(self._starts, indices, side="right") - 1
        rows = np.empty((len(indices), *self.row_shape), dtype=self.dtype) if out is None else out
        for number in np.unique(part):
            chosen = np.flatnonzero(part == number)
            rows[chosen] = self._parts[number][indices[chosen] - self._starts[number]]
        return rows


class SplitRows:
    """The first rows from memory maps, the others read from their files: maps stay within a limit, whatever the bank.

    Reading an unmapped row costs one system call. The alternative, mapping everything and dropping pages again and
    again, costs a page fault per row, which is slower (measured with 3 GB of 3 kB rows and a limit of 1 GiB: 0.40 M
    rows/s against 0.59 M/s by system calls alone).
    """

    def __init__(self, mapped: RowGather, unmapped: FileRows):
        self._mapped, self._unmapped, self._boundary = mapped, unmapped, len(mapped)
        self.row_shape, self.dtype = unmapped.row_shape, unmapped.dtype

    def __len__(self) -> int:
        return self._boundary + len(self._unmapped)

    def rows(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The rows `indices` (int64, in range) as a fresh array, or in `out`."""
        inside = indices < self._boundary
        if inside.all():
            return self._mapped.rows(indices, out)
        if out is None:
            out = np.empty((len(indices), *self.row_shape), self.dtype)
        near, far = np.flatnonzero(inside), np.flatnonzero(~inside)
        if len(near):
            out[near] = self._mapped.rows(indices[near])
        self._unmapped.read_into(indices[far] - self._boundary, far, out)
        return out
