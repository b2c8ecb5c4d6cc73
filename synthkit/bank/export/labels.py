"""A label set in place of a bank's own labels: its logits (or top-k), and the class they name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from synthkit.bank.labels.sets import label_file
from synthkit.bank.shard import TOPK, file_sha256
from synthkit.errors import BankError, RequirementError

if TYPE_CHECKING:
    from synthkit.bank.reader import Bank


class LabelColumns:
    """The columns labels and logits (or the three of the top-k) of label set `name`.

    Raises:
        UsageError: there is no such set. RequirementError: it labels views.
        BankError: it is unfinished or damaged.
    """

    def __init__(self, bank: Bank, name: str, *, verify: bool):
        self._set = bank.labels(name)
        if self._set.kind != "images":
            raise RequirementError(
                f"export: label set {name!r} labels views (crops, flips, mixes), an export needs a label per image",
                hint="use a set of kind images: synthkit relabel --bank ...",
            )
        if not self._set.complete:
            raise BankError(f"{self._set.path}: the label set is unfinished",
                            hint="go on with the same synthkit relabel command and --resume")  # fmt: skip
        if verify:
            self._check()
        self.top_k = self._set.spec.top_k
        self.columns = ("labels", *self._set.target_columns)

    def _check(self) -> None:
        for sidecar in self._set.sidecars:
            file = label_file(self._set.path, sidecar.index)
            try:
                whole = file_sha256(file) == sidecar.sha256
            except OSError as error:
                raise BankError(f"{file}: cannot be read: {error.strerror}") from error
            if not whole:
                raise BankError(f"{file}: its sha256 is not the recorded one",
                                hint="synthkit bank verify lists the damage, bank repair sets it aside")  # fmt: skip

    def dtype(self, column: str) -> np.dtype:
        """Stored dtype of `column`."""
        return np.dtype("<i4") if column == "labels" else self._set.spec.layout.columns[column][0]

    def read(self, column: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` (numbers in the finished bank) of `column`; labels are the argmax of the logits."""
        at = np.arange(start, stop)
        if column != "labels":
            return self._set.rows(at, [column])[column]
        if self.top_k is None:
            return self._set.rows(at, ["logits"])["logits"].argmax(axis=1).astype("<i4")
        found = self._set.rows(at, TOPK[:2])
        best = found["topk_logit"].argmax(axis=1)[:, None]
        return np.take_along_axis(found["topk_index"], best, axis=1)[:, 0].astype("<i4")
