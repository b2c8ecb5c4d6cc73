"""What a label array holds: class numbers, class names, one-hot rows, probabilities or logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from synthkit.bank.imports.columns import Column
from synthkit.bank.imports.source import MAX_CLASSES, ImportOptions, Rows, settle_classes
from synthkit.bank.spec import LabelKind
from synthkit.errors import DataError

MAX_TEXT = 500
"""Characters at most of a class name."""


class Labels:
    """How one label array becomes the columns `labels` and, when it is soft, `logits`."""

    def __init__(self, form: str, largest: int, names: list[str] | None = None):
        self.form, self.largest, self.names = form, largest, names
        self.kind: LabelKind = "argmax" if form in ("probabilities", "logits") else "real"
        self.notes: list[str] = []
        if form in ("probabilities", "logits"):
            self.notes.append(f"labels are {form}: they are kept as logits, the label is their argmax")

    def rename(self, names: Sequence[str], what: str) -> None:
        """Number text labels in the order of `names`. Raises `DataError` when one is missing there."""
        if self.form != "text" or self.names is None or list(names) == self.names:
            return
        absent = sorted(set(self.names) - set(names))
        if absent:
            raise DataError(f"{what}: a label is not among the class names", got=absent[0], allowed=names)
        self.names, self.largest = list(names), len(names) - 1

    def rows(self, part: np.ndarray) -> Rows:
        """The bank columns of a piece of the array."""
        if self.form == "number":
            return {"labels": part.reshape(len(part)).astype(np.int64)}
        if self.form == "text":
            order = {name: i for i, name in enumerate(self.names or [])}
            return {"labels": np.array([order[v] for v in _texts(part)], dtype=np.int64)}
        if self.form == "one-hot":
            return {"labels": part.argmax(axis=1)}
        logits = part.astype(np.float32)
        if self.form == "probabilities":  # softmax(log p) = p; fp16 holds e^-60 as a logit, not as a probability
            logits = np.log(np.maximum(logits, np.float32(1e-26)))
        return {"labels": logits.argmax(axis=1), "logits": logits}


def read_labels(column: Column, count: int, what: str) -> Labels:
    """Look at every label once.

    Args:
        column: (N,), (N, 1) or (N, K).

    Raises:
        DataError: another shape or type, negative or fractional numbers, or more than 65,536 classes.
    """
    inner = column.shape[1:]
    width = inner[0] if inner else 1
    if len(inner) > 1 or not width:
        raise DataError(f"{what}: labels must be (N,) or (N, K)", got=column.shape)
    if column.dtype.kind in "US" and width == 1:
        return _text_labels(column, what)
    if column.dtype.kind not in "biuf":
        raise DataError(f"{what}: labels must be numbers or text", got=str(column.dtype))
    if width == 1:
        return Labels("number", _largest(column, what))
    if width > MAX_CLASSES:
        raise DataError(f"{what}: more than {MAX_CLASSES} classes", got=width)
    return Labels(_soft_form(column, what), width - 1)


def _largest(column: Column, what: str) -> int:
    largest = 0
    for part in column.chunks(1 << 16):
        low, high = part.min(), part.max()
        if not (np.isfinite(low) and np.isfinite(high)) or (part.dtype.kind == "f" and (part != np.rint(part)).any()):
            raise DataError(f"{what}: labels must be whole numbers", got=f"{low} to {high}")
        if low < 0:
            raise DataError(f"{what}: labels of {int(low)}: this part is not labelled",
                            hint="take another --split, or import with --unlabelled")  # fmt: skip
        largest = max(largest, int(high))
    return largest


def _soft_form(column: Column, what: str) -> str:
    hot = spread = True
    for part in column.chunks(max(1, (1 << 22) // column.shape[1])):
        values = part.astype(np.float32)
        if not np.isfinite(values).all():
            raise DataError(f"{what}: a soft label is not finite")
        total = values.sum(axis=1)
        spread = spread and bool((values >= 0).all() and np.allclose(total, 1, atol=2e-2))
        hot = hot and bool(((values == 0) | (values == 1)).all() and (total == 1).all())
        if not hot and not spread and column.dtype.kind in "biu":
            raise DataError(f"{what}: whole numbers of shape {column.shape} are no labels",
                            hint="expected class numbers (N,), one-hot rows, probabilities or logits")  # fmt: skip
    return "one-hot" if hot else "probabilities" if spread else "logits"


def _text_labels(column: Column, what: str) -> Labels:
    found: set[str] = set()
    for part in column.chunks(1 << 16):
        found.update(_texts(part))
        if len(found) > MAX_CLASSES:
            raise DataError(f"{what}: more than {MAX_CLASSES} classes", hint="are these labels, or file names?")
    long = next((name for name in found if len(name) > MAX_TEXT), None)
    if long is not None:
        raise DataError(f"{what}: a class name is longer than {MAX_TEXT} characters", got=long[:60])
    names = sorted(found)
    return Labels("text", len(names) - 1, names)


def _texts(part: np.ndarray) -> list[str]:
    return [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in part.reshape(-1).tolist()]


class Seen:
    """Labels that pass by one at a time: all numbers or all text."""

    def __init__(self, what: str):
        self._what = what
        self.largest = 0
        self.names: set[str] = set()
        self.text: bool | None = None

    def add(self, label: Any, number: int) -> None:
        """Look at the label of row `number`. Raises `DataError` for one that is none."""
        if label is None:
            raise DataError(f"{self._what}: row {number} has no label", hint="--unlabelled takes the images alone")
        is_text = isinstance(label, str)
        if not is_text and (not isinstance(label, int) or isinstance(label, bool)):
            raise DataError(f"{self._what}: labels are neither whole numbers nor text", got=str(label)[:80])
        if self.text is None:
            self.text = is_text
        if is_text != self.text:
            raise DataError(f"{self._what}: some labels are numbers and some text", got=str(label)[:80])
        if isinstance(label, str):
            self.names.add(label)
            if len(self.names) > MAX_CLASSES or len(label) > MAX_TEXT:
                raise DataError(
                    f"{self._what}: more than {MAX_CLASSES} classes, or a name of over {MAX_TEXT} characters"
                )
        elif label < 0:
            raise DataError(f"{self._what}: labels of {label}: this part is not labelled",
                            hint="take another --split, or --unlabelled")  # fmt: skip
        else:
            self.largest = max(self.largest, label)

    def numbers(self, labels: Sequence[Any], names: Sequence[str] | None) -> np.ndarray:
        """int64 class numbers of labels that were all seen; text by its place in `names`."""
        if not self.text:
            return np.asarray(labels, np.int64)
        order = {name: i for i, name in enumerate(names or [])}
        return np.array([order[label] for label in labels], np.int64)


def classes_of(
    what: str, seen: Seen, names: list[str] | None, options: ImportOptions, own: dict[str, Any] | None
) -> tuple[int, list[str] | None]:
    """(num_classes, class_names) of the labels that were seen; text labels that `names` do not cover are sorted.

    Raises:
        DataError: a label outside the classes, or too many classes.
    """
    largest = max(seen.largest, own["num_classes"] - 1 if own and options.class_names is None else 0)
    if not seen.text:
        return settle_classes(what, largest, names, options)
    chosen = options.class_names or (names if names and seen.names <= set(names) else sorted(seen.names))
    absent = sorted(seen.names - set(chosen))
    if absent:
        raise DataError(f"{what}: a label is not among the class names", got=absent[0], allowed=chosen)
    return settle_classes(what, len(chosen) - 1, chosen, options)
