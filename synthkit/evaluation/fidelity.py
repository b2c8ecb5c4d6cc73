"""Evaluation without any real data: how far a student says what its teacher says, on images of a synthetic bank.

This is fidelity, not accuracy: no real label is involved, and the result says so. Take images that the student was not
trained on: the part that `distill` held out, or a bank of another seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from synthkit.bank.labels.stored import StoredLogits, has_logits, pixel_column
from synthkit.errors import DataError
from synthkit.evaluation.metrics import check_teacher, device_of, evaluating, unique_names
from synthkit.logits import entropy_per_sample, kl_per_sample

if TYPE_CHECKING:
    from synthkit.bank import Bank
    from synthkit.models.view import ModelView
    from synthkit.runtime import Runtime

WHAT = "agreement on synthetic bank (no real labels)"
WHAT_REAL = "agreement on a bank that contains real images (its labels are not used)"


def evaluate_fidelity(
    student: ModelView,
    bank: Bank,
    *,
    teacher: ModelView | None = None,
    indices: np.ndarray | None = None,
    stored: StoredLogits | None = None,
    batch_size: int = 500,
    runtime: Runtime | None = None,
) -> dict[str, Any]:
    """Agreement and KL between a student and its teacher on bank images (not augmented).

    Args:
        student: of the bank's classes and image size.
        bank: source of the images.
        teacher: none takes the logits that the bank stores.
        indices: rows to use; none takes the whole bank.
        stored: where stored logits are read; none takes the bank's own.

    Returns:
        JSON-able values: `what` (agreement, on a synthetic bank or one with real images), `n`, `agreement` (share of
        equal argmax), `kl` (mean KL(teacher || student), temperature 1, nats), `teacher_logits` ("live" or "stored"),
        `teacher_entropy` (mean, nats), `per_class` {class by the teacher: agreement, or None}, `predicted` and
        `teacher_predicted` {name: count}, `warnings`.

    Raises:
        DataError: nothing to compare with, or classes or image sizes differ.
    """
    _check(student, bank, teacher, stored)
    rows = np.arange(len(bank)) if indices is None else np.asarray(indices)
    if len(rows) == 0:
        raise DataError(
            f"bank {bank.path}: no image to compare on", hint="hold out a larger share, or use another bank"
        )
    parts: list[tuple[Tensor, ...]] = []
    with evaluating(student, teacher):
        source = teacher or stored or StoredLogits(bank)
        for ours, theirs in _logits(student, bank, source, rows, batch_size, runtime):
            best = (ours.argmax(1), theirs.argmax(1))
            parts.append((*best, kl_per_sample(ours, theirs), entropy_per_sample(theirs)))
    predicted, expected, kl, entropy = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return _result(predicted, expected, kl, entropy, bank.class_names) | {
        "what": WHAT_REAL if bank.spec.contains_real else WHAT,
        "teacher_logits": "stored" if teacher is None else "live",
    }


def _check(student: ModelView, bank: Bank, teacher: ModelView | None, stored: StoredLogits | None) -> None:
    if teacher is not None:
        check_teacher(student, teacher)
    elif stored is None and not has_logits(bank):
        raise DataError(f"bank {bank.path}: stores no teacher logits", hint="name the teacher: --teacher SPEC")
    if bank.num_classes != student.num_classes:
        raise DataError(
            f"bank {bank.path} has {bank.num_classes} classes, model {student.name} has {student.num_classes}"
        )
    if tuple(bank.shape) != tuple(student.input_size):
        raise DataError(
            f"bank {bank.path} has images of {tuple(bank.shape)}, {student.name} takes {tuple(student.input_size)}",
            hint="compare on a bank of the model's input size",
        )


def _logits(
    student: ModelView,
    bank: Bank,
    teacher: ModelView | StoredLogits,
    rows: np.ndarray,
    batch_size: int,
    runtime: Runtime | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of float64 (student, teacher) logits."""
    device = device_of(student)
    autocast = runtime.autocast if runtime is not None else contextlib.nullcontext
    column = pixel_column(bank)
    for start in range(0, len(rows), batch_size):
        at = rows[start : start + batch_size]
        images = torch.from_numpy(np.ascontiguousarray(getattr(bank.batch(at, [column]), column))).to(device)
        images = images if images.dtype == torch.uint8 else images.float()
        with autocast():
            ours = student(images)
            theirs = teacher.read(at).to(device).dense() if isinstance(teacher, StoredLogits) else teacher(images)
        yield ours.double(), theirs.double()


def _result(predicted: Tensor, expected: Tensor, kl: Tensor, entropy: Tensor, class_names: list[str]) -> dict[str, Any]:
    names = unique_names(class_names)
    same = predicted == expected
    counts = torch.bincount(expected, minlength=len(names))
    hits = torch.bincount(expected[same], minlength=len(names))
    warnings = []
    unseen = [name for name, count in zip(names, counts, strict=True) if not count]
    if unseen:
        warnings.append(f"the teacher names no image {', '.join(unseen[:10])}; those classes are not measured")
    if not bool(torch.isfinite(kl).all()):
        warnings.append("logits are not finite; the numbers mean nothing")
    return {
        "what": WHAT,
        "n": len(same),
        "agreement": float(same.double().mean()),
        "kl": float(kl.mean()),
        "teacher_entropy": float(entropy.mean()),
        "per_class": {
            name: int(hit) / int(count) if count else None for name, hit, count in zip(names, hits, counts, strict=True)
        },
        "predicted": dict(zip(names, torch.bincount(predicted, minlength=len(names)).tolist(), strict=True)),
        "teacher_predicted": dict(zip(names, counts.tolist(), strict=True)),
        "warnings": warnings,
    }
