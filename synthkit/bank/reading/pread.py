"""Rows read with `pread`: for what is not mapped (banks beyond the memory limit, network folders, untrusted files).

A file that shrinks while it is mapped kills the reader with SIGBUS; here it is a `BankError`. A row costs about one
system call, so this is slower than a map whose pages are in place, and faster than one whose pages are not.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from synthkit.bank.reading.maps import open_checked
from synthkit.errors import BankError

MAX_OPEN = 64  # descriptors kept open
_PIECE = 64 << 20  # bytes of one system call at most (Linux stops at 2 GiB)


class _File:
    """An open descriptor, closed when the last reader lets go of it (another thread may still be reading)."""

    def __init__(self, path: Path, size: int):
        self.path, self.number = path, -1
        self.number = open_checked(path, size)

    def __del__(self):
        if self.number >= 0:
            os.close(self.number)


class FilePool:
    """Files by number, of which the `MAX_OPEN` used last are kept open. Safe to use from several threads.

    Args:
        sizes: (path, bytes that it must have) of every file.
        scattered: only single rows will be read, so the system need not read ahead around them.
    """

    def __init__(self, sizes: Sequence[tuple[Path, int]], *, scattered: bool = False):
        self._sizes, self._scattered = list(sizes), scattered
        self._open: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int) -> _File:
        """File `number`, opened and its size checked. Raises `BankError`."""
        with self._lock:
            file = self._open.get(number)
            if file is None:
                file = self._open[number] = _File(*self._sizes[number])
                if self._scattered and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.number, 0, 0, os.POSIX_FADV_RANDOM)
                if len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
            return file

    def read_into(self, number: int, offset: int, target: memoryview) -> None:
        """Fill `target` (bytes) from byte `offset` of file `number`.

        Raises:
            BankError: the file ends before (it was cut after it was opened), or the system cannot read it.
        """
        read_exactly(self.get(number), offset, target)


def read_exactly(file: _File, offset: int, target: memoryview) -> None:
    """Fill `target` (bytes) from byte `offset`. Raises `BankError` when the file ends before."""
    done = 0
    while done < len(target):
        try:
            count = _pread(file.number, target[done : done + _PIECE], offset + done)
        except OSError as error:
            raise BankError(f"{file.path}: cannot be read: {error.strerror}") from error
        if not count:
            raise BankError(f"{file.path}: ends before byte {offset + len(target)}, it was cut while it was being read",
                            hint=f"run: synthkit bank repair {file.path.parent.parent}")  # fmt: skip
        done += count


def _pread(descriptor: int, target: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, (target,), offset)
    found = _locked_read(descriptor, len(target), offset)
    target[: len(found)] = found
    return len(found)


_seek_lock = threading.Lock()


def _locked_read(descriptor: int, count: int, offset: int) -> bytes:
    """Positioned read where the system has none (macOS before 11 and Windows lack preadv)."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, offset)
    with _seek_lock:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, count)


class FileRows:
    """One column of many files, addressed as one array.

    Args:
        pool: the files.
        numbers: numbers of the files in `pool`, in the order of the rows.
        offsets: byte at which the column begins, per file.
        counts: rows per file.
        row_shape, dtype: of one row.
    """

    def __init__(self, pool: FilePool, numbers: Sequence[int], offsets: Sequence[int], counts: Sequence[int],
                 row_shape: tuple[int, ...], dtype: np.dtype):  # fmt: skip
        self._pool, self._numbers, self._offsets = pool, list(numbers), np.asarray(offsets, np.int64)
        self._starts = np.cumsum([0, *counts])
        self.row_shape, self.dtype = row_shape, dtype
        self._row_bytes = int(np.prod(row_shape, dtype=np.int64)) * dtype.itemsize

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The rows `indices` (int64, in range) as a fresh array, or in `out` (C-contiguous, of the right shape)."""
        if out is None:
            out = np.empty((len(indices), *self.row_shape), self.dtype)
        if len(indices):
            self.read_into(indices, np.arange(len(indices)), out)
        return out

    def read_into(self, indices: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
        """`out[places[i]] = row indices[i]`; neighbours on disk that stay neighbours are read with one call."""
        part, at = self._locate(indices)
        heads, sizes = self._runs(indices, (np.diff(indices) == 1) & (np.diff(places) == 1) & (np.diff(part) == 0))
        runs = np.argsort(indices[heads], kind="stable")  # file by file and forwards: one descriptor at a time
        heads, sizes = heads[runs], sizes[runs]
        target = out.reshape(-1).view(np.uint8).data
        begins = (places[heads] * self._row_bytes).tolist()
        file, current, preadv = None, -1, getattr(os, "preadv", None)
        for number, offset, begin, size in zip(
            part[heads].tolist(), at[heads].tolist(), begins, sizes.tolist(), strict=True
        ):
            if file is None or number != current:
                file, current = self._pool.get(self._numbers[number]), number
            piece = target[begin : begin + size]
            try:  # the usual case without a function call in between: this runs once per image
                whole = preadv is not None and preadv(file.number, (piece,), offset) == size
            except OSError as error:
                raise BankError(f"{file.path}: cannot be read: {error.strerror}") from error
            if not whole:
                read_exactly(file, offset, piece)

    def will_need(self, indices: np.ndarray) -> None:
        """Ask the system to begin reading these rows from the disk; returns at once."""
        if not hasattr(os, "posix_fadvise") or not len(indices):
            return
        indices = np.sort(indices)
        part, at = self._locate(indices)
        heads, sizes = self._runs(indices, (np.diff(indices) <= 1) & (np.diff(part) == 0))
        file, current = None, -1
        for number, offset, size in zip(part[heads].tolist(), at[heads].tolist(), sizes.tolist(), strict=True):
            if file is None or number != current:
                file, current = self._pool.get(self._numbers[number]), number
            os.posix_fadvise(file.number, offset, size, os.POSIX_FADV_WILLNEED)

    def _runs(self, indices: np.ndarray, follows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first place, bytes) of each run of rows that lie one behind the other; `follows` says it of neighbours."""
        heads = np.flatnonzero(np.concatenate([[True], ~follows]))
        return heads, np.diff(np.append(heads, len(indices))) * self._row_bytes

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(file, byte) of each row."""
        part = np.searchsorted(self._starts, indices, side="right") - 1
        return part, self._offsets[part] + (indices - self._starts[part]) * self._row_bytes
