"""What networks are shown and told of a bank: its pixels, and the teacher logits that it or a label set stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from synthkit.bank.labels.sets import LabelSet
from synthkit.bank.labels.topk import expand_topk
from synthkit.bank.shard import TOPK
from synthkit.errors import RequirementError
from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.bank.reader import Bank


@dataclass(frozen=True)
class Targets:
    """Stored logits of some rows: one dense tensor (N, K), or top-k index (N, k), logit (N, k) and tail (N,)."""

    parts: tuple[Tensor, ...]
    num_classes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(part.nbytes for part in self.parts)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Targets:
        """On `device`; a top-k record travels as it is and is expanded there."""
        return Targets(tuple(p.to(device, non_blocking=non_blocking) for p in self.parts), self.num_classes)

    def rows(self, at: Tensor) -> Targets:
        """The rows `at` (int64 on the same device)."""
        return Targets(tuple(p.index_select(0, at) for p in self.parts), self.num_classes)

    def dense(self) -> Tensor:
        """(N, K) float32."""
        if len(self.parts) == 1:
            return self.parts[0].float()
        index, logit, tail = self.parts
        return expand_topk(index, logit, tail, self.num_classes)


class StoredLogits:
    """Where stored logits are read: a label set, or the bank's own columns.

    Raises:
        RequirementError: the bank has neither logits nor top-k columns.
    """

    def __init__(self, source: Bank | LabelSet):
        self.source = source
        if isinstance(source, LabelSet):
            self.columns, self.num_classes = source.target_columns, source.spec.num_classes
            return
        self.num_classes = source.num_classes
        if not has_logits(source):
            raise RequirementError(f"bank {source.path}: stores no teacher logits", hint="make some: synthkit relabel")
        self.columns = ["logits"] if source.has("logits") else list(TOPK)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory (class indices as int32)."""
        top_k = self.source.spec.top_k
        return 2 * self.num_classes if self.columns == ["logits"] else 6 * (top_k or 0) + 4

    def read(self, rows: np.ndarray) -> Targets:
        """The rows as they are stored, on the CPU."""
        if isinstance(self.source, LabelSet):
            found = self.source.rows(rows, self.columns)
        else:
            batch = self.source.batch(rows, self.columns)
            found = {name: np.asarray(getattr(batch, name)) for name in self.columns}
        # torch has few operations on uint16 and uint32: indices travel as int32 (a class number always fits)
        arrays = [v.astype(np.int32) if v.dtype.kind == "u" else v for v in (found[c] for c in self.columns)]
        return Targets(tuple(torch.from_numpy(np.ascontiguousarray(v)) for v in arrays), self.num_classes)


def has_logits(bank: Bank) -> bool:
    """Whether the bank itself stores teacher logits, dense or top-k."""
    return bank.has("logits") or all(bank.has(name) for name in TOPK)


def pixel_column(bank: Bank) -> str:
    """The column whose pixels networks are shown: `images_f16` where a method's pixels leave [0, 1], else `images`.

    Pixels behind a transform (ZCA) suit no network that normalises pixel space, so the viewable images stand for them;
    `transform_note` says so.
    """
    return "images_f16" if bank.has("images_f16") and not bank.spec.transform else "images"


def transform_note(bank: Bank) -> str | None:
    """What a user of the viewable images of a transformed bank should know; None where the bank has no transform."""
    if not bank.spec.transform:
        return None
    return (
        f"the bank was made for pixels behind a {bank.spec.transform.get('kind')} transform; its viewable images (the"
        " inverse, clamped to [0, 1]) are used here. synthkit evaluate --bank trains on the transformed ones"
    )
