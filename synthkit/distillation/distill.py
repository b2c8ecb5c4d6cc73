"""`synthkit distill`: train a student from a bank alone."""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthkit.config.schema import DistillConfig
from synthkit.distillation.announce import announcement
from synthkit.distillation.assemble import assemble
from synthkit.distillation.deployed import Deployed
from synthkit.distillation.objective import LOOK_ROWS, Distillation
from synthkit.distillation.outputs import check_out, finish_run, short_hash, start_run
from synthkit.distillation.pulls import FILE as PULLS
from synthkit.distillation.pulls import first_pulls, in_words
from synthkit.distillation.ranks import talking
from synthkit.distillation.sources import (
    BatchSource,
    BlockShuffled,
    EasyToHard,
    GeneratorPool,
    NoiseSource,
    Order,
    RandomOrder,
    ResidentStore,
    Store,
    StoreSource,
    bank_store,
)
from synthkit.distillation.task import DistillTask, check_task
from synthkit.distillation.trainer import Trainer
from synthkit.distillation.view_source import ViewRows, ViewSource
from synthkit.models.card import ModelCard
from synthkit.models.view import ModelView, TeacherView
from synthkit.runtime import RunDir, Runtime, format_bytes


@dataclass(kw_only=True)
class RunResult:
    """What `distill` made."""

    path: Path
    """The run directory."""
    student: Path
    """The card of the (first) student; a model spec."""
    metrics: dict[str, Any]
    """The headline: last epoch of the student; over several seeds their mean, std and n."""
    students: list[Path] = field(default_factory=list)
    """The cards of all students, one per seed."""
    control: dict[str, Any] | None = None
    """The headline of the control student, where one was asked for."""


def distill(cfg: DistillConfig) -> RunResult:
    """Train `cfg.student` on the bank `cfg.bank`; resumable; the last epoch is the result.

    Writes into the run directory `student.safetensors`, `card.yaml`, `metrics.jsonl`, `run.json` and `result.json`;
    several seeds get a directory each and a `summary.json`; a control stands below `control/`.

    Raises:
        UsageError: something does not fit or the output directory is not empty; nothing was written.
        BankError: the bank is damaged.
        NonFiniteError: the loss became NaN.
    """
    path = default_out(cfg)
    check_out(path, cfg, resume=cfg.resume)
    task = check_task(cfg)
    runtime = Runtime.create(cfg.runtime, run_dir=path)
    job = _Job(task, runtime)
    for line in announcement(task, runtime, path):
        runtime.say(line)
    several = cfg.seeds > 1
    with talking("training") if runtime.world > 1 else contextlib.nullcontext():
        if several:
            start_run(path, cfg, runtime, command="distill")
        seeds = range(cfg.seed, cfg.seed + cfg.seeds)
        results = [job.run(path / f"seed{seed}" if several else path, seed) for seed in seeds]
        control = job.run(path / "control", cfg.seed, control=True) if cfg.control != "none" else None
        headline = summarise(results) if several else dict(results[0])
        if control is not None:
            headline["control"] = control
        if runtime.is_main:
            run = RunDir(path)
            run.write_json("summary.json" if several else "result.json", headline)
            if several:
                finish_run(run)
        runtime.accelerator.wait_for_everyone()
    runtime.close_trackers()
    folders = [path / f"seed{s}" for s in range(cfg.seed, cfg.seed + cfg.seeds)] if several else [path]
    cards = [folder / "card.yaml" for folder in folders]
    return RunResult(path=path, student=cards[0], metrics=headline, students=cards, control=control)


