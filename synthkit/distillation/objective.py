"""From a batch to the number that is minimised: both forward passes, the loss, the labels and the pace.

`look` runs the networks on one slice of the batch, `figures` computes the loss from what was seen. They are apart so
that the trainer can put slices together in between: those of other ranks, and those of an accumulated batch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from synthkit.distillation.contract import Batch, Look, Loss, Taps
from synthkit.distillation.ensemble import TeacherEnsemble
from synthkit.distillation.sources import BatchSource, NoiseSource, StoreSource, torch_generator
from synthkit.logits import agreement_per_sample, ce_per_sample

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.models.taps import TapSet
    from synthkit.models.view import ModelView

LOOK_ROWS = 256  # images of one unaugmented batch in a phase before the first step
TASK_TERMS = ("ce", "label_ce")  # terms of the labels, which DOT gives a momentum of their own


@dataclass(kw_only=True)
class Seen:
    """What one slice of a batch showed."""

    batch: Batch
    student: Taps | None = None
    """With graph."""
    teacher: Taps | None = None
    """Without."""


@dataclass(kw_only=True)
class Figures:
    """What the trainer minimises and logs."""

    loss: Tensor
    """Scalar with graph."""
    task: Tensor | None = None
    """The part of `loss` that comes from labels, where the optimiser keeps it apart."""
    shown: dict[str, Tensor] = field(default_factory=dict)
    """Scalars for metrics.jsonl."""


class Objective(Protocol):
    """What the trainer calls."""

    relational: bool
    """Whether `figures` must see the whole global batch at once."""

    @property
    def aux(self) -> nn.Module | None:
        """Further modules to train."""
        ...

    def look(self, batch: Batch) -> Seen: ...
    def again(self, batch: Batch) -> Taps: ...
    def figures(self, seen: Seen) -> Figures: ...
    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]] | None: ...
    def on_step(self, optimizer: torch.optim.Optimizer, progress: float) -> None: ...


class FromFunction:
    """An objective that is one function: (view, batch) -> scalars, of which "loss" is minimised."""

    relational = False
    aux = None

    def __init__(self, view: ModelView, function: Callable[[ModelView, Batch], dict[str, Tensor]]):
        self.view, self.function = view, function

    def look(self, batch: Batch) -> Seen:
        """Nothing yet: the function runs the network itself."""
        return Seen(batch=batch)

    def again(self, batch: Batch) -> Taps:
        """Never asked for: a function is not relational."""
        raise NotImplementedError

    def figures(self, seen: Seen) -> Figures:
        """What the function says of the batch."""
        found = self.function(self.view, seen.batch)
        return Figures(loss=found["loss"], shown={k: v.detach() for k, v in found.items() if k != "loss"})

    def parameter_groups(self, network: nn.Module) -> None:
        """One group with everything."""

    def on_step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """Nothing to do."""


class Distillation:
    """The objective of a distill run.

    Args:
        loss: set up already.
        student, teacher: where their features are read; without a teacher the batch's stored logits are used.
        labels: policy of the hard labels: none, argmax (of the teacher) or stored.
        label_weight: weight of the cross-entropy on them (0: none).
        pace: share of the batch's easiest samples that count, by epoch (self-paced), or None.
    """

    def __init__(
        self,
        loss: Loss,
        student: TapSet,
        teacher: TapSet | None,
        *,
        labels: str = "none",
        label_weight: float = 0.0,
        pace: Callable[[int], float] | None = None,
    ):
        self.loss, self.student, self.teacher = loss, student, teacher
        self.labels, self.label_weight, self.pace = labels, label_weight, pace
        self.relational = loss.requires.relational or pace is not None
        self.features = bool(loss.requires.teacher)

    @property
    def aux(self) -> nn.Module | None:
        """The modules of the loss."""
        return self.loss.aux

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]] | None:
        """The loss's own groups, where it has any."""
        return self.loss.parameter_groups(network)

    def on_step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """The loss's own schedule, where it has any."""
        self.loss.on_step(optimizer, progress)

    def teach(self, images: Tensor) -> Taps:
        """What the teacher says, usable in a loss."""
        assert self.teacher is not None  # the caller saw to it
        if isinstance(ensemble := self.teacher.view, TeacherEnsemble):
            with torch.no_grad():
                members = ensemble.all_logits(images)
                return Taps(logits=ensemble.combined(members), members=members)
        if self.features:
            with torch.no_grad():
                return self.teacher(images)
        with torch.inference_mode():
            found = self.teacher(images)
        return Taps(logits=found.logits.clone())  # a normal tensor: inference tensors cannot be saved for backward

    def look(self, batch: Batch) -> Seen:
        """Both forward passes."""
        if self.teacher is not None:
            teacher = self.teach(batch.images)
        else:
            assert batch.logits is not None  # check_task saw to it
            teacher = Taps(logits=batch.logits)
        if self.labels == "argmax":
            batch.labels = teacher.logits.argmax(dim=1)
        return Seen(student=self.student(batch.images), teacher=teacher, batch=batch)

    def again(self, batch: Batch) -> Taps:
        """The student's part of `look`, for the pass that takes gradients down to its weights."""
        return self.student(batch.images)

    def parts(self, seen: Seen) -> dict[str, Tensor]:
        """Every term of what was seen, as the scalar that is minimised."""
        student, teacher, batch = seen.student, seen.teacher, seen.batch
        assert student is not None and teacher is not None  # `look` made them
        values = self.loss(student, teacher, batch)
        if self.label_weight and batch.labels is not None:
            values["label_ce"] = self.label_weight * ce_per_sample(student.logits, batch.labels)
        if self.pace is not None:
            values = paced(values, self.pace(math.floor(batch.epoch)))
        return {name: value.mean() for name, value in values.items()}

    def figures(self, seen: Seen) -> Figures:
        """The loss of what was seen."""
        assert seen.student is not None and seen.teacher is not None  # `look` made them
        parts = self.parts(seen)
        task = [parts[name] for name in TASK_TERMS if name in parts]
        shown = {name: value.detach() for name, value in parts.items()} if len(parts) > 1 else {}
        if not self.loss.requires.deploys:  # there the student's own classifier is not what is used
            shown["agreement"] = agreement_per_sample(seen.student.logits.detach(), seen.teacher.logits).mean()
        return Figures(
            loss=torch.stack(list(parts.values())).sum(),
            task=torch.stack(task).sum() if task else None,
            shown=shown,
        )

    def looks(self, source: BatchSource) -> Callable[[], Iterator[Look]]:
        """Passes over the images of `source`, not augmented, for `Loss.prepare`."""

        def once() -> Iterator[Look]:
            for batch in plain_batches(source):
                teacher = self.teach(batch.images) if self.teacher is not None else Taps(logits=_stored(batch))
                labels = teacher.logits.argmax(dim=1) if self.labels == "argmax" else batch.labels
                assert batch.index is not None
                yield Look(teacher=teacher, labels=labels, index=batch.index)

        return once


