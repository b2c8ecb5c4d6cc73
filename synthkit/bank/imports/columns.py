"""Arrays that are read piece by piece: in memory, in a zip of .npy files, as torch tensors, in safetensors."""

from __future__ import annotations

import contextlib
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from synthkit.errors import DataError

MAX_SMALL = 1 << 24
"""Bytes at most of an array that is read at once (class names, mean, learning rate)."""


class Column(Protocol):
    """An array of rows that can be read from the start any number of times."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def chunks(self, rows: int) -> Iterator[np.ndarray]:
        """Consecutive pieces of `rows` rows (the last may be shorter)."""
        ...

    def whole(self) -> np.ndarray:
        """The array at once; `small` asks only for small ones."""
        ...


class MemoryColumn:
    """An array in memory."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def chunks(self, rows: int) -> Iterator[np.ndarray]:
        """Views of the array."""
        for start in range(0, len(self.array), rows):
            yield self.array[start : start + rows]

    def whole(self) -> np.ndarray:
        """The array itself."""
        return self.array


class SlicedColumn:
    """Rows that `read(slice)` returns as an array: torch tensors and safetensors slices, both memory-mapped."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[slice | None], np.ndarray]):
        self.shape, self.dtype, self._read = shape, dtype, read

    def chunks(self, rows: int) -> Iterator[np.ndarray]:
        """Pieces, read on demand."""
        for start in range(0, self.shape[0], rows):
            yield self._read(slice(start, min(start + rows, self.shape[0])))

    def whole(self) -> np.ndarray:
        """Everything at once."""
        return self._read(None)


class NpyMember:
    """A .npy file inside a zip, decompressed as a stream: memory is bounded whatever its header claims."""

    def __init__(self, path: Path, member: str):
        self.path, self.member, self.where = path, member, f"{path}: {member}"
        with self._open() as stream:
            self.shape, fortran, self.dtype = _header(stream, self.where)
            start = stream.tell()
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(member).file_size
        if self.dtype.hasobject:
            raise DataError(f"{self.where} holds pickled objects; loading them could run any code",
                            hint="save plain arrays")  # fmt: skip
        if start + math.prod(self.shape) * self.dtype.itemsize != size:
            raise DataError(f"{self.where} claims shape {self.shape}, but holds {size - start:,} bytes")
        if fortran and len(self.shape) > 1:
            raise DataError(f"{self.where} is stored in Fortran order", hint="save numpy.ascontiguousarray(array)")

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        with zip_errors(self.path), zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
            yield stream

    def chunks(self, rows: int) -> Iterator[np.ndarray]:
        """Pieces, decompressed on demand; the zip's checksum is compared at the end."""
        row = math.prod(self.shape[1:])
        with self._open() as stream:
            _header(stream, self.where)
            for start in range(0, self.shape[0], rows):
                count = min(rows, self.shape[0] - start)
                data = _exactly(stream, count * row * self.dtype.itemsize, self.where)
                yield np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])
            stream.read(1)  # at the end of the member zipfile compares its checksum

    def whole(self) -> np.ndarray:
        """Everything at once."""
        with self._open() as stream:
            _header(stream, self.where)
            data = _exactly(stream, math.prod(self.shape) * self.dtype.itemsize, self.where)
            return np.frombuffer(data, self.dtype).reshape(self.shape)


@contextlib.contextmanager
def zip_errors(path: Path) -> Iterator[None]:
    """Turn what a damaged zip raises into a `DataError`."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, KeyError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a whole npz file ({reason})", hint="write it with numpy.savez") from error


def _header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order?, dtype); numpy parses the header as a literal, nothing in it is run."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)  # numpy refuses headers of over 10,000 bytes
    except (ValueError, OSError, EOFError, SyntaxError, TypeError, tokenize.TokenError, RecursionError,
            MemoryError) as error:  # fmt: skip  # numpy parses the header as Python text and lets all of these through
        raise DataError(f"{where}: not a plain .npy array ({' '.join(str(error).split())[:120]})") from error
    if any(side < 0 for side in shape):
        raise DataError(f"{where}: claims a negative side", got=shape)
    return shape, fortran, dtype


def _exactly(stream: IO[bytes], count: int, where: str) -> bytes:
    parts, left = [], count
    while left:
        piece = stream.read(min(left, 1 << 24))
        if not piece:
            raise DataError(f"{where}: ends {left:,} bytes early", hint="the file is truncated")
        parts.append(piece)
        left -= len(piece)
    return b"".join(parts)


def small(column: Column, where: str) -> np.ndarray:
    """A small array, read at once. Raises `DataError` when it has more than 16 MiB."""
    if math.prod(column.shape) * column.dtype.itemsize > MAX_SMALL:
        raise DataError(f"{where}: is too large for what it is", got=column.shape)
    return column.whole()


def together(columns: dict[str, Column], rows: int) -> Iterator[dict[str, np.ndarray]]:
    """The same rows of several columns of equal length, `rows` at a time."""
    streams = {name: column.chunks(rows) for name, column in columns.items()}
    for pieces in zip(*streams.values(), strict=True):
        yield dict(zip(streams, pieces, strict=True))