def default_out(cfg: DistillConfig) -> Path:
    """`cfg.out`, else runs/STUDENT-BANK-HASH."""
    if cfg.out:
        return Path(cfg.out)
    student = Path(cfg.student.split("@")[0]).name.replace(":", "-")
    return Path("runs") / f"{student}-{Path(cfg.bank).name}-{short_hash(cfg)}"


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, sample standard deviation and n over the seeds of every figure; the single results stand below `runs`."""
    figures = [k for k, v in results[0].items() if isinstance(v, float) and all(k in r for r in results)]
    figures = [k for k in figures if k not in ("lr", "fresh")]
    first = results[0]
    same = ("kind", "student", "teacher", "bank", "loss_name", "protocol", "fresh")
    summary: dict[str, Any] = {k: first[k] for k in same if k in first}
    summary["n"] = len(results)
    for key in figures:
        values = [float(r[key]) for r in results]
        summary[key] = {"mean": statistics.fmean(values), "std": statistics.stdev(values), "n": len(values)}
    summary["runs"] = results
    return summary


class _Job:
    """The runs (seeds, control) of one distill call; they share the teacher and a resident bank."""

    def __init__(self, task: DistillTask, runtime: Runtime):
        self.task, self.runtime, self.cfg = task, runtime, task.cfg
        self._store: Store | None = None
        if task.teacher is not None:
            task.teacher.to(runtime.device, channels_last=runtime.lays_channels_last(task.bank.shape))
            if runtime.config.compile:
                for member in getattr(task.teacher, "teachers", [task.teacher]):
                    member.module.compile()

    def sizes(self) -> dict[str, Any]:
        """Bytes of the images and of the labels that a student of a label set was given: both count as its data."""
        labels = self.task.labels
        if labels is None:
            return {}
        images = sum(s.n for s in self.task.bank.sidecars) * self.task.bank.spec.image_bytes
        return {"label_set": labels.name, "image_bytes": images, "label_bytes": labels.nbytes}

    # --- parts --------------------------------------------------------------------------------------------------------

    def store(self) -> Store:
        """The bank's images: one resident store for all runs, or a streamed one for each."""
        if self._store is None or not self._store.resident:
            stored = None if self.task.live or self.task.views else self.task.stored
            self._store = bank_store(self.task.bank, self.runtime.device, logits=stored)
            where = "streamed from disk"
            if isinstance(self._store, ResidentStore):
                where = f"resident on {self._store.home} ({format_bytes(self._store.nbytes)})"
            self.runtime.say(f"  bank {where}")
        return self._store

    def source(self, seed: int, control: bool) -> BatchSource:
        """Where the batches of one run come from."""
        task, plan = self.task, self.task.plan
        common: dict[str, Any] = {
            "rank": self.runtime.rank,
            "world": self.runtime.world,
            "policy": task.control_augment if control else plan.augment,
            "seed": seed,
            "device": self.runtime.device,
        }
        if control and task.control_data is None:
            steps = task.steps_per_epoch
            return NoiseSource(task.bank.shape, plan.batch_size, steps, **common)
        if control and task.control_data is not None:
            real = task.control_data
            store = ResidentStore(real.images, real.labels, None, self.runtime.device)
            return StoreSource(store, RandomOrder(np.arange(len(real)), seed), plan.batch_size, **common)
        if task.views:
            return self.view_source()
        store = self.store()
        order: Order = RandomOrder(task.train, seed)
        if not task.bank.fits_memory:  # not on what is free just now: a resumed run must find the same order
            order = BlockShuffled(task.bank, task.train, seed)
        if self.cfg.order == "easy2hard":
            steps = task.steps_per_epoch
            epochs = -(-plan.total_steps(steps) // steps)
            order = EasyToHard(task.train, task.bank.column("difficulty"), seed, epochs)
        pool = GeneratorPool(task.bank, self.runtime.device) if task.fresh > 0 else None
        return StoreSource(store, order, plan.batch_size, fresh=task.fresh, pool=pool, **common)

    def view_source(self) -> ViewSource:
        """Stored views, without those that show a held-out image."""
        task, plan = self.task, self.task.plan
        assert task.labels is not None
        held = np.zeros(task.labels.spec.images, bool)
        held[task.held] = True
        rows = ViewRows(task.labels, held)
        source = ViewSource(
            task.labels,
            self.store(),
            rows,
            plan.batch_size,
            images=len(task.train),
            rank=self.runtime.rank,
            world=self.runtime.world,
            device=self.runtime.device,
        )
        needed = plan.total_steps(source.steps_per_epoch) * plan.batch_size
        left = len(task.labels) - len(rows)
        if left:
            self.runtime.say(f"  note: {left:,} of {len(task.labels):,} views show a held-out image and are left out")
        if needed > len(rows):
            stored = f"{len(rows):,} are stored: they are read {needed / len(rows):.1f} times"
            self.runtime.say(f"  note: {needed:,} views are needed, {stored}")
        return source

    def objective(self, view: ModelView, seed: int, control: bool) -> Distillation:
        """The loss, set up on this student."""
        needs, labels = self.task.loss.requires, None
        if needs.index and needs.labels:
            labels = self.bank_labels(control)
        return assemble(self.task, view, seed=seed, control=control, bank_labels=labels)

    def bank_labels(self, control: bool) -> torch.Tensor:
        """(images,) int64: the label of every image under the label policy."""
        task = self.task
        real = task.control_data if control else None
        if real is None and self.cfg.labels == "stored":
            return torch.from_numpy(np.asarray(task.bank.column("labels")).astype(np.int64))
        assert task.teacher is not None  # a loss that remembers images reads features
        store = self.store() if real is None else ResidentStore(real.images, None, None, self.runtime.device)
        count = len(task.bank) if real is None else len(real)
        found = []
        for start in range(0, count, LOOK_ROWS):
            images = store.gather(np.arange(start, min(start + LOOK_ROWS, count))).images
            with torch.inference_mode():
                found.append(task.teacher(images).argmax(dim=1))
        return torch.cat(found).clone()

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, view: TeacherView, *, final: bool) -> dict[str, Any]:
        """Agreement on the held-out images and, where labelled data is given, accuracy; more at the end of the run."""
        from synthkit.evaluation.fidelity import evaluate_fidelity
        from synthkit.evaluation.metrics import evaluate_classifier

        task = self.task
        figures: dict[str, Any] = {}
        if len(task.held) and (task.teacher is not None or task.stored is not None):
            found = evaluate_fidelity(view, task.bank, teacher=task.teacher, indices=task.held, stored=task.stored)
            figures = {"holdout_agreement": found["agreement"], "holdout_kl": found["kl"]}
        if task.eval_data is None:
            return figures
        scores = evaluate_classifier(view, task.eval_data, teacher=task.teacher if final else None)
        figures |= {k: scores[k] for k in ("top1", "top5", "ece", "nll", "teacher_top1") if k in scores}
        if final:
            figures |= {f"eval_{k}": scores[k] for k in ("agreement", "kl") if k in scores}
            figures |= {k: scores[k] for k in ("per_class", "warnings") if scores[k]}
            if "teacher_top1" in scores:
                figures["retention"] = scores["top1"] / max(scores["teacher_top1"], 1e-9)
        return figures

    def judge(self, trainer: Trainer, objective: Distillation, student: TeacherView, *, final: bool) -> dict[str, Any]:
        """Figures of what would be used, and beside them of the student alone and of the moving average."""
        deployed = Deployed(trainer, objective.loss)
        whole = deployed.view()
        figures = self.evaluate(student if whole is None else whole, final=final)
        if whole is not None:
            figures |= {f"plain_{k}": v for k, v in self.evaluate(student, final=False).items()}
            figures |= deployed.costs()
        if trainer.average is not None:
            average = self.evaluate(trainer.frozen(trainer.average), final=False)
            figures |= {f"ema_{k}": v for k, v in average.items()}
        return figures

    # --- one run ------------------------------------------------------------------------------------------------------

    def run(self, path: Path, seed: int, *, control: bool = False) -> dict[str, Any]:
        """Train one student (or the control) into `path` and return its headline; a finished one is only read."""
        cfg, task = self.cfg, self.task
        own = replace(cfg, seed=seed, seeds=1, out=str(path)) if cfg.seeds > 1 or control else cfg
        found = check_out(path, own, resume=cfg.resume)
        if found is not None and found.get("status") == "done":
            self.runtime.say(f"  {path} is finished already: nothing is trained")
            return RunDir(path).read_json("result.json")
        began = time.monotonic()
        loaded, view = task.student(seed)
        source = self.source(seed, control)
        plan = task.plan
        if control:  # the same number of steps, however many images there are
            plan = replace(plan, epochs=None, steps=plan.total_steps(task.steps_per_epoch))
        facts = {"protocol": task.protocol, "plan": plan.to_dict(), "changed": task.changed, "notes": task.notes}
        run = start_run(path, own, self.runtime, command="distill", seed=seed, world=self.runtime.world, **facts)
        name = f"control {cfg.control.split(':')[0]}" if control else f"distill {loaded.card.arch} seed {seed}"
        objective = self.objective(view, seed, control)
        trainer = Trainer(
            runtime=self.runtime,
            view=view,
            objective=objective,
            source=source,
            plan=plan,
            run_dir=run,
            seed=seed,
            description=name,
            on_epoch=lambda epoch, frozen: self.judge(trainer, objective, frozen, final=epoch == trainer.epochs),
            eval_every=cfg.eval_every,
            accumulate=cfg.accumulate,
            ema=cfg.ema,
            tracked_as="control/" if control else f"seed{seed}/" if cfg.seeds > 1 else "",
        )
        if found is None or not trainer.restore():
            objective.loss.prepare(objective.looks(source))
            if self.runtime.world == 1 and not self.runtime.config.compile:
                run.write_json(PULLS, first_pulls(trainer, objective))
                for line in in_words(run.read_json(PULLS)):
                    self.runtime.say(line)
        result = {**self.facts(loaded.card.arch, control), "seed": seed, **trainer.fit()}
        if (norms := run.read_json(PULLS)) is not None:  # of this call, or of the one that is resumed
            result["first_gradient_norms"] = norms
        best = max((r["top1"] for r in run.metrics() if "top1" in r), default=None) if self.runtime.is_main else None
        if best is not None and cfg.eval_every:
            result["best_top1_diagnostic"] = best  # chosen on the test data, so never the headline
        if self.runtime.is_main:
            Deployed(trainer, objective.loss).save(run, lambda which: self.card(loaded.card, result, which))
            run.write_json("result.json", result)
            finish_run(run, seconds=result["seconds"], wall_seconds=time.monotonic() - began)
            trainer.state.clear()
            (path / PULLS).unlink(missing_ok=True)  # it stands in the result
        self.runtime.accelerator.free_memory()
        return result

    def facts(self, arch: str, control: bool) -> dict[str, Any]:
        """What a result is about."""
        cfg, task = self.cfg, self.task
        trained_on, images = "bank", len(task.train)
        if control and task.control_data is not None:
            images = len(task.control_data)
            trained_on = f"{images} random real images of {cfg.control}"
        elif control:
            trained_on, images = "noise N(0.5, 0.25), new in every step", 0
        return {
            "kind": "control" if control else "distill",
            "student": arch,
            "teacher": task.teacher_facts.get("spec"),
            "bank": str(task.bank.path),
            "trained_on": trained_on,
            "loss_name": cfg.loss_name,
            "protocol": task.protocol,
            "images": images,
            "fresh": 0.0 if control else task.fresh,
            **({} if control else self.sizes()),
            "holdout_images": len(task.held),
            "eval_data": cfg.eval_data,
        }

    def card(self, student: ModelCard, result: dict[str, Any], which: str = "") -> ModelCard:
        """The card of the finished student; `which` is the prefix of its figures (plain_, ema_)."""
        cfg, task, bank = self.cfg, self.task, self.task.bank
        data = task.eval_data
        return ModelCard(
            arch=student.arch,
            num_classes=student.num_classes,
            input_size=student.input_size,
            mean=student.mean,
            std=student.std,
            class_names=bank.class_names,
            accuracy=None if data is None else {f"{data.name} {data.split}": round(float(result[f"{which}top1"]), 6)},
            source=f"synthkit distill, {result['kind']} student, trained on {result['trained_on']}",
            licence=student.licence,
            extra={
                "teacher": task.teacher_facts,
                "bank": {"path": str(bank.path.resolve()), "uuid": bank.record.get("uuid")},
                "loss": {"name": cfg.loss_name, **asdict(task.loss.config)},
                "labels": {"policy": cfg.labels, "weight": cfg.label_weight},
                "protocol": task.protocol,
                "seed": result["seed"],
                "metrics": {k: v for k, v in result.items() if isinstance(v, float)},
            },
        )
