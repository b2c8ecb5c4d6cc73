"""What the whole-array formats (npz, safetensors, pt) share: which arrays there are, and streaming one column."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from synthkit.bank.export.source import Source
from synthkit.bank.shard import COLUMNS

EVERYTHING = tuple(COLUMNS)
MAX_NAME_BYTES = 64 << 20  # of class names as one array of equal widths


@dataclass(frozen=True)
class ArrayPlan:
    """One array of the export: a column of the bank that is streamed, or a small array as it is."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    column: str | None = None
    value: np.ndarray | None = None

    @property
    def bytes(self) -> int:
        """Size of its numbers."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def pieces(self, source: Source, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
        """The array piece by piece, C-contiguous and little-endian."""
        if self.value is not None:
            yield self.value
            return
        assert self.column is not None
        for _, piece in source.pieces([self.column]):
            yield piece[self.column]
            advance(len(piece[self.column]))


def plan_columns(source: Source, columns: list[str]) -> list[ArrayPlan]:
    """The arrays of `columns`, under the bank's names."""
    return [ArrayPlan(c, source.dtype(c), (source.count, *source.row_shape(c)), column=c) for c in columns]


def plan_extras(source: Source) -> list[ArrayPlan]:
    """mean and std (float64), and the arrays of the transform as `transform.NAME`."""
    found = [_small("mean", np.array(source.spec.mean)), _small("std", np.array(source.spec.std))]
    arrays, _ = source.bank.transform() or ({}, {})
    return found + [_small(f"transform.{name}", value) for name, value in sorted(arrays.items())]


def class_name_array(names: list[str]) -> np.ndarray | None:
    """Class names as one array of text; None where equal widths would waste more than 64 MiB."""
    if max(map(len, names), default=0) * 4 * len(names) > MAX_NAME_BYTES:
        return None
    return np.array(names, dtype=np.str_).astype("<U" + str(max(1, *map(len, names), 1)))


def _small(name: str, value: Any) -> ArrayPlan:
    array = np.asarray(value)
    array = np.require(array.astype(array.dtype.newbyteorder("<"), copy=False), requirements="C")
    return ArrayPlan(name, array.dtype, array.shape, value=array)


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array, without a copy."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
