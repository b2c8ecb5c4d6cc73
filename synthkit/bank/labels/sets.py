"""Label sets: further labels of a bank's images (another teacher, another mode, FKD views) that leave the images alone.

    labels/<set>/labels.json       what the set is, written once: kind, rows, columns, teacher, policy, the bank's uuid
    labels/<set>/00000.h5 + .json  immutable shards with the commit protocol of the image shards
    labels/<set>/manifest.json     when it is complete (label_writer.py)

kind "images": row i labels image i. kind "views": row r is one view (views.py), and the teacher saw exactly that view.
Rows hold dense fp16 logits, or the k largest and the mass of the rest (topk.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.bank.errors import BankIndexError
from synthkit.bank.labels import views
from synthkit.bank.labels.spec import (
    Kind,
    LabelSpec,
    committed_labels,
    label_file,
    label_sets,
    read_label_record,
    read_label_sidecar,
    set_path,
)
from synthkit.bank.labels.topk import expand_topk
from synthkit.bank.reading.columns import ShardColumns
from synthkit.bank.shard import TOPK
from synthkit.errors import BankError, RequirementError, UsageError

if TYPE_CHECKING:
    from synthkit.bank.reader import Bank

__all__ = ["LabelSet", "LabelSpec", "label_file", "label_sets", "mismatch", "read_label_record", "summaries"]


class LabelSet:
    """A label set of a bank, read by row without the HDF5 parser. Made by `Bank.labels(name)`.

    Raises:
        UsageError: the bank has no such set, or `name` cannot be one.
        BankError: it is damaged, of a newer schema, or belongs to another bank.
    """

    def __init__(self, bank: Bank, name: str):
        self.name, self.path = name, set_path(bank.path, name)
        if name not in label_sets(bank.path):
            hint = "make it with: synthkit relabel --bank ... --name NAME"
            raise UsageError(f"{bank.path}: no such label set", got=name, allowed=label_sets(bank.path), hint=hint)
        self.spec, self.record = read_label_record(self.path)
        wrong = mismatch(self.spec, bank)
        if wrong:
            raise BankError(f"{self.path}: {wrong}", hint="a label set can only be used with the bank it was made for")
        committed = committed_labels(self.path, self.spec)
        self.sidecars = [read_label_sidecar(label_file(self.path, i).with_suffix(".json"), i, self.spec)
                         for i in committed]  # fmt: skip
        self._stored = ShardColumns([(label_file(self.path, s.index), s) for s in self.sidecars])

    @property
    def kind(self) -> Kind:
        """images or views."""
        return self.spec.kind

    @property
    def columns(self) -> list[str]:
        """Names of the stored columns."""
        return list(self.spec.layout.columns)

    @property
    def complete(self) -> bool:
        """Whether every planned shard is committed; only then rows can be read."""
        return len(self.sidecars) == self.spec.shards

    @property
    def missing(self) -> list[int]:
        """Planned shards that do not exist yet."""
        return sorted(set(range(self.spec.shards)) - {s.index for s in self.sidecars})

    @property
    def nbytes(self) -> int:
        """Bytes of the committed shards."""
        return sum(s.bytes for s in self.sidecars)

    @property
    def agreement(self) -> float | None:
        """Share of rows whose first class is the bank's label of their own image; None where that is not recorded."""
        found = [s.raw.get("meta") for s in self.sidecars]
        counts = [m.get("agrees_with_bank_labels") if isinstance(m, dict) else None for m in found]
        if not counts or not all(type(c) is int and 0 <= c <= s.n for c, s in zip(counts, self.sidecars, strict=True)):
            return None
        return sum(c for c in counts if c is not None) / sum(s.n for s in self.sidecars)

    @property
    def tail_error(self) -> dict[str, float] | None:
        """What the top-k costs: temperature -> mean total variation of the probabilities; None for dense logits.

        Measured on a part of the rows while the dense logits were at hand (see topk.py).
        """
        found = [s.raw.get("meta") for s in self.sidecars]
        errors = [m.get("tail_error") if isinstance(m, dict) else None for m in found]
        if not errors or not all(map(_is_error_record, errors)):
            return None
        rows = [e for e in errors if e is not None]
        return {t: sum(e.get(t, 0.0) for e in rows) / len(rows) for t in rows[0]}

    def __len__(self) -> int:
        return self.spec.rows

    def __repr__(self) -> str:
        kept = "all logits" if self.spec.top_k is None else f"top {self.spec.top_k} of {self.spec.num_classes}"
        unfinished = "" if self.complete else f", unfinished: {len(self.sidecars)} of {self.spec.shards} shards"
        return f"LabelSet({self.name!r}, {len(self):,} {self.kind}, {kept}{unfinished})"

    def rows(self, indices: Iterable[int] | np.ndarray, columns: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """`columns` (none: all) of the rows `indices` (any order, repeats allowed), as fresh arrays by name.

        Raises:
            BankError: the set is unfinished, or a file is missing or damaged.
            BankIndexError: an index is out of range or no integer. UsageError: no such column.
        """
        at = self._checked(indices)
        names = self.columns if columns is None else list(columns)
        for name in names:
            if name not in self.columns:
                raise UsageError(f"{self.path}: no such column", got=name, allowed=self.columns)
        found = {name: self._stored.column(name).rows(at) for name in names}
        index = found.get("topk_index")
        if index is not None and index.size and int(index.max()) >= self.spec.num_classes:
            raise BankError(
                f"{self.path}: topk_index outside the {self.spec.num_classes} classes", got=int(index.max())
            )
        return found

    @property
    def target_columns(self) -> list[str]:
        """The columns that hold the teacher's answer: logits, or the three of the top-k."""
        return ["logits"] if self.spec.top_k is None else list(TOPK)

    def logits(self, indices: Iterable[int] | np.ndarray) -> np.ndarray:
        """Teacher logits (N, K) of the rows: float16 as stored, or float32 expanded from the top-k."""
        found = self.rows(indices, self.target_columns)
        if self.spec.top_k is None:
            return found["logits"]
        index, logit, tail = (found[name] for name in TOPK)
        return expand_topk(index, logit, tail, self.spec.num_classes)

    def views(self, indices: Iterable[int] | np.ndarray) -> views.Views:
        """The view records of the rows and of their partners, checked. Raises `BankError` when one makes no sense."""
        if self.kind != "views":
            raise RequirementError(f"label set {self.name!r} labels images, it has no views")
        at = self._checked(indices)
        own = self._records(at)
        partners = own["partner"].astype(np.int64)
        return views.join_views(at, own, self._records(partners[partners != at]))

    def _records(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        found = self.rows(rows, views.RECORD_COLUMNS)
        views.check_records(found, images=self.spec.images, rows=self.spec.rows, where=str(self.path))
        return found

    def _checked(self, indices: Iterable[int] | np.ndarray) -> np.ndarray:
        if not self.complete:
            done = f"{len(self.sidecars)} of {self.spec.shards} shards"
            raise BankError(f"{self.path}: the label set is unfinished ({done})",
                            hint="go on with the same synthkit relabel command and --resume")  # fmt: skip
        rows = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))
        if rows.size == 0:
            return np.zeros(0, np.int64)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise BankIndexError("labels: indices must be a flat list of integers", got=f"{rows.dtype} {rows.shape}")
        if int(rows.min()) < 0 or int(rows.max()) >= len(self):
            bad = int(rows.min()) if int(rows.min()) < 0 else int(rows.max())
            raise BankIndexError(f"labels: the set has rows 0 to {len(self) - 1}", got=bad)
        return rows.astype(np.int64)


