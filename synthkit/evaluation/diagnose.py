"""The two classic mistakes of a low accuracy: permuted classes and wrong normalisation. Found, named, said loudly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from synthkit.data.stats import STATS
from synthkit.evaluation.assignment import best_assignment

if TYPE_CHECKING:
    from synthkit.data.real import RealData
    from synthkit.models.view import ModelView

MIN_GAIN = 0.03
"""An explanation must raise the accuracy by more than this share (3 points)..."""
MIN_SIGMAS = 4.0
"""... and by so many standard errors of the paired difference."""
MAX_CLASSES = 300
"""Above this many classes the search for a permutation is left out (it would take seconds)."""


def paired_sigmas(before: Tensor, after: Tensor) -> float:
    """McNemar's statistic: how many standard errors the paired difference of two right/wrong vectors is from 0."""
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return (won - lost) / math.sqrt(won + lost) if won + lost else 0.0


def permuted_classes(labels: Tensor, predictions: Tensor, class_names: Sequence[str]) -> str | None:
    """A warning when the outputs fit the labels much better in another order of classes, else none.

    The order is found on a random half of the images and judged on the other, so that chance cannot find one; the
    classes that move must then be right in the majority of cases, so that mere confusion of similar classes is no
    permutation.

    Args:
        labels, predictions: (N,) int64 below K = len(class_names).
    """
    classes = len(class_names)
    if classes > MAX_CLASSES or len(labels) < 20:
        return None
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    seen, unseen = shuffled[::2], shuffled[1::2]
    confusion = torch.bincount(predictions[seen] * classes + labels[seen], minlength=classes * classes)
    # a bonus for staying breaks ties: classes that were never predicted keep their place
    gain = confusion.view(classes, classes).double() + 1e-3 * torch.eye(classes, dtype=torch.float64)
    order = torch.from_numpy(best_assignment(gain.numpy()))
    held_labels, held = labels[unseen], predictions[unseen]
    before, after = held == held_labels, order[held] == held_labels
    accuracy, other = float(before.double().mean()), float(after.double().mean())
    moved = (order != torch.arange(classes)).nonzero().flatten().tolist()
    affected = (order != torch.arange(classes))[held]
    if other - accuracy <= MIN_GAIN or paired_sigmas(before, after) <= MIN_SIGMAS:
        return None
    if float(after[affected].double().mean()) < 0.5:
        return None
    shown = ", ".join(f"{i} ({class_names[i]}) is {class_names[int(order[i])]}" for i in moved[:10])
    more = ", ..." if len(moved) > 10 else ""
    return (
        f"the class order looks permuted: accuracy {100 * accuracy:.1f} % would be {100 * other:.1f} % if output "
        f"{shown}{more}{_cause(order.tolist(), class_names)}; check class_names of the model card "
        "and the label order of the data"
    )


def _cause(order: list[int], class_names: Sequence[str]) -> str:
    """Names the usual reason of a permutation when it is one of them."""
    plain = list(range(len(order)))
    by_name = sorted(plain, key=lambda i: class_names[i])
    reasons = (
        (sorted(plain, key=str), "the order of numbers sorted as text"),
        (by_name, "the alphabetical order of the names"),
    )
    for wanted, reason in reasons:
        if wanted != plain and order in (wanted, [wanted.index(i) for i in plain]):
            return f" (one side uses {reason})"
    return ""


def wrong_normalisation(view: ModelView, data: RealData, *, sample: int = 500, seed: int = 0) -> str | None:
    """A warning when the network is much better with other normalisation constants, else none.

    Tries every entry of `STATS` with the model's number of channels, on a random sample of the data. Where the class
    order is permuted the accuracies mean nothing; look at that first.

    Args:
        view: the classifier with the constants of its card; it is not changed.
        data: labelled images of the model's input size and label order.
        sample: number of images.
    """
    from synthkit.evaluation.metrics import score

    chosen = data.subset(min(sample, len(data)), seed)
    scored = score(view, chosen)
    before = scored.predictions == scored.labels
    better: list[tuple[float, str]] = []
    for name, (mean, std) in STATS.items():
        if len(mean) != view.input_size[0] or (list(mean), list(std)) == (view.mean, view.std):
            continue
        after = score(_renormalised(view, mean, std), chosen)
        right = after.predictions == after.labels
        accuracy = float(right.double().mean())
        if accuracy - float(before.double().mean()) > MIN_GAIN and paired_sigmas(before, right) > MIN_SIGMAS:
            better.append((accuracy, name))
    if not better:
        return None
    better.sort(key=lambda pair: -pair[0])
    alike = [name for accuracy, name in better[1:] if accuracy > better[0][0] - 0.01]
    mean, std = STATS[better[0][1]]
    return (
        f"the normalisation looks wrong: with mean {list(view.mean)} and std {list(view.std)} the accuracy is "
        f"{100 * float(before.double().mean()):.1f} %, with {better[0][1]!r} (mean {list(mean)}, std {list(std)}) "
        f"it is {100 * better[0][0]:.1f} % on {len(chosen)} images"
        + (f" (about the same with {', '.join(alike)})" if alike else "")
        + "; correct mean and std in the model card"
    )


def _renormalised(view: ModelView, mean: Sequence[float], std: Sequence[float]) -> ModelView:
    from synthkit.evaluation.metrics import device_of
    from synthkit.models.view import ModelView

    other = ModelView(
        view.module,
        mean,
        std,
        input_size=(view.input_size[0], view.input_size[1], view.input_size[2]),
        num_classes=view.num_classes,
        name=view.name,
    )
    return other.to(device_of(view))
