"""`synthkit relabel`: labels of a bank's images by any teacher, or of stored views of them (FKD), as a label set.

A shard of the set is a pure function of (images, teacher, policy, shard number): it is made from whole batches that
begin at fixed rows, so a killed run goes on with the first shard that is missing and ends with the same bytes (same
hardware). The images are only read.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from synthkit.bank import Bank, LabelSet, LabelSpec, LabelWriter
from synthkit.bank.labels.spec import check_name, plan_rows_per_shard, set_path
from synthkit.bank.labels.stored import pixel_column, transform_note
from synthkit.bank.labels.topk import compress_topk, tail_error
from synthkit.bank.labels.views import ViewDraw, ViewPolicy, Views, apply_views, join_views
from synthkit.config.schema import RelabelConfig
from synthkit.config.worker import shards_of, worker_of
from synthkit.distillation.ensemble import TeacherEnsemble
from synthkit.distillation.relabel_presets import PRESETS, Labelling, labelling
from synthkit.distillation.task import check_fits, teacher_facts
from synthkit.errors import ConfigError, DataError, ModelError, OutputExistsError, RequirementError
from synthkit.models.build import load_model
from synthkit.models.view import TeacherView
from synthkit.runtime import Runtime, format_bytes, format_seconds
from synthkit.synthesis.sources import teacher_specs

if TYPE_CHECKING:
    from torch import Tensor

TIMED_BATCHES = 2
ERROR_ROWS = 256  # rows of a shard on which the error of the top-k is measured
ERROR_TEMPERATURES = (1.0, 2.0, 4.0, 20.0)


@dataclass(kw_only=True)
class RelabelTask:
    """A checked relabel run."""

    cfg: RelabelConfig
    how: Labelling
    bank: Bank
    teacher: TeacherView
    spec: LabelSpec
    draw: ViewDraw | None
    """The views; None labels the images as they are."""
    worker: tuple[int, int]
    """(I, N) of --shards; (1, 1) makes all."""
    notes: list[str]


def relabel(cfg: RelabelConfig) -> LabelSet:
    """Label the bank `cfg.bank` and return the finished label set; resumable after any kill, shard by shard.

    With several processes (torchrun) or machines (`shards`) each labels its part of the shards; the set that one of
    several workers returns may be unfinished.

    Raises:
        UsageError: something does not fit, or the set exists and `resume` was not asked for; nothing was written.
        BankBusyError: another run is making these labels. BankError: the bank is damaged.
        NonFiniteError: the teacher gave a logit that fp16 cannot hold. StorageError: disk full or the like.
    """
    task = check_relabel(cfg)
    runtime_config = cfg.runtime
    if runtime_config.precision == "auto":  # labels are kept for long: bf16 would cost them three digits
        runtime_config = replace(runtime_config, precision="fp32")
    runtime = Runtime.create(runtime_config)
    task.teacher.to(runtime.device, channels_last=runtime.channels_last)
    if runtime.config.compile:
        for view in task.teacher.teachers if isinstance(task.teacher, TeacherEnsemble) else [task.teacher]:
            view.module.compile()
    job = _Job(task, runtime)
    mine = shards_of(task.worker, task.spec.shards)
    missing = len(mine)
    if _labels_json(task.bank, cfg.name).exists():
        missing = len(set(LabelWriter.open(cfg.bank, cfg.name, expect=task.spec).missing()) & set(mine))
    if missing:
        with teacher_mode(task.teacher, task.how.bn):
            job.announce(job.measure(), missing)
            if runtime.is_main:
                LabelWriter.open_or_create(cfg.bank, cfg.name, task.spec)
            runtime.accelerator.wait_for_everyone()
            job.run(LabelWriter.open(cfg.bank, cfg.name, expect=task.spec))
    runtime.accelerator.wait_for_everyone()
    LabelWriter.open(cfg.bank, cfg.name)  # whoever was last has written the manifest; a killed run may not have
    return Bank(cfg.bank).labels(cfg.name)


def check_relabel(cfg: RelabelConfig) -> RelabelTask:
    """Resolve and check everything; writes nothing. Raises as `relabel`."""
    check_name(cfg.name)
    how = labelling(cfg)
    worker = worker_of(cfg.shards) if cfg.shards else (1, 1)
    bank = Bank(cfg.bank)
    if not bank.complete:
        raise DataError(f"bank {cfg.bank} is unfinished ({len(bank)} of {bank.spec.images} images)",
                        hint="finish it with synthkit synthesize --resume: labels are numbered by image")  # fmt: skip
    if _labels_json(bank, cfg.name).exists() and not (cfg.resume or cfg.shards):
        raise OutputExistsError(f"bank {cfg.bank} has a label set {cfg.name!r} already",
                                hint="go on with --resume, or choose another --name")  # fmt: skip
    if how.views < 0:
        raise ConfigError("views must not be negative", got=how.views)
    notes = [text for text in (transform_note(bank),) if text]
    if cfg.preset is not None:
        notes.append(f"preset {cfg.preset}{'' if how.name != 'custom' else ' changed by flags'}: "
                     f"{PRESETS[cfg.preset].description}")  # fmt: skip
    teacher, facts = _teacher(cfg, how, bank, notes)
    least = 2 if how.bn == "batch" else 1
    if how.batch_size < least:
        raise ConfigError(f"batch_size must be at least {least}", got=how.batch_size)
    size = (bank.shape[1], bank.shape[2])
    draw = None
    if how.views:
        policy = ViewPolicy(epochs=how.views, crop_scale=how.crop_scale, crop_ratio=how.crop_ratio, flip=how.flip,
                            mix=how.mix, mix_alpha=how.mix_alpha)  # fmt: skip
        draw = ViewDraw(policy, images=len(bank), source=size, size=size, seed=cfg.seed)
    elif how.bn == "batch":
        notes.append("--bn batch: a batch is consecutive images as the bank stores them; where those are of one class, "
                     "so are the statistics (views are in random order)")  # fmt: skip
    spec = label_spec(cfg, how, bank, facts, draw)
    return RelabelTask(cfg=cfg, how=how, bank=bank, teacher=teacher, spec=spec, draw=draw, worker=worker, notes=notes)


def _labels_json(bank: Bank, name: str) -> Path:
    return set_path(bank.path, name) / "labels.json"


def label_spec(
    cfg: RelabelConfig, how: Labelling, bank: Bank, facts: dict[str, Any], draw: ViewDraw | None
) -> LabelSpec:
    """The spec of the set; its policy record says everything that decides the labels beside images and teacher.

    `policy`: name (of a preset; "custom" where flags decide), version of this record, seed, views (None: the images
    as they are; else the drawing of crop, flip and mix), teacher (BatchNorm mode, batch size, precision, and for
    several teachers how they were combined).
    """
    rows = len(bank) if draw is None else len(draw)
    precision = "fp32" if cfg.runtime.precision == "auto" else cfg.runtime.precision
    policy = {
        "name": how.name, "version": 1, "seed": cfg.seed if draw is not None else None,
        "views": None if draw is None else draw.policy.to_dict(),
        "teacher": {"bn": how.bn, "batch_size": how.batch_size, "precision": precision,
                    **({"combine": how.combine, "weights": cfg.weights and list(cfg.weights)}
                       if "members" in facts else {})},
    }  # fmt: skip
    common: dict[str, Any] = {
        "kind": "images" if draw is None else "views", "bank": bank.record["uuid"], "images": len(bank), "rows": rows,
        "num_classes": bank.num_classes, "top_k": how.top_k, "size": None if draw is None else draw.size,
        "teacher": facts, "policy": policy,
    }  # fmt: skip
    row_bytes = LabelSpec(**common).row_bytes
    return LabelSpec(**common, rows_per_shard=plan_rows_per_shard(rows, row_bytes, multiple=how.batch_size))


def _teacher(cfg: RelabelConfig, how: Labelling, bank: Bank, notes: list[str]) -> tuple[TeacherView, dict[str, Any]]:
    """The teacher, or several as one (`--teacher A,B`), and what cards say of it."""
    named = cfg.teacher or bank.spec.teacher.get("spec")
    if not isinstance(named, str):  # what a bank names comes from a file
        raise RequirementError(f"bank {cfg.bank} names no teacher", hint="give --teacher, a model spec")
    found = [_member(spec, cfg, how, bank, notes) for spec in teacher_specs(named)]
    if not found:
        raise ConfigError("teacher: no model spec", got=named)
    if len(found) == 1:
        if cfg.weights is not None:
            raise ConfigError("weights are for several teachers", got=cfg.weights, hint="--teacher A,B")
        return found[0]
    members = [facts for _, facts in found]
    shas = [str(facts.get("sha256")) for facts in members]
    facts = {"spec": ",".join(str(f["spec"]) for f in members), "members": members,
             "sha256": hashlib.sha256(" ".join(shas).encode()).hexdigest()}  # fmt: skip
    return TeacherEnsemble([view for view, _ in found], how.combine, cfg.weights), facts


def _member(
    spec: str, cfg: RelabelConfig, how: Labelling, bank: Bank, notes: list[str]
) -> tuple[TeacherView, dict[str, Any]]:
    loaded = load_model(spec)
    check_fits("teacher", spec, bank, loaded.card.num_classes, tuple(loaded.card.input_size))
    view = TeacherView.from_loaded(loaded)
    ours, theirs = bank.spec.class_names, loaded.card.class_names
    if ours and theirs and list(ours) != list(theirs):
        if sorted(ours) == sorted(theirs):
            raise ModelError(f"teacher {spec!r} has the classes of bank {cfg.bank} in another order",
                             hint="use a teacher of the bank's class order")  # fmt: skip
        notes.append("the teacher's class names are not the bank's: is it a teacher of the same classes?")
    if how.bn == "batch" and not view.has_batchnorm:
        raise RequirementError(f"bn batch: teacher {spec!r} has no BatchNorm layers", hint="leave --bn out")
    return view, teacher_facts(spec, loaded)


@contextlib.contextmanager
def teacher_mode(teacher: TeacherView, bn: str) -> Iterator[None]:
    """The teacher as it is (eval), or with every BatchNorm on the statistics of the batch; nothing of it changes.

    Only BatchNorm layers are switched: dropout stays off, and the running statistics are not updated. (The released
    code of SRe2L++ and CV-DD puts the whole network in train mode.)
    """
    layers = [m for m in teacher.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if bn != "batch":
        layers = []
    before = [(m.training, m.track_running_stats) for m in layers]
    for m in layers:
        m.training, m.track_running_stats = True, False
    try:
        yield
    finally:
        for m, (training, track) in zip(layers, before, strict=True):
            m.training, m.track_running_stats = training, track


@dataclass(kw_only=True)
class _Read:
    """What one batch needs, on the CPU."""

    skip: int
    """Rows at the front whose labels are not kept: the last batch of a set may be filled up with rows before it."""
    images: Tensor
    views: Views | None = None
    partners: Tensor | None = None
    records: dict[str, np.ndarray]
    """Columns of the kept rows, without the targets."""
    labels: np.ndarray | None
    """The bank's labels of the kept rows' images."""
    tail_error: dict[str, float] | None = None
    """What the top-k costs on these rows, by temperature."""


class _Job:
    """One run over the missing shards of a set."""

    def __init__(self, task: RelabelTask, runtime: Runtime):
        self.task, self.runtime, self.bank, self.spec = task, runtime, task.bank, task.spec
        self.size = self.spec.size or (self.bank.shape[1], self.bank.shape[2])
        self.pixels = pixel_column(self.bank)

    def measure(self) -> float:
        """Seconds per row, from a few batches (the first one, which allocates, is not counted)."""
        starts = [i * self.task.how.batch_size for i in range(1 + TIMED_BATCHES)]
        starts = [s for s in starts if s < self.spec.rows]
        done, began = 0, time.monotonic()
        for number, start in enumerate(starts):
            read = self.read(start)
            self.label(read).cpu()
            if number == 0 and len(starts) > 1:
                began = time.monotonic()
                continue
            done += len(read.images)
        return (time.monotonic() - began) / done

    def announce(self, seconds_per_row: float, missing: int) -> None:
        """Say what will be made, how large it gets and how long it takes, before it starts."""
        task, spec, how = self.task, self.spec, self.task.how
        share = missing / spec.shards
        what = f"{len(self.bank):,} images" if task.draw is None else (
            f"{spec.rows:,} views ({how.views} of each of {len(self.bank):,} images, "
            f"crops {how.crop_scale[0]:g}-{how.crop_scale[1]:g}, flip {how.flip:g}, mix {how.mix})")  # fmt: skip
        kept = "all logits in fp16" if spec.top_k is None else f"top {spec.top_k} of {spec.num_classes} and tail mass"
        lines = [
            f"relabel: {what} of bank {task.cfg.bank} by {spec.teacher.get('spec')}, BatchNorm {how.bn}",
            f"  {kept}: {spec.row_bytes} bytes per row, {format_bytes(spec.planned_bytes)} in {spec.shards} shards"
            f" at {set_path(self.bank.path, task.cfg.name)}",
            f"  {1 / seconds_per_row:,.0f} rows/s, about {format_seconds(seconds_per_row * spec.rows * share)} for "
            f"{missing} shards; {self.runtime.describe()}",
            *(f"  note: {text}" for text in task.notes),
        ]
        for line in lines:
            self.runtime.say(line)

    def run(self, writer: LabelWriter) -> None:
        """Make the missing shards of this process's share."""
        absent = set(writer.missing())
        mine = shards_of(self.task.worker, self.spec.shards)[self.runtime.rank :: self.runtime.world]
        todo = [i for i in mine if i in absent]
        rows = sum(self.spec.shard_size(i) for i in todo)
        if not todo:
            return
        with (
            writer.claim(todo),
            ThreadPoolExecutor(1, thread_name_prefix="relabel-read") as pool,
            self.runtime.progress(rows, f"relabel {self.task.cfg.name}") as bar,
        ):
            starts = {i: self.starts(i) for i in todo}
            queue = [(i, s) for i in todo for s in starts[i]]
            ahead: Future[_Read] = pool.submit(self.read, queue[0][1])
            collected: list[tuple[_Read, dict[str, np.ndarray]]] = []
            for number, (index, _) in enumerate(queue):
                read = ahead.result()
                if number + 1 < len(queue):
                    ahead = pool.submit(self.read, queue[number + 1][1])
                collected.append((read, self.columns(read)))
                bar.update(len(read.images) - read.skip)
                if len(collected) == len(starts[index]):
                    writer.write_shard(index, *self.shard(index, collected))
                    collected = []

    def starts(self, index: int) -> list[int]:
        """First rows of the batches of a shard; shards hold whole batches."""
        first, count = index * self.spec.per_shard, self.spec.shard_size(index)
        return list(range(first, first + count, self.task.how.batch_size))

    def read(self, start: int) -> _Read:
        """The batch that begins at row `start`, with what its views need."""
        stop = min(start + self.task.how.batch_size, self.spec.rows)
        # Statistics of a small rest would be poor: the last batch is filled up with the rows before it.
        first = max(0, stop - self.task.how.batch_size) if self.task.how.bn == "batch" else start
        rows, skip, draw = np.arange(first, stop), start - first, self.task.draw
        if draw is None:
            return _Read(skip=skip, images=self.images(rows), records={}, labels=self.labels(rows[skip:]))
        records = draw.rows(first, stop)
        views = join_views(rows, records, draw.own_views(records["partner"][records["partner"] != rows]))
        found = self.images(np.concatenate([views.sample, views.partner_sample]))
        return _Read(
            skip=skip, images=found[: len(rows)], partners=found[len(rows) :], views=views,
            records={k: v[skip:] for k, v in records.items()}, labels=self.labels(views.sample[skip:]),
        )  # fmt: skip

    def images(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(getattr(self.bank.batch(rows, [self.pixels]), self.pixels)))

    def labels(self, rows: np.ndarray) -> np.ndarray | None:
        return self.bank.batch(rows, ["labels"]).labels if self.bank.has("labels") else None

    @torch.inference_mode()
    def label(self, read: _Read) -> Tensor:
        """(B, K) float32 teacher logits of the batch, on the device."""
        device = self.runtime.device
        images = read.images.to(device, non_blocking=True)
        if read.views is not None:
            partners = None if read.partners is None else read.partners.to(device, non_blocking=True)
            images = apply_views(images, read.views, self.size, partners)
        elif images.dtype != torch.uint8:
            images = images.float()
        if self.runtime.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.runtime.autocast():
            return self.task.teacher(images).float()

    def columns(self, read: _Read) -> dict[str, np.ndarray]:
        """The target columns of the batch, as they are stored."""
        logits = self.label(read)[read.skip :]
        if self.spec.top_k is None:
            # converted here: a logit beyond fp16 becomes inf, which the writer refuses with its row
            return {"logits": logits.half().cpu().numpy()}
        dense = logits[:ERROR_ROWS].cpu().numpy()
        read.tail_error = {f"{t:g}": round(tail_error(dense, self.spec.top_k, t), 6) for t in ERROR_TEMPERATURES}
        index, logit, tail = (part.cpu().numpy() for part in compress_topk(logits, self.spec.top_k))
        return {"topk_index": index, "topk_logit": logit, "tail_logsumexp": tail}

    def shard(
        self, index: int, collected: list[tuple[_Read, dict[str, np.ndarray]]]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(columns of the shard, facts for its record)."""
        parts = [{**read.records, **targets} for read, targets in collected]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        columns = {name: columns[name] for name in self.spec.layout.columns}
        meta: dict[str, Any] = {}
        if self.spec.top_k is not None:
            meta["tail_error"] = collected[0][0].tail_error
        if all(read.labels is not None for read, _ in collected):
            labels = np.concatenate([np.asarray(read.labels) for read, _ in collected])
            best = columns["topk_index"][:, 0] if self.spec.top_k else columns["logits"].argmax(axis=1)
            meta["agrees_with_bank_labels"] = int((best == labels).sum())
        return columns, meta
