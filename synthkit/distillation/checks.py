"""May this loss be trained on this bank with these labels? Refused before any work, with the remedy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from synthkit.bank import Bank, LabelSet
from synthkit.bank.labels.stored import has_logits
from synthkit.config.schema import DistillConfig
from synthkit.distillation.contract import Loss, LossNeeds
from synthkit.distillation.ensemble import TeacherEnsemble
from synthkit.distillation.label_sets import note_topk
from synthkit.distillation.optimizers import make_optimizer
from synthkit.distillation.protocols import Plan
from synthkit.distillation.weighted import WeightedSum
from synthkit.errors import ConfigError, RequirementError

if TYPE_CHECKING:
    from synthkit.models.view import TeacherView


def check_logits(
    cfg: DistillConfig,
    bank: Bank,
    labels: LabelSet | None,
    teacher: TeacherView | None,
    plan: Plan,
    loss: Loss,
    notes: list[str],
) -> bool:
    if cfg.logits == "stored" and labels is None and not has_logits(bank):
        raise RequirementError(
            f"logits stored: bank {cfg.bank} has none",
            hint="use --logits live with a teacher, or make some: synthkit relabel",
        )
    if cfg.logits == "live" and teacher is None:
        raise RequirementError("logits live: there is no teacher", hint="give --teacher, a model spec")
    if labels is not None and labels.kind == "views" and looks_first(loss):
        raise RequirementError(
            f"loss {cfg.loss_name} looks at the bank's images before training, and {labels.name!r} holds only views",
            hint="leave --label_set out",
        )
    live = teacher is not None and cfg.logits != "stored" and labels is None
    if not live:
        note_topk(bank, labels, loss, notes)
    if not live and plan.augment != "none":
        notes.append(
            f"stored logits belong to the images as they are, but augment is {plan.augment}: the student is told the "
            "same target for every view, which is another method than live logits (use --augment none to avoid it)"
        )
    return live


def looks_first(loss: Loss) -> bool:
    """Whether a loss, or a term of a sum, passes over the bank before the first step."""
    terms = loss.losses.values() if isinstance(loss, WeightedSum) else [loss]
    return any(type(term).prepare is not Loss.prepare for term in terms)


def check_labels(cfg: DistillConfig, bank: Bank, loss: Loss, live: bool) -> None:
    if cfg.label_weight < 0:
        raise ConfigError("label_weight must not be negative", got=cfg.label_weight)
    if (
        cfg.labels == "none"
        and cfg.label_weight
        or cfg.labels != "none"
        and not (cfg.label_weight or loss.requires.labels)
    ):
        raise ConfigError(
            "labels and label_weight go together",
            got=f"--labels {cfg.labels} --label_weight {cfg.label_weight}",
            hint="give both (--labels argmax --label_weight 0.1) or neither; losses that use labels need no weight",
        )
    if cfg.labels == "stored" and (not bank.has("labels") or bank.spec.label_kind == "none"):
        raise RequirementError(f"labels stored: bank {cfg.bank} has no labels", hint="use --labels argmax")
    if loss.requires.labels and cfg.labels == "none":
        stored = " or --labels stored" if bank.has("labels") and bank.spec.label_kind != "none" else ""
        raise RequirementError(f"loss {cfg.loss_name} needs hard labels", hint=f"use --labels argmax{stored}")
    needs = loss.requires
    if (needs.live_teacher or needs.teacher or needs.teacher_classifier) and not live:
        what = "features of the teacher" if needs.teacher else "the teacher itself"
        raise RequirementError(
            f"loss {cfg.loss_name} needs {what}, not only its stored logits",
            hint="give --teacher, a model spec, and leave --logits stored and --label_set out",
        )


def check_needs(
    cfg: DistillConfig,
    bank: Bank,
    labels: LabelSet | None,
    teacher: TeacherView | None,
    plan: Plan,
    needs: LossNeeds,
    notes: list[str],
) -> None:
    """What a loss needs of the bank, the batch and the teachers."""
    who = f"loss {cfg.loss_name}"
    several = len(teacher.teachers) if isinstance(teacher, TeacherEnsemble) else 1
    if several < needs.teachers:
        raise RequirementError(f"{who} needs {needs.teachers} teachers or more", hint="name them: --teacher A,B")
    if several > 1 and (needs.teacher or needs.teacher_classifier):
        raise RequirementError(
            f"{who} reads inside the teacher, and {several} teachers have nothing in common there",
            hint="name one teacher, or use a loss of logits",
        )
    if needs.index:
        if not bank.complete:
            raise RequirementError(
                f"{who} remembers every image, and the bank is unfinished ({len(bank)} of {bank.spec.images} images)",
                hint="finish it with synthkit synthesize --resume",
            )
        if labels is not None and labels.kind == "views":
            raise RequirementError(
                f"{who} remembers every image, and stored views mix them", hint="leave --label_set out"
            )
        if cfg.control == "noise":
            raise RequirementError(f"{who} remembers every image; noise is new in every step", hint="--control DATA")
    for name, given, read in (
        ("student_taps", cfg.student_taps, needs.student),
        ("teacher_taps", cfg.teacher_taps, needs.teacher),
    ):
        if given is not None and not {"maps", "preact"} & set(read):
            whose = name.partition("_")[0]
            raise ConfigError(f"{name}: {who} reads no maps of the {whose}", got=given, hint=f"leave --{name} out")
    rows = plan.batch_size // int(os.environ.get("WORLD_SIZE", "1"))  # of this process
    if cfg.accumulate < 1 or rows % cfg.accumulate:
        each = "" if rows == plan.batch_size else " of each process"
        raise ConfigError(f"accumulate must divide the batch size{each}", got=f"{rows} / {cfg.accumulate}")
    if rows // cfg.accumulate < 2 <= rows:
        raise ConfigError("accumulate leaves one image per micro-batch", got=cfg.accumulate, hint="use a smaller one")
    if plan.optimizer == "dot" and cfg.accumulate > 1 and (needs.relational or cfg.order == "self_paced"):
        raise ConfigError(f"optimizer dot cannot accumulate with {who}, which compares samples", hint="--accumulate 1")
    if plan.optimizer == "dot":
        make_optimizer(plan, nn.Linear(1, 1), torch.device("cpu"))  # refuses momenta out of its range
    if not 0 <= cfg.ema < 1:
        raise ConfigError("ema is a decay in [0, 1)", got=cfg.ema, hint="0.999 is usual")
    if cfg.ema and needs.deploys:
        raise ConfigError(f"ema: {who} deploys modules that have no moving average", got=cfg.ema, hint="--ema 0")
    if plan.batch_size < needs.smallest_batch:
        notes.append(f"{who} compares the samples of a batch: {plan.batch_size} are few, {needs.smallest_batch} usual")


DEFAULT_FRESH = 0.5  # the best mixture measured: assets/results/fresh_mixture_mnist.json


def fresh_share(cfg: DistillConfig, bank: Bank, live: bool, needs: LossNeeds) -> float:
    """The share of every batch that is drawn from the generator snapshots."""
    if needs.index and cfg.fresh:
        raise RequirementError(f"loss {cfg.loss_name} remembers every image: fresh ones have no row", hint="--fresh 0")
    if cfg.fresh is None:
        if needs.index:
            return 0.0
        return DEFAULT_FRESH if live and cfg.labels != "stored" and bank.generators() else 0.0
    if not 0 <= cfg.fresh <= 1:
        raise ConfigError("fresh is a share in [0, 1]", got=cfg.fresh)
    if cfg.fresh == 0:
        return 0.0
    if not live:
        raise RequirementError("fresh images need a live teacher", hint="give --teacher and leave --logits stored out")
    if cfg.labels == "stored":
        raise RequirementError("fresh images have no stored labels", hint="use --labels argmax or none")
    if not bank.generators():
        raise RequirementError(
            f"fresh: bank {cfg.bank} holds no generator snapshots",
            hint="leave --fresh out, or make the bank with a generator method (e.g. cudfkd)",
        )
    return cfg.fresh