def _stored(batch: Batch) -> Tensor:
    assert batch.logits is not None  # check_task saw to it
    return batch.logits


def plain_batches(source: BatchSource) -> Iterator[Batch]:
    """Every image of a source once, as it is (of noise: one epoch), in batches of `LOOK_ROWS` with their rows."""
    if isinstance(source, NoiseSource):
        for step in range(source.steps_per_epoch):
            batch = source.batch(step)
            batch.index = torch.full((len(batch.images),), -1, device=batch.images.device)
            yield batch
        return
    assert isinstance(source, StoreSource)  # stored views have no plain batches: check_task refuses the loss
    rows = source.order.indices
    for start in range(0, len(rows), LOOK_ROWS):
        at = rows[start : start + LOOK_ROWS]
        batch = source.store.gather(at)
        if batch.images.dtype == torch.uint8:
            batch.images = batch.images.float().div_(255)
        batch.index = torch.from_numpy(at).to(batch.images.device)
        yield batch


def paced(values: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Self-paced: only the easiest `share` of the samples count, by their present loss; others weigh 0.

    Terms that have one value for the whole batch stay as they are. Source: Kumar, Packer, Koller 2010 ("hard" weights;
    the threshold is the batch's quantile, so that it needs no scale).
    """
    own = {name: value for name, value in values.items() if value.ndim == 1}
    if share >= 1.0 or not own:
        return values
    total = torch.stack([value.detach() for value in own.values()]).sum(dim=0)
    kept = max(1, round(share * len(total)))
    weights = torch.zeros_like(total)
    weights[total.topk(kept, largest=False).indices] = len(total) / kept
    return {name: weights * value if name in own else value for name, value in values.items()}


def drawer(seed: int, step: int) -> Callable[[str], torch.Generator]:
    """`Batch.draw` of one step."""
    return lambda name: torch_generator(seed, "loss", step, zlib.crc32(name.encode()))


# --- slices -----------------------------------------------------------------------------------------------------------


def map_taps(taps: Taps, change: Callable[[Tensor], Tensor]) -> Taps:
    """The taps with every tensor changed."""
    made: dict[str, Any] = {}
    for entry in fields(Taps):
        value = getattr(taps, entry.name)
        made[entry.name] = (
            None if value is None else [change(v) for v in value] if isinstance(value, list) else change(value)
        )
    return Taps(**made)


def tensors_of(taps: Taps) -> list[Tensor]:
    """All tensors of the taps, in a fixed order."""
    found: list[Tensor] = []
    map_taps(taps, lambda tensor: found.append(tensor) or tensor)
    return found


_ROWS = ("images", "labels", "logits", "index")  # what a batch holds of every sample


def map_batch(batch: Batch, change: Callable[[Tensor], Tensor], names: tuple[str, ...] = _ROWS) -> Batch:
    """The batch with every tensor changed."""
    own = {name: getattr(batch, name) for name in names}
    return replace(batch, **{name: None if value is None else change(value) for name, value in own.items()})


def map_seen(seen: Seen, change: Callable[[Tensor], Tensor]) -> Seen:
    """Everything changed but the images, which no loss needs from other slices."""
    student = None if seen.student is None else map_taps(seen.student, change)
    teacher = None if seen.teacher is None else map_taps(seen.teacher, change)
    return Seen(student=student, teacher=teacher, batch=map_batch(seen.batch, change, _ROWS[1:]))


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """The batch in `parts` equal slices of neighbouring rows."""
    size = len(batch.images) // parts
    return [map_batch(batch, lambda t, at=at: t[at * size : (at + 1) * size]) for at in range(parts)]


def join_seen(parts: list[Seen]) -> Seen:
    """Slices one behind the other; the student's tensors become leaves whose gradients can be handed back."""

    def joined(read: Callable[[Seen], list[Tensor]]) -> Iterator[Tensor]:
        return iter([torch.cat(rows) for rows in zip(*(read(part) for part in parts), strict=True)])

    def rebuilt(which: str) -> Taps | None:
        first = getattr(parts[0], which)
        if first is None:
            return None
        whole = joined(lambda part: [t.detach() for t in tensors_of(getattr(part, which))])
        return map_taps(first, lambda _: next(whole))

    student = rebuilt("student")
    if student is not None:
        student = map_taps(student, lambda tensor: tensor.requires_grad_())
    rows = joined(lambda part: [t for name in _ROWS if (t := getattr(part.batch, name)) is not None])
    return Seen(student=student, teacher=rebuilt("teacher"), batch=map_batch(parts[0].batch, lambda _: next(rows)))
