"""Reading a bank: rows are gathered straight from memory maps of the shard files, without the HDF5 parser."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.bank import state
from synthkit.bank.card import REAL_LABEL
from synthkit.bank.errors import BankIndexError
from synthkit.bank.labels.sets import LabelSet, label_sets
from synthkit.bank.reading import order
from synthkit.bank.reading.columns import Rows, ShardColumns
from synthkit.bank.shard import COLUMNS, Sidecar, committed_shards, read_sidecar, shard_file
from synthkit.bank.spec import BankSpec, read_record
from synthkit.errors import BankError, UsageError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from synthkit.bank.checking.verify import VerifyReport
    from synthkit.bank.reading.resident import ResidentBank

ON_REQUEST = ("origin_seed", "images_f16")  # columns that are read only when they are named


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

    Args:
        mapped: whether to read through memory maps; False reads by `pread`: slower, and right for network folders and
            untrusted files, where a shard that is cut while it is read must be a `BankError` and not a SIGBUS.
        mapped_bytes: the maps cover at most this much, the other shards are read by `pread`; none takes half of the
            memory that this process may use. It bounds the resident memory of random reads over any bank.

    Raises:
        BankNotFoundError: `path` holds no bank.
        BankError: bank.json or a sidecar is damaged, or written by a newer synthkit.
    """

    def __init__(self, path: str | Path, *, mapped: bool = True, mapped_bytes: int | None = None):
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
        self._length = sum(s.n for s in self.sidecars)
        self._columns = [c for c in COLUMNS if self.sidecars and all(c in s.datasets for s in self.sidecars)]
        self._default = [c for c in self._columns if c not in ON_REQUEST]
        files = [(shard_file(self.path, s.index), s) for s in self.sidecars]
        self._stored = ShardColumns(files, mapped=mapped, mapped_bytes=mapped_bytes)

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
        return list(self._columns)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        size = "x".join(str(v) for v in self.shape)
        unfinished = "" if self.complete else f", unfinished: {len(self.sidecars)} of {self.spec.shards} shards"
        real = f", {REAL_LABEL}" if self.spec.contains_real else ""
        return f"Bank({str(self.path)!r}, {len(self):,} images {size}, {self.num_classes} classes{real}{unfinished})"

    def _repr_html_(self) -> str:
        from synthkit.report.grid import grid_html

        return grid_html(self)

    def show(
        self, per_class: int = 10, *, max_classes: int = 20, classes: Sequence[int] | None = None,
        title: str | None = None,
    ) -> Image:  # fmt: skip
        """A picture of the bank as a PIL image: one row per class, from easy to hard (see `report/grid.py`).

        Raises:
            UsageError: a number is out of range. BankError: the bank is damaged, or no shard is committed yet.
        """
        from synthkit.report.grid import grid_image

        return grid_image(self, per_class, max_classes=max_classes, classes=classes, title=title)

    def has(self, column: str) -> bool:
        """Whether every committed shard has `column`."""
        return column in self._columns

    def column(self, name: str) -> np.ndarray:
        """The whole column as one array (a copy). Raises `UsageError` when the bank does not have it."""
        return self._rows(name).rows(np.arange(len(self)))

    def batch(
        self,
        indices: Iterable[int] | np.ndarray,
        columns: Sequence[str] | None = None,
        *,
        out: Mapping[str, np.ndarray] | None = None,
    ) -> BankBatch:
        """The rows `indices` (any order, repeats allowed), as fresh arrays.

        Args:
            indices: integers from 0 to len - 1. Negative ones are refused: here they are a mistake.
            columns: what to read; none reads all that the bank has but origin_seed and images_f16.
            out: arrays to read into, by column: of the column's dtype, C-contiguous, with at least as many rows as
                `indices`; the batch then holds their first rows. For buffers that are used again, e.g. pinned ones
                (`tensor.numpy()`); ordinary ones are no faster than fresh arrays. Columns without one get those.

        Raises:
            BankIndexError: an index is out of range or no integer.
            BankError: a shard is missing or has not its recorded size.
            UsageError: an array of `out` does not fit.
        """
        rows = self._checked(indices)
        names = self._default if columns is None else columns
        if out is None:
            return BankBatch(**{name: self._rows(name).rows(rows) for name in names})
        return BankBatch(**{name: self._rows_into(name, rows, out.get(name)) for name in names})

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
        rows = np.arange(len(self)) if seed is None else self.order(epoch, seed)
        for start in range(0, len(self), size):
            yield self.batch(rows[start : start + size])

    def stream(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        columns: Sequence[str] | None = None,
        shuffle: order.Shuffle | None = "random",
        prefetch: int = 2,
        block: int | None = None,
        window: int = order.WINDOW_BLOCKS,
    ) -> Iterator[BankBatch]:
        """Yield this rank's batches of one epoch, read ahead by a thread; for banks larger than memory and others.

        The global batch of a step is a pure function of (seed, epoch, step); the ranks share it, every `world`-th row
        each. The last batch of an epoch may be smaller.

        Args:
            batch_size: rows of the global batch; a multiple of `world`.
            start: step to begin with, so that an epoch is resumed at any step.
            columns: as `batch`.
            shuffle: "random" (uniform), "blocks" (random order of blocks of neighbouring rows, shuffled inside windows
                of blocks; order.py says how good that is), or None for the stored order.
            prefetch: batches that are read ahead; 0 reads when asked.
            block, window: rows of a block (none: about 256 KiB of images) and blocks of a window.

        Raises:
            UsageError: at once, for arguments that do not fit each other. BankError: as `batch`, from the iterator.
        """
        from synthkit.bank.reading.stream import stream

        return stream(
            self, batch_size, seed=seed, epoch=epoch, rank=rank, world=world, start=start, columns=columns,
            shuffle=shuffle, prefetch=prefetch, block=block, window=window,
        )  # fmt: skip

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """The random order of one epoch: a permutation (int64) that depends on (len, seed, epoch) alone."""
        return order.random_order(len(self), seed, epoch)

    def block_order(self, epoch: int, seed: int) -> np.ndarray:
        """The order of one epoch of `stream(shuffle="blocks")`: a permutation (int64), see order.py."""
        return order.block_order(len(self), seed, epoch, block=self.block_rows)

    @property
    def block_rows(self) -> int:
        """Rows of a block of the block-shuffled order: about 256 KiB of images."""
        return order.block_rows(self.spec.image_bytes)

    @property
    def fits_memory(self) -> bool:
        """Whether all shards are within the limit of the memory maps; if not, block order spares the disk.

        The default limit hangs on the machine (or container), not on what else runs there.
        """
        return self._stored.all_mapped

    def row(self, column: str) -> tuple[tuple[int, ...], np.dtype]:
        """(shape, dtype) of one row of `column`. Raises `UsageError` when the bank does not have it."""
        rows = self._rows(column)
        return rows.row_shape, rows.dtype

    def resident(self, device: torch.device | str, columns: Sequence[str] | None = None) -> ResidentBank:
        """The bank as tensors on `device`, for batches without any reading: `resident.batch(indices)["images"]`.

        Args:
            columns: what to hold; none holds images (uint8) and, where present, labels.

        Raises:
            BankMemoryError: it does not fit; the message says what is needed and what is free.
        """
        from synthkit.bank.reading.resident import load

        return load(self, device, columns)

    def will_need(self, indices: np.ndarray, columns: Sequence[str] | None = None) -> None:
        """Ask the system to begin loading the rows `indices` from the disk, for a `batch` that comes soon."""
        rows = self._checked(indices)
        for name in self._default if columns is None else columns:
            self._rows(name)  # checks the name
            self._stored.will_need(name, rows)

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

    def label_sets(self) -> list[str]:
        """Names of the label sets that lie beside the images (`synthkit relabel`), finished or not."""
        return label_sets(self.path)

    def labels(self, name: str) -> LabelSet:
        """Label set `name`.

        Raises:
            UsageError: there is none of that name. BankError: it is damaged, or another bank's.
        """
        return LabelSet(self, name)

    def info(self) -> dict[str, Any]:
        """What `bank info` prints, as plain data; reads no shard."""
        from synthkit.bank.info import info

        return info(self)

    def verify(self, deep: bool = False, untrusted: bool = False) -> VerifyReport:
        """Check every file of the bank against its record; `deep` looks at the values too, `untrusted` parses in a
        child process with limits (`sandbox`)."""
        from synthkit.bank.checking.verify import verify

        return verify(self.path, deep=deep, untrusted=untrusted)

    def _checked(self, indices: Iterable[int] | np.ndarray) -> np.ndarray:
        try:
            rows = np.asarray(indices if isinstance(indices, (np.ndarray, list, tuple, range)) else list(indices))
        except (TypeError, ValueError, OverflowError) as error:  # ragged lists, things that are no numbers
            raise BankIndexError(
                "batch: indices must be a flat list of integers", got=type(indices).__name__
            ) from error
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

    def _rows(self, name: str) -> Rows:
        if not self.sidecars:
            raise BankError(f"{self.path}: no shard is committed yet", hint="go on with: synthkit synthesize --resume")
        if name not in self._columns:
            raise UsageError(f"{self.path}: the bank has no such column", got=name, allowed=self.columns)
        return self._stored.column(name)

    def _rows_into(self, name: str, rows: np.ndarray, target: np.ndarray | None) -> np.ndarray:
        source = self._rows(name)
        if target is None:
            return source.rows(rows)
        fits = (isinstance(target, np.ndarray) and target.dtype == source.dtype and target.flags.c_contiguous
                and target.flags.writeable and target.shape[1:] == source.row_shape and len(target) >= len(rows)
                )  # fmt: skip
        if not fits:
            got = f"{target.dtype} {target.shape}" if isinstance(target, np.ndarray) else type(target).__name__
            raise UsageError(f"batch: out[{name!r}] must be a writable contiguous {source.dtype} array of at least "
                             f"{len(rows)} rows {source.row_shape}", got=got)  # fmt: skip
        return source.rows(rows, target[: len(rows)])
