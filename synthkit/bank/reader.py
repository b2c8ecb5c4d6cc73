"""Reading a bank: rows are gathered straight from memory maps of the shard files, without the HDF5 parser."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.bank import state
from synthkit.bank.errors import BankIndexError
from synthkit.bank.gather import RowGather
from synthkit.bank.shard import COLUMNS, Sidecar, committed_shards, read_sidecar, shard_file
from synthkit.bank.spec import BankSpec, read_record
from synthkit.bank.storage import regular_size
from synthkit.errors import BankError, UsageError

if TYPE_CHECKING:
    from synthkit.bank.verify import VerifyReport

RESIDENT_COLUMN_BYTES = 64 << 20  # columns up to this size are read once and kept


@dataclass(kw_only=True)
class BankBatch:
    """Rows of a bank; a column that the bank (or the request) does not have is None."""

    images: np.ndarray | None = None
    """uint8 (N,C,H,W)."""
    labels: np.ndarray | None = None
    """int32 (N,)."""
    logits: np.ndarray | None = None
    """float16 (N,K), the teacher's."""
    difficulty: np.ndarray | None = None
    """float32 (N,)."""
    origin_step: np.ndarray | None = None
    """uint32 (N,), the step of the run that made the image."""
    origin_seed: np.ndarray | None = None
    """uint64 (N,); read only when asked for by name."""
    images_f16: np.ndarray | None = None
    """float16 (N,C,H,W), training pixels outside [0,1] (see `Bank.transform`); read only when asked for by name."""
    topk_index: np.ndarray | None = None
    """uint16 or uint32 (N,k), the classes of `topk_logit`."""
    topk_logit: np.ndarray | None = None
    """float16 (N,k), the teacher's logits of k classes."""
    tail_logsumexp: np.ndarray | None = None
    """float32 (N,), logsumexp of the teacher's logits of all other classes."""

    def __len__(self) -> int:
        return next((len(v) for v in vars(self).values() if v is not None), 0)


