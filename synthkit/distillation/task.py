"""Everything a distill run needs, checked before any work: bank, teacher, student, loss, plan, data.

`check_task` writes nothing and trains nothing; whatever can be known to be wrong is refused here with the remedy.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from synthkit.bank import Bank, LabelSet
from synthkit.bank.hub.common import local_bank
from synthkit.bank.labels.stored import StoredLogits, has_logits, transform_note
from synthkit.config.schema import DistillConfig
from synthkit.data.augment import check_policy
from synthkit.data.policies import mixing_note
from synthkit.data.specs import load_data
from synthkit.distillation.announce import Parts, advice, parts_of
from synthkit.distillation.assemble import assemble, make_loss, placeholder_labels
from synthkit.distillation.checks import check_labels, check_logits, check_needs, fresh_share
from synthkit.distillation.contract import Loss
from synthkit.distillation.ensemble import TeacherEnsemble
from synthkit.distillation.label_sets import label_set_of
from synthkit.distillation.protocols import Plan, beside_note, distill_plan
from synthkit.distillation.sources import split_holdout, stream_seed
from synthkit.errors import ConfigError, DataError, ModelError, RequirementError
from synthkit.evaluation.metrics import matched
from synthkit.models import own
from synthkit.models.build import LoadedModel, load_model
from synthkit.models.view import ModelView, TeacherView
from synthkit.synthesis.sources import teacher_specs

if TYPE_CHECKING:
    from synthkit.data.real import RealData


@dataclass(kw_only=True)
class DistillTask:
    """A checked distill run."""

    cfg: DistillConfig
    bank: Bank
    loss: Loss
    protocol: str
    plan: Plan
    changed: list[str]
    """Values of the plan that flags changed."""
    teacher: TeacherView | None
    """None when the logits stored in the bank are used and no teacher is at hand."""
    teacher_facts: dict[str, Any]
    """Spec, architecture, sha256 and licence of the teacher, as cards and results name it."""
    labels: LabelSet | None = None
    """The label set that is trained on."""
    live: bool
    """Whether teacher logits are computed on the augmented image (else the stored ones are read)."""
    fresh: float
    """Share of every batch that is drawn from the bank's generator snapshots."""
    train: np.ndarray
    """Indices of the training images."""
    held: np.ndarray
    """Indices of the held-out images."""
    eval_data: RealData | None
    control_data: RealData | None
    control_augment: str = "none"
    """Augmentation of a control (stored views are the augmentation of the student itself)."""
    notes: list[str] = field(default_factory=list)
    """What the user should know before the start."""
    parts: Parts = Parts()
    """Sizes of the modules that the loss brings along."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of a pass over the training images."""
        return max(1, len(self.train) // self.plan.batch_size)

    @property
    def views(self) -> bool:
        """Whether the student is trained on stored views."""
        return self.labels is not None and self.labels.kind == "views"

    @property
    def stored(self) -> StoredLogits | None:
        """Stored logits of the images as they are; None where there are none."""
        if self.labels is not None and not self.views:
            return StoredLogits(self.labels)
        return StoredLogits(self.bank) if has_logits(self.bank) else None

    def student(self, seed: int) -> tuple[LoadedModel, ModelView]:
        """The student of one seed: fresh weights for a name, the file's weights otherwise."""
        return load_student(self.cfg, self.bank, seed)


def check_task(cfg: DistillConfig) -> DistillTask:
    """Resolve and check everything.

    Raises:
        UsageError: (ConfigError, ModelError, DataError, RequirementError) whatever is wrong, with what to do.
        BankError: the bank is damaged.
    """
    bank = Bank(local_bank(cfg.bank))
    if len(bank) == 0:
        raise DataError(f"bank {cfg.bank} holds no image yet", hint="finish it with synthkit synthesize --resume")
    loss = make_loss(cfg)
    protocol, plan, changed = distill_plan(cfg, bank.shape)
    check_policy(plan.augment)
    if cfg.seeds < 1:
        raise ConfigError("seeds must be at least 1", got=cfg.seeds)
    train, held = split_holdout(len(bank), cfg.holdout, cfg.seed)
    notes: list[str] = []
    labels = label_set_of(cfg, bank, notes)
    control_augment = plan.augment
    if labels is not None and labels.kind == "views":
        plan = dataclasses.replace(plan, augment="none")  # the views are the augmentation
    plan = _fit_batch(cfg, plan, labels, len(train), notes)
    teacher, facts = _teacher(cfg, bank, labels, notes)
    live = check_logits(cfg, bank, labels, teacher, plan, loss, notes)
    check_labels(cfg, bank, loss, live)
    fresh = fresh_share(cfg, bank, live, loss.requires)
    check_needs(cfg, bank, labels, teacher, plan, loss.requires, notes)
    if cfg.order == "easy2hard" and not bank.has("difficulty"):
        raise RequirementError(
            f"order easy2hard: bank {cfg.bank} stores no difficulty", hint="use --order random, or another bank"
        )
    _check_student(cfg, bank)
    options = dataclasses.asdict(loss.config)
    if (said := beside_note(protocol, cfg.loss_name, options)) is not None:
        notes.append(said)
    notes += advice(loss, cfg, plan)
    if idle := plan.idle(changed):
        notes.append(f"{' and '.join(idle)}: not read by optimizer {plan.optimizer} with schedule {plan.schedule}")
    if (said := mixing_note(plan.augment, cfg.labels)) is not None:
        notes.append(said)
    if bank.spec.contains_real:
        notes.append("the bank contains real images: this student is not data-free")
    elif bank.spec.real_data_used:
        notes.append("real data were used in making the bank: this student is not data-free")
    if (said := transform_note(bank)) is not None:
        notes.append(said)
    if not bank.complete:
        notes.append(f"the bank is unfinished: {len(bank)} of {bank.spec.images} images are used")
    task = DistillTask(
        cfg=cfg,
        bank=bank,
        loss=loss,
        protocol=protocol,
        plan=plan,
        changed=changed,
        teacher=teacher,
        teacher_facts=facts,
        labels=labels,
        live=live,
        fresh=fresh,
        train=train,
        held=held,
        eval_data=_eval_data(cfg, bank, notes),
        control_data=_control_data(cfg, bank, teacher, plan, len(train)),
        control_augment=control_augment,
        notes=notes,
    )
    task.parts = _try_loss(task)
    return task


def _try_loss(task: DistillTask) -> Parts:
    """Set the loss up once on both networks: what it cannot work with is found out here."""
    view = task.student(task.cfg.seed)[1]
    needs = task.loss.requires
    labels = placeholder_labels(task) if needs.index and needs.labels else None
    return parts_of(assemble(task, view, seed=task.cfg.seed, bank_labels=labels))


def _fit_batch(cfg: DistillConfig, plan: Plan, labels: LabelSet | None, images: int, notes: list[str]) -> Plan:
    """The plan with a batch that the training images can fill: a tiny bank (IPC 1) is one batch, as in the papers."""
    if plan.batch_size <= images:
        return plan
    if cfg.batch_size is not None and labels is not None and labels.kind == "views":
        return plan  # views are many: a batch may hold several of one image
    world = int(os.environ.get("WORLD_SIZE", "1"))
    size = images // world * world
    if size < 2:
        raise ConfigError(
            f"the {images} training images of the bank are fewer than a batch of {world} processes needs",
            hint="use fewer processes, or --holdout 0",
        )
    notes.append(f"batch_size {plan.batch_size} is more than the {images} training images: every step takes {size}")
    return dataclasses.replace(plan, batch_size=size)


def teacher_facts(spec: str, loaded: LoadedModel) -> dict[str, Any]:
    """Spec, architecture, sha256, accuracy and licence of a teacher, as cards, results and label sets name it."""
    card = loaded.card
    facts = {
        "spec": str(Path(spec).resolve()) if Path(spec).exists() else spec,
        "arch": card.arch,
        "sha256": loaded.sha256,
        "accuracy": card.accuracy,
        "licence": card.licence,
    }
    return {k: v for k, v in facts.items() if v is not None}


def _teacher(
    cfg: DistillConfig, bank: Bank, labels: LabelSet | None, notes: list[str]
) -> tuple[TeacherView | None, dict[str, Any]]:
    """The teacher given, else the one that the labels or the bank name; None when only stored logits are left."""
    named = dict(bank.spec.teacher) if labels is None else dict(labels.spec.teacher)
    spec = cfg.teacher or named.get("spec")
    spec = spec if isinstance(spec, str) else None  # what a bank names comes from a file
    stored = has_logits(bank) or labels is not None
    if cfg.teacher is None and cfg.logits == "stored" and not cfg.fresh and cfg.control == "none":
        return None, named
    if spec is None:
        if not stored:
            raise RequirementError(
                f"bank {cfg.bank} names no teacher and stores no logits", hint="give --teacher, a model spec"
            )
        return None, named
    specs = teacher_specs(spec)
    if not specs:
        raise ConfigError("teacher: no model spec", got=spec)
    try:
        members = [_load_teacher(one, bank) for one in specs]
    except ModelError as error:
        if cfg.teacher is not None or cfg.logits == "live":
            raise
        if not stored:
            raise RequirementError(
                f"the teacher {spec!r} cannot be loaded ({error}) and no logits are stored",
                hint="give --teacher, a model spec",
            ) from error
        notes.append(f"the teacher {spec!r} is not here ({error}); its stored logits are used")
        return None, named
    for one, loaded in zip(specs, members, strict=True):
        check_fits("teacher", one, bank, loaded.card.num_classes, tuple(loaded.card.input_size))
    views = [TeacherView.from_loaded(loaded) for loaded in members]
    if len(views) > 1:
        facts = [teacher_facts(one, loaded) for one, loaded in zip(specs, members, strict=True)]
        return TeacherEnsemble(views), {"spec": ",".join(str(f["spec"]) for f in facts), "members": facts}
    loaded = members[0]
    if named.get("sha256") and loaded.sha256 and loaded.sha256 != named["sha256"]:
        made = "the bank was made with" if labels is None else f"made label set {labels.name!r}"
        notes.append(f"the teacher is another file than the one that {made}")
    return views[0], teacher_facts(specs[0], loaded)


def _load_teacher(spec: str, bank: Bank) -> LoadedModel:
    """The model of a spec; `random:ARCH[@SEED]`, a teacher that knows nothing, to tell what a loss alone does; or a
    module of this process, which takes the bank's constants unless it came as a `ModelView`."""
    if not spec.startswith(("random:", own.OBJECT)):
        return load_model(spec)
    name, _, seed = spec.removeprefix("random:").partition("@")
    if seed and not seed.isdigit():
        raise ConfigError("teacher random:ARCH@SEED: the seed is a whole number", got=seed)
    channels, _, side = bank.shape
    loaded = load_model(
        name, num_classes=bank.num_classes, in_channels=channels, image_size=side, weights="optional",
        seed=int(seed or 0),
    )  # fmt: skip
    view = own.held(spec) if spec.startswith(own.OBJECT) else None
    mean, std = (view.mean, view.std) if isinstance(view, ModelView) else (bank.mean, bank.std)
    loaded.card.mean, loaded.card.std, loaded.card.class_names = list(mean), list(std), bank.class_names
    loaded.module.eval()
    return loaded


def check_fits(what: str, spec: str, bank: Bank, classes: int, size: tuple[int, ...]) -> None:
    """Raise `ModelError` unless a model of `classes` and input `size` (C, H, W) fits the bank."""
    if classes != bank.num_classes:
        raise ModelError(
            f"{what} {spec!r} has {classes} classes, the bank {bank.path} has {bank.num_classes}",
            hint="use a model of the same classes",
        )
    if size != tuple(bank.shape):
        raise ModelError(
            f"{what} {spec!r} takes images of {size}, the bank {bank.path} holds {tuple(bank.shape)}",
            hint="use a model of that input size, or make a bank for this one",
        )


def load_student(cfg: DistillConfig, bank: Bank, seed: int) -> tuple[LoadedModel, ModelView]:
    """The student and its view; a fresh one is normalised with the constants of the bank's teacher."""
    channels, height, width = bank.shape
    if height != width:
        raise DataError(f"bank {cfg.bank} holds images of {height}x{width}", hint="students take square images only")
    loaded = load_model(
        cfg.student,
        num_classes=bank.num_classes,
        in_channels=channels,
        image_size=height,
        weights="optional",
        seed=stream_seed(seed, "weights"),
    )
    if loaded.path is None:
        loaded.card.mean, loaded.card.std, loaded.card.class_names = list(bank.mean), list(bank.std), bank.class_names
    view = ModelView.from_loaded(loaded)
    loaded.module.train()
    return loaded, view


def _check_student(cfg: DistillConfig, bank: Bank) -> None:
    loaded, view = load_student(cfg, bank, cfg.seed)
    check_fits("student", cfg.student, bank, loaded.card.num_classes, tuple(loaded.card.input_size))
    loaded.module.eval()
    try:
        with torch.no_grad():
            logits = view(torch.zeros(2, *bank.shape))
    except RuntimeError as error:
        raise ModelError(f"student {cfg.student!r} cannot take images of {tuple(bank.shape)} ({error})") from error
    if logits.shape != (2, bank.num_classes):
        raise ModelError(
            f"student {cfg.student!r} gives an output of {tuple(logits.shape)} for 2 images, (2, {bank.num_classes}) "
            "is needed"
        )


def _eval_data(cfg: DistillConfig, bank: Bank, notes: list[str]) -> RealData | None:
    """The labelled data in the size and class order of the bank."""
    if cfg.eval_data is None:
        return None
    view = load_student(cfg, bank, cfg.seed)[1]
    data, said = matched(view, load_data(cfg.eval_data, "test", size=bank.shape))
    notes.extend(f"eval_data: {text}" for text in said)
    return data


def _control_data(
    cfg: DistillConfig, bank: Bank, teacher: TeacherView | None, plan: Plan, images: int
) -> RealData | None:
    if cfg.control == "none":
        return None
    if teacher is None:
        raise RequirementError("a control needs the teacher itself", hint="give --teacher, a model spec")
    if cfg.control == "noise":
        return None
    if ":" not in cfg.control:
        raise ConfigError("control: not known", got=cfg.control, allowed=["none", "noise"], hint="or a data spec")
    data = load_data(cfg.control, "train", size=bank.shape).subset(images, seed=stream_seed(cfg.seed, "subset"))
    if len(data) < plan.batch_size:
        raise DataError(
            f"control {cfg.control}: {len(data)} images are fewer than one batch of {plan.batch_size}",
            hint="use a smaller --batch_size",
        )
    return data
