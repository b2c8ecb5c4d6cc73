"""The engine: drives any synthesizer, writes shards and states, tells time and memory, and can be killed at any moment.

It is the only part of the synthesis room that knows the bank. A method yields images; after every full shard the
engine stores the method's state *before* it commits the shard, so that the newest state that the committed shards
reach always exists, and a resumed run ends with the same bytes (same hardware and thread count).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.bank import Bank, BankSpec, BankWriter
from synthkit.bank.state import entries
from synthkit.config.parse import config_hash, config_to_dict
from synthkit.config.schema import SynthesizeConfig
from synthkit.errors import NonFiniteError, OutputExistsError, RequirementError, RunError
from synthkit.lazy import torch
from synthkit.runtime import RunDir, Runtime, format_bytes, format_seconds, hardware, peak_memory, versions
from synthkit.synthesis.base import (
    ImageBatch,
    Requires,
    Synthesizer,
    Task,
    flatten_state,
    to_uint8,
    unflatten_state,
)
from synthkit.synthesis.curriculum import Curriculum
from synthkit.tables import citation, lookup

if TYPE_CHECKING:
    from synthkit.models.build import LoadedModel
    from synthkit.models.view import ModelView, TeacherView

LONG = 6 * 3600  # seconds after which a newcomer is told how to make it shorter
COLUMNS = ("images", "labels", "logits", "difficulty", "origin_step")


def synthesize(config: SynthesizeConfig) -> Bank:
    """Make (or finish, with `resume`) the bank that `config` describes.

    Raises:
        UsageError: the task is impossible or the output exists; nothing was written.
        RunError: training diverged or the disk is full; committed shards stay valid.
        BankError: the bank to resume is damaged or was begun with another recipe.
    """
    from synthkit.models.build import load_model
    from synthkit.models.view import TeacherView

    runtime = Runtime.create(config.runtime)
    curriculum = Curriculum.named(config.curriculum)
    loaded = load_model(config.teacher, weights="required")
    teacher = TeacherView.from_loaded(loaded).to(runtime.device, channels_last=runtime.channels_last)
    method_class = lookup("method", config.method_name)
    check_requirements(config.method_name, method_class.requires, teacher)
    out = Path(config.out) if config.out else default_out(config, loaded)
    spec = bank_spec(config, loaded, teacher)
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out} is a file", hint="choose another --out; nothing is overwritten")
    if not config.resume and out.exists() and any(out.iterdir()):
        raise OutputExistsError(
            f"{out} is not empty", hint="go on with --resume, or choose another --out; nothing is overwritten"
        )
    early: list[str] = []  # what the method warns of while it is built, before there is a run to note it
    task = Task(
        teachers=[teacher],
        images=config.images,
        curriculum=curriculum,
        seed=config.seed,
        runtime=runtime,
        warn=early.append,
        extra={"teacher_arch": loaded.card.arch},
    )
    method: Synthesizer = method_class(config.method, task)
    evaluation = Evaluation(config.eval_data, teacher) if config.eval_data else None
    runtime.say(f"{config.method_name} on {config.teacher}, curriculum {curriculum.name}; {runtime.describe()}")
    if evaluation:
        runtime.say(f"teacher on {config.eval_data}: top-1 {100 * evaluation.teacher_top1:.2f} %")
        for warning in evaluation.warnings:
            runtime.say(f"warning: {warning}")
    writer = BankWriter.open_or_create(out, spec) if config.resume else BankWriter.create(out, spec)
    with writer.lock():
        run = Run(config, writer, method, task, loaded, evaluation)
        for text in early:
            run.warn(text)
        if run.unfinished():
            run.run()
    return Bank(out)


def default_out(config: SynthesizeConfig, loaded: LoadedModel) -> Path:
    """banks/METHOD-TEACHER-HASH."""
    teacher = Path(config.teacher).stem if "/" in config.teacher else config.teacher.split("@")[0]
    return Path("banks") / f"{config.method_name}-{teacher.replace(':', '-')}-{config_hash(config)[:8]}"


def check_requirements(name: str, requires: Requires, teacher: TeacherView) -> None:
    """Refuse what the method cannot do, with the remedy.

    Raises:
        RequirementError: the teacher lacks what the method needs.
    """
    if requires.batchnorm and not teacher.has_batchnorm:
        raise RequirementError(
            f"{name} needs BatchNorm layers in the teacher, {teacher.name} has none",
            hint="try method cudfkd (its BN term can be off), or a teacher with BatchNorm (lenet5_bn, not lenet5)",
        )


def bank_spec(config: SynthesizeConfig, loaded: LoadedModel, teacher: TeacherView) -> BankSpec:
    """Identity of the bank: everything that changes its bytes, and where the teacher came from."""
    card = loaded.card
    return BankSpec(
        shape=tuple(teacher.input_size),  # type: ignore[arg-type]  # three whole numbers
        num_classes=teacher.num_classes,
        class_names=teacher.class_names,
        mean=teacher.mean,
        std=teacher.std,
        label_kind="argmax",
        images=config.images,
        images_per_shard=config.images_per_shard,
        seed=config.seed,
        recipe={
            "method": {"name": config.method_name, **config_to_dict(config.method)},
            "curriculum": config.curriculum,
        },
        teacher={
            "spec": config.teacher,
            "arch": card.arch,
            "sha256": loaded.sha256,
            "accuracy": card.accuracy,
            "licence": card.licence,
            "source": card.source,
        },
        real_data_used=False,
        contains_real=False,
        extra={"versions": versions(), "hardware": hardware(), "citation": citation(config.method_name)},
    )


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
        config: SynthesizeConfig,
        writer: BankWriter,
        method: Synthesizer,
        task: Task,
        loaded: LoadedModel,
        evaluation: Evaluation | None,
    ):
        self.config, self.writer, self.method, self.task = config, writer, method, task
        self.loaded, self.evaluation, self.runtime = loaded, evaluation, task.runtime
        self.dir = RunDir(writer.path)
        self.pending: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        self.warnings: dict[str, int] = {}
        self.first_warnings: dict[str, str] = {}  # beginning of a warning -> its first full text, under which all count
        self.ahead = 0  # states of later shards, which a run that re-makes a lost shard must not push out

    def unfinished(self) -> bool:
        """Whether shards are missing, or only the closing record of a run that was killed after its last shard."""
        if self.writer.missing():
            return True
        record = self.dir.read_json("run.json") or {}
        found = self.writer.load_state()
        return record.get("status") != "complete" and found is not None and found[0] == self.writer.shards

    def run(self) -> None:
        """Generate until the last shard is committed."""
        first = self.resume()
        start, steps_before = time.monotonic(), self.method.step
        if first == 0:
            self._announce()
        record = {"config": config_to_dict(self.config), "versions": versions(), "hardware": hardware()}
        self.dir.write_json("run.json", {**record, "status": "running"})
        with self.runtime.progress(
            self.method.total_steps, f"{self.config.method_name} steps", initial=self.method.step
        ) as bar:
            self.bar = bar
            self.task.tick = bar.update
            self.task.log = self._log
            self.task.warn = self.warn
            if self.evaluation:
                self.task.eval_hook = self._evaluate_now
            try:
                self._shards(first, self.method.generate())
            except NonFiniteError as error:
                failed = {"status": "failed", "error": str(error), "warnings": self.warnings}
                self.dir.write_json("run.json", {**record, **failed})
                raise
        steps = self.method.step - steps_before
        if self.method.step < self.method.total_steps:
            self._load_state()  # a repaired bank was whole before the end; the state of the end may still be there
        seconds = time.monotonic() - start
        result: dict[str, Any] = {
            "status": "complete",
            "seconds": seconds,
            "cpu_seconds": time.process_time(),
            "steps_per_second": steps / max(seconds, 1e-9),
            "resumed_from_shard": first or None,
            "peak_memory_bytes": peak_memory(),
            "warnings": self.warnings,
        }
        student = self.method.student()
        if student is not None and self.evaluation and self.method.step >= self.method.total_steps:
            result["student"] = {**self.evaluation(student), "teacher_top1": self.evaluation.teacher_top1}
        self.dir.write_json("run.json", {**record, **result})
        self.runtime.say(f"bank {self.writer.path}: {self.config.images} images in {format_seconds(seconds)}")

    def resume(self) -> int:
        """Load the newest state that the committed shards reach; returns the first shard to make."""
        first = self._load_state()
        self.ahead = sum(1 for index in entries(self.writer.path / "state") if index > first)
        self.dir.truncate_metrics(lambda record: True)  # takes off a line that a killed run left torn
        self.logged = max((record.get("step", 0) for record in self.dir.metrics()), default=0)
        if first:
            self.runtime.say(f"resuming at shard {first} of {self.writer.shards}, step {self.method.step}")
        return first

    def _load_state(self) -> int:
        found = self.writer.load_state()
        if found is None:
            return 0
        index, arrays, meta = found
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
        pending = {name: tensors.pop(f"pending/{name}") for name in COLUMNS if f"pending/{name}" in tensors}
        self.pending = {name: [pending[name].numpy()] if name in pending else [] for name in COLUMNS}
        self.method.load_state_dict(unflatten_state(tensors, meta["plain"]))
        return index

    def _announce(self) -> None:
        estimate = self.method.estimate()
        spec = self.writer.spec
        self.runtime.say(
            f"about {format_seconds(estimate['seconds'])} and {format_bytes(estimate['memory_bytes'])} of memory for"
            f" {self.method.total_steps} steps; {spec.images} images of {spec.shape} in {spec.shards} shards"
            f" ({format_bytes(spec.planned_bytes)}) under {self.writer.path}",
        )
        if estimate["seconds"] > LONG:
            self.runtime.say(
                "that is long: lower --method.epochs, --method.batch_size or --method.width, or take a shipped recipe"
                " (synthkit list recipes); a run stopped with Ctrl-C goes on with --resume",
            )
        free = free_memory(self.runtime)
        if estimate["memory_bytes"] > free:
            self.warn(
                f"the run needs about {format_bytes(estimate['memory_bytes'])}, {format_bytes(free)} are free;"
                " lower --method.batch_size"
            )

    def _shards(self, first: int, batches: Iterator[ImageBatch]) -> None:
        missing = set(self.writer.missing())  # after a repair: lost shards among whole ones
        for index in range(first, self.writer.shards):
            size = self.writer.shard_size(index)
            while self._pending_images() < size:
                batch = next(batches, None)
                if batch is None:
                    made = index * self.writer.spec.per_shard + self._pending_images()
                    raise RunError(
                        f"{self.config.method_name} stopped after {made} of {self.config.images} images",
                        hint="an error of the method: it must yield as many as it is asked for",
                    )
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
                self.writer.write_shard(index, shard, {"step": self.method.step})
                missing.discard(index)
            self.writer.prune_states(keep=2 + self.ahead if missing else 1)
            if not missing:
                return

    def _pending_images(self) -> int:
        return sum(len(part) for part in self.pending["images"])

    def _take(self, batch: ImageBatch) -> None:
        n = len(batch.images)
        columns = {
            "images": batch.images if batch.images.dtype == torch.uint8 else to_uint8(batch.images),
            "labels": batch.labels,
            "logits": batch.logits,
            "difficulty": batch.difficulty,
        }
        for name, value in columns.items():
            if value is not None:
                dtype = {"labels": np.int32, "logits": np.float16, "difficulty": np.float32}.get(name)
                array = value.detach().cpu().numpy()
                self.pending[name].append(array.astype(dtype) if dtype else array)
        self.pending["origin_step"].append(np.full(n, batch.step, np.uint32))

    def _save_state(self, index: int) -> None:
        tensors, plain = flatten_state(self.method.state_dict())
        arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in tensors.items()}
        arrays |= {f"pending/{name}": np.concatenate(parts) for name, parts in self.pending.items() if parts}
        self.writer.save_state(index, arrays, {"plain": plain})

    def _save_snapshot(self, index: int) -> None:
        count = getattr(self.config.method, "snapshots", 0)
        shards = self.writer.shards
        half = shards // 2
        wanted = {shards - 1 - (i * (shards - half)) // count for i in range(count)} if count else set()
        snapshot = self.method.snapshot() if index in wanted else None
        if snapshot is not None:
            arrays = {name: value.detach().cpu().numpy() for name, value in snapshot.state.items()}
            self.writer.write_generator(index, arrays, {"generator": snapshot.spec, "step": snapshot.step})

    def _save_student(self) -> None:
        student = self.method.student()
        if student is None:
            return
        from synthkit.models.card import ModelCard
        from synthkit.models.weights import file_sha256, save_weights

        folder = RunDir(self.writer.path / "student").create().path
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
            licence=self.loaded.card.licence,
            extra={"teacher": self.config.teacher, "bank": str(self.writer.path)},
        ).save(folder / "card.yaml")

    def _log(self, record: dict[str, Any]) -> None:
        if record.get("step", 0) > self.logged:  # steps that a killed run had logged already come again
            self.dir.log(record)
        shown = {k: v for k, v in record.items() if k in ("kd", "g_loss", "class_balance", "test_top1")}
        self.bar.update(0, **shown)

    def warn(self, text: str) -> None:
        """Say `text` (again at its 10th and 100th time) and count it for run.json."""
        first = self.first_warnings.setdefault(text.split(": ", 1)[-1][:40], text)
        self.warnings[first] = self.warnings.get(first, 0) + 1
        if self.warnings[first] in (1, 10, 100):
            self.runtime.say(f"warning: {text}")

    def _evaluate_now(self, student: ModelView, epoch: int) -> dict[str, float] | None:
        epochs = getattr(self.config.method, "epochs", 1)
        every = max(1, epochs // 40)
        if epoch % every and epoch != epochs - 1:
            return None
        assert self.evaluation is not None  # the hook is only set with one
        return self.evaluation(student)


def free_memory(runtime: Runtime) -> int:
    """Free bytes on the run's device (on the CPU: available memory)."""
    if runtime.device.type == "cuda":
        return int(torch.cuda.mem_get_info(runtime.device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
