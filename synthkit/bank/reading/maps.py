"""Read-only memory maps of many files in one stretch of addresses.

Python's `mmap` keeps a descriptor open for every map, so a bank of 2,000 shards would meet the usual limit of 1,024.
Here a stretch of addresses is reserved once and each file is mapped into its slot of it; the descriptor is closed at
once. Because the slots are ours to place, the rows of all files can be put on one grid of row addresses, and a batch
from any number of files is one `numpy.take` (see gather.py).
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from synthkit.bank.disk.storage import regular_size
from synthkit.errors import BankError

_PROT_NONE, _MAP_FIXED = 0, 0x10  # the same on Linux, macOS and the BSDs; Python's mmap module does not name them
_FAILED = ctypes.c_void_p(-1).value
_MAX_GRID = 16 << 20  # bytes; a coarser grid than this would waste addresses, rows are then reached file by file


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """mmap, munmap and madvise with their types; None where the system has none or pointers are short."""
    if os.name != "posix" or ctypes.sizeof(ctypes.c_void_p) < 8:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


class _Region:
    """A reserved stretch of addresses that is given back when nothing refers to it any more."""

    def __init__(self, libc: ctypes.CDLL, size: int):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # without access it costs no memory
        address = libc.mmap(None, size, _PROT_NONE, flags, -1, 0)
        if address in (None, _FAILED):
            raise OSError(ctypes.get_errno(), f"cannot reserve {size} bytes of addresses")
        self.address: int = address
        # numpy keeps this object as the base of every array made from it, and with it the maps
        self.__array_interface__ = {"data": (address, True), "shape": (size,), "typestr": "|u1", "version": 3}
        weakref.finalize(self, libc.munmap, address, size).atexit = False


class FileMaps:
    """`files[i]` is file i as a read-only uint8 array over its map.

    Args:
        sizes: (path, bytes that it must have) of every file.
        row_bytes: sizes of the rows that will be gathered; slots are spaced by a multiple of each (where that stays
            small), so that rows at equal offsets of different files lie on one grid.
        scattered: only single rows will be read, so the system need not read ahead around them.

    Raises:
        BankError: a file is missing, not regular, or has another size.
        OSError: the system refuses more maps.
    """

    def __init__(self, sizes: Sequence[tuple[Path, int]], row_bytes: Sequence[int] = (), *, scattered: bool = False):
        libc = _libc()
        if libc is None:
            self.files = [np.frombuffer(_python_map(path, size), np.uint8) for path, size in sizes]
            return
        spacing = mmap.PAGESIZE
        for value in row_bytes:
            finer = math.lcm(spacing, value)
            spacing = finer if finer <= _MAX_GRID else spacing
        starts = np.cumsum([0] + [-(-size // spacing) * spacing for _, size in sizes]).tolist()
        region = _Region(libc, max(starts[-1], mmap.PAGESIZE))
        for (path, size), start in zip(sizes, starts, strict=False):
            _place(libc, region.address + start, path, size)
        if scattered and hasattr(mmap, "MADV_RANDOM"):
            libc.madvise(region.address, starts[-1], mmap.MADV_RANDOM)
        whole = np.asarray(region)
        self.files = [whole[start : start + size] for (_, size), start in zip(sizes, starts, strict=False)]


def _place(libc: ctypes.CDLL, address: int, path: Path, size: int) -> None:
    descriptor = open_checked(path, size)
    try:
        if size and libc.mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0) != address:
            number = ctypes.get_errno()
            raise OSError(number, f"{path}: cannot be mapped ({os.strerror(number)})")
    finally:
        os.close(descriptor)


def _python_map(path: Path, size: int) -> mmap.mmap:
    descriptor = open_checked(path, size)
    try:
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise BankError(f"{path}: cannot be read: {error}") from error
    finally:
        os.close(descriptor)


def open_checked(path: Path, size: int) -> int:
    """A descriptor of the regular file `path` that has exactly `size` bytes. Raises `BankError` otherwise."""
    found = regular_size(path)
    if found == size:
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(path, flags)
        except OSError as error:
            raise BankError(f"{path}: cannot be read: {error.strerror}") from error
        found = os.fstat(descriptor).st_size
        if found == size:
            return descriptor
        os.close(descriptor)
    raise BankError(f"{path}: has {found} bytes, its record says {size}",
                    hint=f"run: synthkit bank repair {path.parent.parent}, then synthesize --resume")  # fmt: skip
