"""The columns of many shard files as arrays that are read by row: what a bank and a label set have in common."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from synthkit.bank.reading.gather import RowGather, SplitRows
from synthkit.bank.reading.maps import FileMaps
from synthkit.bank.reading.memory import usable_memory
from synthkit.bank.reading.pread import FilePool, FileRows
from synthkit.bank.shard import Sidecar

RESIDENT_COLUMN_BYTES = 64 << 20  # columns up to this size are read once and kept
MAX_MAPS = 16_384  # Linux allows 65,530 maps to a process


class Rows(Protocol):
    """A column that is read by row."""

    @property
    def row_shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def rows(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray: ...


class ShardColumns:
    """Columns of `shards`, opened at the first read and anew in each process.

    Args:
        shards: (file, its checked record), in the order of the rows; each holds every column that will be asked for.
        mapped: whether to read through memory maps; False reads by `pread`: slower, but a file that is cut while it is
            read is a `BankError` and not a SIGBUS.
        mapped_bytes: maps cover at most this much, counted from the first shard, and the rest is read by `pread`; none
            takes half of the memory that this process may use (machine or container).

    Raises (when rows are read):
        BankError: a file is missing, a link, not of its recorded size, or cannot be read.
    """

    def __init__(self, shards: Sequence[tuple[Path, Sidecar]], *, mapped: bool = True, mapped_bytes: int | None = None):
        self._shards, self._mapped, self._mapped_bytes = list(shards), mapped, mapped_bytes
        self._clear()

    def _clear(self) -> None:
        self._maps: list[np.ndarray] | None = None
        self._pool: FilePool | None = None
        self._rows: dict[str, Rows] = {}
        self._ahead: dict[str, FileRows] = {}
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:  # maps do not travel to another process; it opens its own
        return {k: v for k, v in self.__dict__.items() if k not in ("_maps", "_pool", "_rows", "_ahead", "_pid")}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update(kept)
        self._clear()

    def column(self, name: str) -> Rows:
        """Column `name`, to be read by row; small ones are held in memory."""
        if self._pid != os.getpid():
            self._clear()
        found = self._rows.get(name)
        if found is None:
            found = self._rows[name] = self._open(name)
        return found

    @property
    def all_mapped(self) -> bool:
        """Whether every file is (or will be) mapped: the whole set is within the limit."""
        return self._boundary() == len(self._shards)

    def will_need(self, name: str, indices: np.ndarray) -> None:
        """Ask the system to begin loading these rows from the disk (int64, in range); returns at once."""
        rows = self.column(name)
        if self._resident(name):
            return
        if name not in self._ahead:
            whole = isinstance(rows, FileRows)
            self._ahead[name] = rows if whole else self._file_rows(name, range(len(self._shards)))
        self._ahead[name].will_need(indices)

    def _resident(self, name: str) -> bool:
        return name != "images" and self._column_bytes(name) <= RESIDENT_COLUMN_BYTES

    def _open(self, name: str) -> Rows:
        if self._maps is None or self._pool is None:
            self._open_files()
        assert self._maps is not None and self._pool is not None
        every = range(len(self._shards))
        if self._resident(name):
            rows = self._file_rows(name, every)
            return RowGather([rows.rows(np.arange(len(rows)))])
        split = len(self._maps)
        if split == 0:
            return self._file_rows(name, every)
        mapped = RowGather([self._mapped_part(name, i) for i in range(split)])
        return mapped if split == len(self._shards) else SplitRows(mapped, self._file_rows(name, every[split:]))

    def _open_files(self) -> None:
        sizes = [(path, record.bytes) for path, record in self._shards]
        split = self._boundary()
        scattered = split < len(sizes)
        self._pool = FilePool(sizes, scattered=scattered)
        large = [name for name in self._shards[0][1].datasets if self._row_bytes(name) >= 256]
        try:
            self._maps = FileMaps(sizes[:split], [self._row_bytes(n) for n in large], scattered=scattered).files
        except OSError:  # no addresses or maps left (ulimit -v, vm.max_map_count): the files can still be read
            self._maps = []

    def _boundary(self) -> int:
        """How many shards, from the first, are mapped."""
        if not self._mapped:
            return 0
        limit = usable_memory() // 2 if self._mapped_bytes is None else self._mapped_bytes
        ends = np.cumsum([record.bytes for _, record in self._shards])
        return min(int(np.searchsorted(ends, limit, side="right")), MAX_MAPS)

    def _row_bytes(self, name: str) -> int:
        place = self._shards[0][1].datasets[name]
        return int(np.prod(place.shape[1:], dtype=np.int64)) * place.dtype.itemsize

    def _column_bytes(self, name: str) -> int:
        return self._row_bytes(name) * sum(record.n for _, record in self._shards)

    def _mapped_part(self, name: str, number: int) -> np.ndarray:
        assert self._maps is not None
        place = self._shards[number][1].datasets[name]
        count = int(np.prod(place.shape, dtype=np.int64))
        flat = np.frombuffer(self._maps[number], dtype=place.dtype, count=count, offset=place.offset)
        return flat.reshape(place.shape)

    def _file_rows(self, name: str, numbers: Sequence[int]) -> FileRows:
        assert self._pool is not None
        places = [self._shards[i][1].datasets[name] for i in numbers]
        counts = [self._shards[i][1].n for i in numbers]
        return FileRows(
            self._pool, numbers, [p.offset for p in places], counts, tuple(places[0].shape[1:]), places[0].dtype
        )
