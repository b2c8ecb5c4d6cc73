"""What is exported: the rows of a bank in order, piece by piece, each shard checked against its record first."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from synthkit.bank import seal
from synthkit.bank.export.labels import LabelColumns
from synthkit.bank.export.names import unicode_text
from synthkit.bank.reader import Bank
from synthkit.bank.reading.maps import open_checked
from synthkit.bank.shard import COLUMNS, TOPK, Sidecar, file_sha256, row_shape, shard_file, value_problem
from synthkit.errors import BankError, UsageError

PIECE_BYTES = 4 << 20  # of a piece, unless one row is larger
PIECE_ROWS = 1 << 14


class Source:
    """The rows of a bank (and of a label set, where one is named) for an exporter.

    Rows are read with plain file reads, never through maps: memory stays at one piece, and a file that is cut short
    under our hands is an error instead of a crash.

    Args:
        labels_from: label set whose labels and logits take the place of the bank's own.
        unfinished: whether a bank with missing shards may be exported; its rows are then numbered without gaps.
        verify: hash every shard before its first row is used, and compare with its record and the sealed manifest.

    Raises:
        BankError: the bank is unfinished (and may not be) or contradicts its manifest.
        UsageError: there is no such label set.
    """

    def __init__(self, bank: Bank, *, labels_from: str | None = None, unfinished: bool = False, verify: bool = True):
        self.bank, self.spec = bank, bank.spec
        missing = bank.spec.shards - len(bank.sidecars)
        if missing and not (unfinished and bank.sidecars):
            hint = "finish it with: synthkit synthesize ... --resume"
            hint += ", or export what is committed with --unfinished" if bank.sidecars else ""
            raise BankError(f"{bank.path}: {missing} of {bank.spec.shards} shards are missing", hint=hint)
        self.complete, self.count, self.labels_from = not missing, len(bank), labels_from
        self._verify = verify
        self._sealed = seal.read_manifest(bank.path, bank.spec) if verify else None
        if verify:
            _check_sealed(bank)
        self._checked: set[int] = set()
        self._counts: list[int] | None = None
        self._set = LabelColumns(bank, labels_from, verify=verify) if labels_from else None
        own = [c for c in bank.columns if not (self._set and c in ("labels", "logits", *TOPK))]
        found = {*own, *(self._set.columns if self._set else ())}
        self.columns = tuple(c for c in COLUMNS if c in found)
        self.top_k = self._set.top_k if self._set else bank.spec.top_k
        self.label_kind = "argmax" if self._set else bank.spec.label_kind
        self.names = [unicode_text(name) for name in bank.spec.names()]

    def has(self, column: str) -> bool:
        """Whether every row has `column`."""
        return column in self.columns

    def row_shape(self, column: str) -> tuple[int, ...]:
        """Shape of one row of `column`."""
        if column in TOPK:  # of the bank or of the label set
            return (self.top_k or 0,) if column in TOPK[:2] else ()
        return row_shape(column, self.spec)

    def dtype(self, column: str) -> np.dtype:
        """Stored dtype of `column`, little-endian."""
        if self._set and column in self._set.columns:
            return self._set.dtype(column)
        return self.bank.sidecars[0].datasets[column].dtype

    def row_bytes(self, columns: Sequence[str]) -> int:
        """Bytes of one row of `columns`."""
        return sum(math.prod(self.row_shape(c)) * self.dtype(c).itemsize for c in columns)

    def require_small_rows(self, columns: Sequence[str], limit: int, format: str) -> None:
        """Raise `UsageError` when a row has more bytes than the format can hold in one piece."""
        size = self.row_bytes(columns)
        if size > limit:
            hint = "use npz or safetensors"
            raise UsageError(f"export: {format} holds at most {limit:,} bytes per image", got=f"{size:,}", hint=hint)

    def piece_rows(self, columns: Sequence[str]) -> int:
        """Rows per piece such that a piece is at most about 4 MiB."""
        return max(1, min(PIECE_ROWS, PIECE_BYTES // max(1, self.row_bytes(columns))))

    def pieces(
        self, columns: Sequence[str], rows: int | None = None, *, cut: int | None = None, check: bool = True
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield (number of the first row, {column: rows}) over all rows in order.

        Args:
            rows: rows of a piece at most; pieces also end with their shard.
            cut: no piece crosses a multiple of this row number (where an exported file ends).
            check: whether shards are hashed first, as `verify` said.

        Raises:
            BankError: a shard is damaged, or holds a value that it must not hold.
        """
        rows = rows or self.piece_rows(columns)
        first = 0
        for sidecar in self.bank.sidecars:
            if check:
                self._check(sidecar)
            start = 0
            while start < sidecar.n:
                stop = min(start + rows, sidecar.n)
                if cut:
                    stop = min(stop, ((first + start) // cut + 1) * cut - first)
                piece = self._read(sidecar, start, stop, columns)
                wrong = value_problem(piece, self.spec)
                if wrong:
                    raise BankError(f"{shard_file(self.bank.path, sidecar.index)}: {wrong}", hint=self._hint())
                yield first + start, piece
                start = stop
            first += sidecar.n

    def sample(self, column: str, count: int) -> np.ndarray:
        """About `count` rows of `column`, evenly spread over the bank, unchecked: for estimates only."""
        chosen, found = np.unique(np.linspace(0, self.count - 1, count).astype(np.int64)), []
        first = 0
        for sidecar in self.bank.sidecars:
            for row in chosen[(chosen >= first) & (chosen < first + sidecar.n)] - first:
                found.append(self._read(sidecar, int(row), int(row) + 1, [column])[column])
            first += sidecar.n
        return np.concatenate(found)

    def learning_rate(self) -> float | None:
        """The learned step size of a distilled set: `learning_rate` in the meta of the last shard; None if absent."""
        meta = self.bank.sidecars[-1].raw.get("meta")
        rate = meta.get("learning_rate") if isinstance(meta, dict) else None
        usable = isinstance(rate, (int, float)) and not isinstance(rate, bool) and math.isfinite(rate)
        return float(rate) if usable and rate is not None else None

    def class_counts(self) -> list[int] | None:
        """Rows per class; None without labels. Reads the labels once; the shards are hashed when they are exported."""
        if not self.has("labels"):
            return None
        if self._counts is None:
            counts = np.zeros(self.spec.num_classes, np.int64)
            for _, piece in self.pieces(["labels"], check=False):
                counts += np.bincount(piece["labels"], minlength=self.spec.num_classes)
            self._counts = counts.tolist()
        return self._counts

    def _hint(self) -> str:
        return f"run: synthkit bank repair {self.bank.path}, then synthesize --resume"

    def _check(self, sidecar: Sidecar) -> None:
        if not self._verify or sidecar.index in self._checked:
            return
        file = shard_file(self.bank.path, sidecar.index)
        try:
            digest = file_sha256(file)
        except OSError as error:
            raise BankError(f"{file}: cannot be read: {error.strerror}", hint=self._hint()) from error
        if digest != sidecar.sha256:
            raise BankError(f"{file}: its sha256 is not the recorded one", got=digest[:16] + "...", hint=self._hint())
        if self._sealed is not None and self._sealed[sidecar.index]["sha256"] != digest:
            raise BankError(f"{file}: is not the shard that was sealed in manifest.json", hint=self._hint())
        self._checked.add(sidecar.index)

    def _read(self, sidecar: Sidecar, start: int, stop: int, columns: Sequence[str]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        file = shard_file(self.bank.path, sidecar.index)
        own = [c for c in columns if not (self._set and c in self._set.columns)]
        if own:
            with os.fdopen(open_checked(file, sidecar.bytes), "rb") as stream:
                for column in own:
                    place = sidecar.datasets[column]
                    array = np.empty((stop - start, *place.shape[1:]), place.dtype)
                    stream.seek(place.offset + start * (array.nbytes // len(array)))
                    if stream.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
                        raise BankError(f"{file}: was cut while it was being read", hint=self._hint())
                    found[column] = array
        at = sidecar.index * self.spec.per_shard
        for column in columns:
            if self._set and column in self._set.columns:
                found[column] = self._set.read(column, at + start, at + stop)
        return found


def _check_sealed(bank: Bank) -> None:
    problems: dict[str, Any] = seal.check_manifest(bank.path, bank.spec, bank.record)
    for part, what in problems.items():
        raise BankError(f"{part}: {what[0]}", hint=f"synthkit bank verify {bank.path} lists all damage")
