"""Accuracy, calibration and agreement of a classifier on labelled images.

One pass in inference mode; the network is put in eval mode and back; no hook is attached. Sums are in float64 and the
order of the data is fixed, so the same machine gives the same numbers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synthkit.data.classes import check_classes
from synthkit.errors import DataError
from synthkit.evaluation.diagnose import permuted_classes
from synthkit.logits import kl_per_sample

if TYPE_CHECKING:
    from synthkit.data.real import RealData
    from synthkit.models.view import ModelView
    from synthkit.runtime import Runtime

ECE_BINS = 15


@dataclass(kw_only=True)
class Scores:
    """What one pass over the data gives, one entry per image, on the CPU."""

    labels: Tensor
    """(N,) int64."""
    predictions: Tensor
    """(N,) int64, argmax of the logits."""
    confidence: Tensor
    """(N,) float64, probability of the prediction."""
    nll: Tensor
    """(N,) float64, -log probability of the label."""
    in_top5: Tensor
    """(N,) bool, the label is among the five largest logits."""
    teacher_predictions: Tensor | None = None
    """(N,) int64."""
    kl: Tensor | None = None
    """(N,) float64, KL(teacher || student) at temperature 1."""


def evaluate_classifier(
    view: ModelView,
    data: RealData,
    *,
    teacher: ModelView | None = None,
    batch_size: int = 500,
    runtime: Runtime | None = None,
) -> dict[str, Any]:
    """Measure a classifier on labelled images.

    Args:
        view: the classifier.
        data: images uint8 (N,C,H,W) of the model's input size, and labels in the order of the model's outputs (where
            both name their classes, another order is refused; `matched` puts it right).
        teacher: adds agreement and KL; of the same classes and input size.
        runtime: autocast of the run; none computes in float32.

    Returns:
        JSON-able values. `n`; `labels` (where they come from); `top1` with its binomial standard error `top1_stderr`,
        `top5` (only above five classes), `teacher_top1`, `agreement`: all shares in [0, 1]; `nll` (nats); `ece`:
        expected calibration error over 15 equal-width bins of the top probability; `kl`: mean KL(teacher || student)
        at temperature 1 (nats); `per_class` {name: accuracy, or None without images}; `predicted` {name: number of
        predictions}; `warnings`.

    Raises:
        DataError: no images, or classes or image size do not fit the model or the teacher.
    """
    check_fit(view, data)
    if teacher is not None:
        check_teacher(view, teacher)
    return summarize(
        score(view, data, teacher=teacher, batch_size=batch_size, runtime=runtime), data.class_names, data.label_source
    )


def check_fit(view: ModelView, data: RealData) -> None:
    """Raise `DataError` when the data cannot be scored with this model as it is."""
    if len(data) == 0:
        raise DataError(f"{data.name}: no images to evaluate on")
    if data.shape != tuple(view.input_size):
        raise DataError(
            f"{data.name}: images are {data.shape}, {view.name} takes {tuple(view.input_size)}",
            hint="load them with size=view.input_size",
        )
    check = check_classes(view.class_names, data.class_names, view.num_classes)
    if not check.identity or data.num_classes != view.num_classes:
        raise DataError(
            f"{data.name}: the labels are not in the order of the model's outputs",
            hint="map them with synthkit.evaluation.metrics.matched(view, data) first",
        )


def check_teacher(view: ModelView, teacher: ModelView) -> None:
    """Raise `DataError` when the two do not speak about the same classes and images."""
    if teacher.num_classes != view.num_classes:
        raise DataError(
            f"teacher {teacher.name} has {teacher.num_classes} classes, model {view.name} has {view.num_classes}",
            hint="agreement needs a teacher of the same classes",
        )
    if tuple(teacher.input_size) != tuple(view.input_size):
        raise DataError(
            f"teacher {teacher.name} takes images of {tuple(teacher.input_size)}, "
            f"model {view.name} of {tuple(view.input_size)}",
            hint="agreement needs a teacher of the same input size",
        )
    if teacher.class_names and view.class_names:
        check = check_classes(view.class_names, teacher.class_names, view.num_classes)
        if not check.identity:
            raise DataError(f"teacher {teacher.name} orders its classes otherwise than {view.name}", got=check.warning)


def matched(view: ModelView, data: RealData) -> tuple[RealData, list[str]]:
    """Data of the model's input size and label order, and what had to be said on the way.

    Raises:
        DataError: the class names contradict each other or the counts differ (`check_classes`).
    """
    said = list(data.notes)
    size = (view.input_size[0], view.input_size[1], view.input_size[2])
    if data.stored_shape != size:
        said.append(f"images were resized from {data.stored_shape} to {size}")
    data = data.resized(size)
    check = check_classes(view.class_names, data.class_names, view.num_classes)
    if check.warning:
        said.append(check.warning)
    if (not check.identity or data.num_classes != view.num_classes) and view.class_names:
        data = data.relabelled(check.mapping, view.class_names)
    return data, said


@contextlib.contextmanager
def evaluating(*views: ModelView | None) -> Iterator[None]:
    """Networks in eval mode and no autograd inside; every submodule's mode is put back after."""
    modes = [(module, module.training) for view in views if view is not None for module in view.module.modules()]
    for view in views:
        if view is not None:
            view.module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(view: ModelView) -> torch.device:
    """Where the network lies (the CPU for one without parameters)."""
    first = next(view.module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def score(
    view: ModelView,
    data: RealData,
    *,
    teacher: ModelView | None = None,
    batch_size: int = 500,
    runtime: Runtime | None = None,
) -> Scores:
    """One pass over the data; see `Scores`."""
    device = device_of(view)
    columns: dict[str, list[Tensor]] = {}
    autocast = runtime.autocast if runtime is not None else contextlib.nullcontext
    with evaluating(view, teacher):
        for images, labels in data.batches(batch_size):
            images, labels = images.to(device), labels.to(device)
            with autocast():
                raw = view(images)
                other = teacher(images) if teacher is not None else None
            for name, value in _columns(raw.double(), labels, None if other is None else other.double()).items():
                columns.setdefault(name, []).append(value)
    return Scores(**{name: torch.cat(parts).cpu() for name, parts in columns.items()})


def _columns(logits: Tensor, labels: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:
    log_p = F.log_softmax(logits, dim=1)
    best, predictions = log_p.max(dim=1)
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    found = {
        "labels": labels,
        "predictions": predictions,
        "confidence": best.exp(),
        "nll": -log_p.gather(1, labels[:, None])[:, 0],
        "in_top5": (top == labels[:, None]).any(dim=1),
    }
    if teacher is not None:
        found["teacher_predictions"] = teacher.argmax(dim=1)
        found["kl"] = kl_per_sample(logits, teacher)
    return found


def summarize(scores: Scores, class_names: list[str], label_source: str = "real") -> dict[str, Any]:
    """The result of `evaluate_classifier` from the scores of one pass."""
    classes = len(class_names)
    right = scores.predictions == scores.labels
    per_label = torch.bincount(scores.labels, minlength=classes)
    per_right = torch.bincount(scores.labels[right], minlength=classes)
    predicted = torch.bincount(scores.predictions, minlength=classes)
    names = unique_names(class_names)
    result: dict[str, Any] = {"n": len(right), "labels": label_source, "top1": _mean(right)}
    result["top1_stderr"] = math.sqrt(result["top1"] * (1 - result["top1"]) / len(right))
    if classes > 5:
        result["top5"] = _mean(scores.in_top5)
    result |= {"nll": _mean(scores.nll), "ece": expected_calibration_error(scores.confidence, right)}
    if scores.teacher_predictions is not None and scores.kl is not None:
        result["teacher_top1"] = _mean(scores.teacher_predictions == scores.labels)
        result["agreement"] = _mean(scores.teacher_predictions == scores.predictions)
        result["kl"] = _mean(scores.kl)
    result["per_class"] = {
        name: int(hit) / int(count) if count else None
        for name, hit, count in zip(names, per_right, per_label, strict=True)
    }
    result["predicted"] = {name: int(count) for name, count in zip(names, predicted, strict=True)}
    warning = permuted_classes(scores.labels, scores.predictions, class_names)
    result["warnings"] = [warning] if warning else []
    if not bool(torch.isfinite(scores.nll).all()):
        result["warnings"].append("the model gives logits that are not finite; the numbers mean nothing")
    return result


def unique_names(names: list[str]) -> list[str]:
    """Class names as dict keys: a name that occurs twice gets its index."""
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def expected_calibration_error(confidence: Tensor, right: Tensor, bins: int = ECE_BINS) -> float:
    """`sum_b n_b / n * |accuracy_b - confidence_b|` over `bins` equal-width bins of the top probability.

    Args:
        confidence: (N,) in [0, 1]; bin b holds (b / bins, (b + 1) / bins], and 0 belongs to the first.
        right: (N,) bool.

    Source: Guo et al. 2017, arXiv 1706.04599.
    """
    confidence = confidence.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    which = torch.bucketize(confidence, edges[1:-1])  # right edge belongs to the bin
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, which, right.double() - confidence)
    return float(gap.abs().sum() / max(1, len(confidence)))
