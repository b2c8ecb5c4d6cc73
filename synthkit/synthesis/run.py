"""A sequential run: one process makes all shards in order and can be killed at any moment.

After every full shard the method's state is stored *before* the shard is committed, so that the newest state that the
committed shards reach always exists, and a resumed run ends with the same bytes (same hardware and thread count).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.bank import Bank, BankWriter
from synthkit.bank.disk.storage import staged
from synthkit.bank.state import entries
from synthkit.errors import RunError
from synthkit.lazy import torch
from synthkit.runtime import RunDir, format_bytes, format_seconds
from synthkit.synthesis.base import ImageBatch, Synthesizer, Task, flatten_state, unflatten_state
from synthkit.synthesis.columns import COLUMNS, arrays_of
from synthkit.synthesis.memory import free_bytes
from synthkit.synthesis.record import RunRecord

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.models.view import ModelView, TeacherView

SAFE_POINT_SECONDS = 60.0  # between two stored states of a method whose images come late
CHECKPOINTS = Path("student") / "checkpoints"  # in the bank: step-STEPS/ of every kept state of the student
LONG = 6 * 3600  # seconds after which a newcomer is told how to make it shorter


class Evaluation:
    """Diagnostic accuracy on labelled data: measured, logged, never used for any decision."""

    def __init__(self, data_spec: str, teacher: TeacherView):
        from synthkit.data.specs import load_data
        from synthkit.evaluation.metrics import evaluate_classifier

        self._evaluate = evaluate_classifier
        self.data = load_data(data_spec, "test", size=teacher.input_size)
        found = evaluate_classifier(teacher, self.data)
        self.teacher, self.teacher_top1 = teacher, found["top1"]
        self.warnings = list(found.get("warnings", []))

    def __call__(self, student: ModelView) -> dict[str, float]:
        found = self._evaluate(student, self.data, teacher=self.teacher)
        return {"test_top1": found["top1"], "test_agreement": found["agreement"], "test_n": found["n"]}


class Run:
    """One run over the missing shards of a bank."""

    def __init__(
        self,
        writer: BankWriter,
        method: Synthesizer,
        task: Task,
        record: RunRecord,
        evaluation: Evaluation | None = None,
        licence: str | None = None,
    ):
        self.config, self.writer, self.method, self.task = record.config, writer, method, task
        self.record, self.evaluation, self.licence, self.runtime = record, evaluation, licence, task.runtime
        self.pending: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        self.meta: dict[str, float] = {}  # of the latest batch
        self._saved = time.monotonic()
        task.earlier = self._earlier
        self.ahead = 0  # states of later shards, which a run that re-makes a lost shard must not push out

    def unfinished(self) -> bool:
        """Whether shards are missing, or only the closing record of a run that was killed after its last shard."""
        if self.writer.missing():
            return True
        found = self.writer.load_state()
        return self.record.status != "complete" and found is not None and found[0] == self.writer.shards

    def run(self) -> None:
        """Generate until the last shard is committed."""
        first = self.resume()
        self._steps_before = self.method.step
        if self.method.step == 0:
            announce(self.method, self.writer, self.record)
        self.record.begin(first)
        with self.runtime.progress(
            self.method.total_steps, f"{self.config.method_name} steps", initial=self.method.step
        ) as bar:
            self.record.bar = bar
            self.task.tick = bar.update
            self.task.log = self.record.log
            self.task.warn = self.record.warn
            if self.evaluation:
                self.task.eval_hook = self._evaluate_now
            if getattr(self.config.method, "checkpoints", 0):
                self.task.keep_student = self._keep_student
            self._shards(first, self.method.generate())
        self.record.progress(self.method.step - self._steps_before)
        if self.method.step < self.method.total_steps:
            self._load_state()  # a repaired bank was whole before the end; the state of the end may still be there
        result: dict[str, Any] = {}
        student = self.method.student()
        if student is not None and self.evaluation and self.method.step >= self.method.total_steps:
            result["student"] = {**self.evaluation(student), "teacher_top1": self.evaluation.teacher_top1}
        self.record.write("complete", **result)
        images = self.writer.spec.images
        self.runtime.say(f"bank {self.writer.path}: {images} images in {format_seconds(self.record.seconds)}")

    def resume(self) -> int:
        """Load the newest state that the committed shards reach; returns the first shard to make."""
        first = self._load_state()
        self.ahead = sum(1 for index in entries(self.writer.path / "state") if index > first)
        if self.method.step:
            self.runtime.say(f"resuming at shard {first} of {self.writer.shards}, step {self.method.step}")
        return first

    def _load_state(self) -> int:
        found = self.writer.load_progress() or self.writer.load_state()
        if found is None:
            return 0
        index, arrays, meta = found
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
        pending = {name: tensors.pop(f"pending/{name}") for name in COLUMNS if f"pending/{name}" in tensors}
        self.pending = {name: [pending[name].numpy()] if name in pending else [] for name in COLUMNS}
        self.meta = meta.get("meta", {})
        self.method.load_state_dict(unflatten_state(tensors, meta["plain"]))
        return index

    def _shards(self, first: int, batches: Iterator[ImageBatch | None]) -> None:
        missing = set(self.writer.missing())  # after a repair: lost shards among whole ones
        for index in range(first, self.writer.shards):
            size = self.writer.shard_size(index)
            while self._pending_images() < size:
                try:
                    batch = next(batches)
                except StopIteration:
                    made = index * self.writer.spec.per_shard + self._pending_images()
                    raise RunError(
                        f"{self.config.method_name} stopped after {made} of {self.writer.spec.images} images",
                        hint="an error of the method: it must yield as many as it is asked for",
                    ) from None
                if batch is None:
                    self._safe_point(index)
                else:
                    self._take(batch)
            columns = {name: np.concatenate(parts) for name, parts in self.pending.items() if parts}
            self.pending = {name: [values[size:]] if len(values) > size else [] for name, values in columns.items()}
            self.pending = {name: self.pending.get(name, []) for name in COLUMNS}
            self._save_state(index + 1)
            last = index == self.writer.shards - 1
            self._save_snapshot(index)
            if last:
                self._save_student()
            shard = {name: values[:size] for name, values in columns.items()}
            shard["origin_seed"] = np.full(size, self.config.seed, np.uint64)
            if index in missing:
                self.writer.write_shard(index, shard, {**self.meta, "step": self.method.step})
                missing.discard(index)
            self.writer.prune_states(keep=2 + self.ahead if missing else 1)
            self.writer.drop_progress()
            self.record.progress(self.method.step - self._steps_before)
            if not missing:
                return

    def _pending_images(self) -> int:
        return sum(len(part) for part in self.pending["images"])

    def _take(self, batch: ImageBatch) -> None:
        for name, array in arrays_of(batch).items():
            self.pending[name].append(array)
        self.meta = batch.meta

    def _earlier(self, images: int) -> Tensor:
        """The first `images` images of the run: those of committed shards, then those that wait for their shard."""
        waiting = self.pending["images"]
        committed = images - self._pending_images()
        parts = [np.zeros((0, *self.writer.spec.shape), np.uint8), *waiting]
        if committed:
            parts.insert(0, np.asarray(Bank(self.writer.path).batch(np.arange(committed), ["images"]).images))
        return torch.from_numpy(np.concatenate(parts))

    def _state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, plain = flatten_state(self.method.state_dict())
        arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in tensors.items()}
        arrays |= {f"pending/{name}": np.concatenate(parts) for name, parts in self.pending.items() if parts}
        return arrays, {"plain": plain, "meta": self.meta}

    def _save_state(self, index: int) -> None:
        self.writer.save_state(index, *self._state())

    def _safe_point(self, index: int) -> None:
        """Store the state within shard `index`, unless that was done a moment ago."""
        if time.monotonic() - self._saved >= SAFE_POINT_SECONDS:
            self.writer.save_progress(index, self.method.step, *self._state())
            self.record.progress(self.method.step - self._steps_before)
            self._saved = time.monotonic()

    def _save_snapshot(self, index: int) -> None:
        count = getattr(self.config.method, "snapshots", 0)
        shards = self.writer.shards
        half = shards // 2
        wanted = {shards - 1 - (i * (shards - half)) // count for i in range(count)} if count else set()
        snapshot = self.method.snapshot() if index in wanted else None
        if snapshot is not None:
            arrays = {name: value.detach().cpu().numpy() for name, value in snapshot.state.items()}
            self.writer.write_generator(index, arrays, {"generator": snapshot.spec, "step": snapshot.step})

    def _keep_student(self, student: ModelView, steps: int) -> None:
        """Store the student where that is due; a state that lies there from before a kill is left alone."""
        folder = self.writer.path / CHECKPOINTS
        kept = [int(entry.name.partition("-")[2]) for entry in folder.glob("step-*")]
        total: int = self.method.student_steps  # type: ignore[attr-defined]  # methods with a student have it
        if keeping_is_due(steps, kept, self.config.method.checkpoints, total):
            with staged(folder / f"step-{steps}") as staging:
                self._write_student(student, staging, {"step": steps})

    def _save_student(self) -> None:
        student = self.method.student()
        if student is not None:
            self._write_student(student, RunDir(self.writer.path / "student").create().path, {})

    def _write_student(self, student: ModelView, folder: Path, facts: dict[str, Any]) -> None:
        from synthkit.models.card import ModelCard
        from synthkit.models.weights import file_sha256, save_weights

        weights = folder / "student.safetensors"
        save_weights(student.module, weights)
        ModelCard(
            arch=getattr(self.method, "student_arch", "unknown"),
            num_classes=student.num_classes,
            input_size=student.input_size,  # type: ignore[arg-type]  # three whole numbers
            mean=student.mean,
            std=student.std,
            weights=weights.name,
            sha256=file_sha256(weights),
            class_names=student.class_names,
            source=f"co-trained by synthkit {self.config.method_name} from {self.config.teacher}",
            licence=self.licence,
            extra={"teacher": self.config.teacher, "bank": str(self.writer.path), **facts},
        ).save(folder / "card.yaml")

    def _evaluate_now(self, student: ModelView, epoch: int) -> dict[str, float] | None:
        epochs = getattr(self.config.method, "epochs", 1)
        every = max(1, epochs // 40)
        if epoch % every and epoch != epochs - 1:
            return None
        assert self.evaluation is not None  # the hook is only set with one
        return self.evaluation(student)


def keeping_is_due(steps: int, kept: Sequence[int], count: int, total: int) -> bool:
    """Whether a student of `steps` steps is the first in its part, when `total` steps are cut into `count` equal parts.

    Called at the end of every epoch: states are spread evenly and the last one is among them. One of an earlier leg in
    the same part (or this very one) is in `kept`: it would come out the same, so it counts.
    """
    part = steps * count // total
    return part > 0 and all(step * count // total != part for step in kept)


def announce(method: Synthesizer, writer: BankWriter, record: RunRecord) -> None:
    """Say how long a run will take and what it needs, before it begins."""
    estimate = method.estimate()
    spec, runtime = writer.spec, record.runtime
    runtime.say(
        f"about {format_seconds(estimate['seconds'])} and {format_bytes(estimate['memory_bytes'])} of memory for"
        f" {method.total_steps} steps; {spec.images} images of {spec.shape} in {spec.shards} shards"
        f" ({format_bytes(spec.planned_bytes)}) under {writer.path}",
    )
    if estimate["seconds"] > LONG:
        runtime.say(
            "that is long: lower --method.epochs, --method.batch_size or --method.width, or take a shipped recipe"
            " (synthkit list recipes); a run stopped with Ctrl-C goes on with --resume",
        )
    free = free_bytes(runtime.device)
    if estimate["memory_bytes"] > free:
        record.warn(
            f"the run needs about {format_bytes(estimate['memory_bytes'])}, {format_bytes(free)} are free;"
            " lower --method.batch_size"
        )