class Bank:
    """A bank of images on disk; `len`, `bank[3:7]`, `bank.batch(indices)`, `bank.column("labels")`.

    An unfinished bank can be read: it holds the shards that are committed now.

    Raises:
        BankNotFoundError: `path` holds no bank.
        BankError: bank.json or a sidecar is damaged, or written by a newer synthkit.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.spec: BankSpec
        self.spec, self.record = read_record(self.path)
        committed = committed_shards(self.path, self.spec)
        try:
            self.sidecars: list[Sidecar] = [
                read_sidecar(shard_file(self.path, i).with_suffix(".json"), i, self.spec) for i in committed
            ]
        except BankError as error:
            hint = f"synthkit bank verify {self.path} lists the damage, bank repair sets it aside"
            raise BankError(str(error), hint=hint) from error
        self._starts = np.cumsum([0] + [s.n for s in self.sidecars])
        self._clear()

    def _clear(self) -> None:
        self._maps: list[mmap.mmap] | None = None
        self._gathers: dict[str, RowGather] = {}
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:  # maps do not travel to another process; it opens its own
        kept = {k: v for k, v in self.__dict__.items() if k not in ("_maps", "_gathers", "_pid")}
        return kept

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update(kept)
        self._clear()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.spec.shape

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.spec.num_classes

    @property
    def class_names(self) -> list[str]:
        """One name per class (numbers where none were given)."""
        return self.spec.names()

    @property
    def mean(self) -> list[float]:
        """Channel means the teacher normalises with."""
        return self.spec.mean

    @property
    def std(self) -> list[float]:
        """Channel standard deviations the teacher normalises with."""
        return self.spec.std

    @property
    def complete(self) -> bool:
        """Whether every planned shard is committed."""
        return len(self.sidecars) == self.spec.shards

    @property
    def columns(self) -> list[str]:
        """Columns that every committed shard has."""
        return [c for c in COLUMNS if self.sidecars and all(c in s.datasets for s in self.sidecars)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        size = "x".join(str(v) for v in self.shape)
        unfinished = "" if self.complete else f", unfinished: {len(self.sidecars)} of {self.spec.shards} shards"
        return f"Bank({str(self.path)!r}, {len(self):,} images {size}, {self.num_classes} classes{unfinished})"

    def _repr_html_(self) -> str:
        from synthkit.report.grid import grid_html

        return grid_html(self)

    def has(self, column: str) -> bool:
        """Whether every committed shard has `column`."""
        return column in self.columns

    def column(self, name: str) -> np.ndarray:
        """The whole column as one array (a copy). Raises `UsageError` when the bank does not have it."""
        parts = self._arrays(name)
        return np.concatenate(parts) if parts else np.empty((0,))

    def batch(self, indices: Iterable[int] | np.ndarray, columns: Sequence[str] | None = None) -> BankBatch:
        """The rows `indices` (any order, repeats allowed), as fresh arrays.

        Args:
            indices: integers from 0 to len - 1. Negative ones are refused: here they are a mistake.
            columns: what to read; none reads all that the bank has but origin_seed and images_f16.

        Raises:
            BankIndexError: an index is out of range or no integer.
            BankError: a shard is missing or has not its recorded size.
        """
        rows = self._checked(indices)
        if columns is None:
            columns = [c for c in self.columns if c not in ("origin_seed", "images_f16")]
        return BankBatch(**{name: self._gather(name).rows(rows) for name in columns})

    def __getitem__(self, key: int | slice | Sequence[int] | np.ndarray) -> BankBatch:
        """`bank[i]` (one row, negative counts from the end), `bank[i:j]`, `bank[[3, 1, 2]]`."""
        if isinstance(key, slice):
            return self.batch(np.arange(*key.indices(len(self))))
        if isinstance(key, (int, np.integer)):
            return self.batch([int(key) + len(self) if key < 0 else int(key)])
        return self.batch(key)

    def __iter__(self):
        raise TypeError("a bank is not iterated image by image; use bank.batches(...) or bank[i:j]")

    def batches(self, size: int, *, seed: int | None = None, epoch: int = 0):
        """Yield `BankBatch`es of `size` rows over the whole bank, in stored order or (with a seed) in random order."""
        if size < 1:
            raise UsageError("batches: size must be at least 1", got=size)
        order = np.arange(len(self)) if seed is None else self.order(epoch, seed)
        for start in range(0, len(self), size):
            yield self.batch(order[start : start + size])

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """The random order of one epoch: a permutation (int64) that depends on (len, seed, epoch) alone.

        Built from raw generator bits and a stable sort, so that no numpy release can change it.
        """
        bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(len(self))
        return np.argsort(bits, kind="stable")

    def generators(self) -> list[state.GeneratorRecord]:
        """The generator snapshots that the bank carries, in order. Raises `BankError` when one is damaged."""
        folder = self.path / "generators"
        return [state.read_entry(folder, i) for i in state.entries(folder)]

    def transform(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """(arrays, meta) of the transform behind `images_f16`, its sha256 checked; None where there is none.

        Raises:
            BankError: it is missing, damaged, or not the one that bank.json names.
        """
        if not self.spec.transform:
            return None
        record = state.read_transform(self.path, self.spec.transform)
        return record.load(), record.meta

    def info(self) -> dict[str, Any]:
        """What `bank info` prints, as plain data; reads no shard."""
        from synthkit.bank.info import info

        return info(self)

    def verify(self, deep: bool = False) -> VerifyReport:
        """Check every file of the bank against its record; `deep` looks at the values too."""
        from synthkit.bank.verify import verify

        return verify(self.path, deep=deep)

    def _checked(self, indices: Iterable[int] | np.ndarray) -> np.ndarray:
        rows = np.asarray(indices if isinstance(indices, (np.ndarray, list, tuple, range)) else list(indices))
        if rows.size == 0:
            return np.zeros(0, dtype=np.int64)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise BankIndexError("batch: indices must be a flat list of integers", got=f"{rows.dtype} {rows.shape}")
        if rows.dtype == np.uint64 and rows.max() > np.iinfo(np.int64).max:
            raise BankIndexError(f"batch: the bank has images 0 to {len(self) - 1}", got=int(rows.max()))
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        if rows.view(np.uint64).max() >= len(self):  # seen as unsigned, a negative index is a huge one
            bad = rows[(rows < 0) | (rows >= len(self))][0]
            raise BankIndexError(f"batch: the bank has images 0 to {len(self) - 1}", got=int(bad))
        return rows

    def _gather(self, name: str) -> RowGather:
        if self._pid != os.getpid():
            self._clear()
        if name not in self._gathers:
            parts = self._arrays(name)
            if name != "images" and sum(p.nbytes for p in parts) <= RESIDENT_COLUMN_BYTES and parts:
                parts = [np.concatenate(parts)]
            self._gathers[name] = RowGather(parts)
        return self._gathers[name]

    def _arrays(self, name: str) -> list[np.ndarray]:
        """`name` of every shard as arrays over the memory maps, read-only."""
        if not self.sidecars:
            raise BankError(f"{self.path}: no shard is committed yet", hint="go on with: synthkit synthesize --resume")
        if name not in self.columns:
            raise UsageError(f"{self.path}: the bank has no such column", got=name, allowed=self.columns)
        if self._maps is None or self._pid != os.getpid():
            self._clear()
            self._maps = [_map(shard_file(self.path, s.index), s) for s in self.sidecars]
        arrays = []
        for mapped, sidecar in zip(self._maps, self.sidecars, strict=True):
            place = sidecar.datasets[name]
            flat = np.frombuffer(mapped, dtype=place.dtype, count=math.prod(place.shape), offset=place.offset)
            arrays.append(flat.reshape(place.shape))
        return arrays


def _map(path: Path, sidecar: Sidecar) -> mmap.mmap:
    """A read-only map of a shard file of exactly the recorded size (the offsets were checked against that size)."""
    size = regular_size(path)
    if size != sidecar.bytes:
        raise BankError(f"{path}: has {size} bytes, its record says {sidecar.bytes}",
                        hint=f"run: synthkit bank repair {path.parent.parent}, then synthesize --resume")  # fmt: skip
    try:
        with open(path, "rb") as stream:
            return mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise BankError(f"{path}: cannot be read: {error}") from error