def _is_error_record(value: Any) -> bool:
    """Whether a stranger's file has numbers by temperature here: they will be printed."""
    return isinstance(value, dict) and all(
        re.fullmatch(r"[0-9.]{1,8}", t) is not None and type(v) in (int, float) and 0 <= v <= 1
        for t, v in value.items()
    )


def summaries(bank: Bank) -> list[dict[str, Any]]:
    """One plain record per label set of `bank`, for lists; a damaged set has only its name and what is wrong."""
    found: list[dict[str, Any]] = []
    for name in label_sets(bank.path):
        try:
            labels = LabelSet(bank, name)
        except BankError as error:
            found.append({"name": name, "damaged": str(error)})
            continue
        spec = labels.spec
        found.append({
            "name": name, "kind": spec.kind, "rows": spec.rows, "top_k": spec.top_k, "bytes": labels.nbytes,
            "bytes_per_row": spec.row_bytes, "complete": labels.complete, "teacher": spec.teacher,
            "agreement_with_bank_labels": labels.agreement, "tail_error": labels.tail_error,
        })  # fmt: skip
    return found


def mismatch(spec: LabelSpec, bank: Bank) -> str | None:
    """Why a set of `spec` does not belong to `bank`; None: it does."""
    uuid = bank.record.get("uuid")
    if spec.bank != uuid:
        return f"was made for another bank (uuid {spec.bank}, this one is {uuid})"
    if spec.images != bank.spec.images:
        return f"labels {spec.images} images, the bank has {bank.spec.images}"
    if spec.num_classes != bank.num_classes:
        return f"has {spec.num_classes} classes, the bank has {bank.num_classes}"
    return None
