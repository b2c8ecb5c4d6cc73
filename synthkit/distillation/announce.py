"""What a distill run says before it begins: who learns what from whom, with which modules, how and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from synthkit.distillation.contract import Loss
from synthkit.distillation.ensemble import TeacherEnsemble
from synthkit.distillation.weighted import parse_terms
from synthkit.runtime import Runtime, format_bytes

if TYPE_CHECKING:
    from synthkit.config.schema import DistillConfig
    from synthkit.distillation.objective import Distillation
    from synthkit.distillation.protocols import Plan
    from synthkit.distillation.task import DistillTask
    from synthkit.models.taps import TapSet


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a loss brings along."""

    trained: int = 0
    """Parameters of the loss's own modules."""
    kept: int = 0
    """Bytes of their buffers (memories, directions, ...)."""
    deployed: int | None = None
    """Parameters of the deployed network; None where the student stands alone."""
    taps: str = ""
    """Where feature maps are read, in words."""


def parts_of(objective: Distillation) -> Parts:
    """What a loss that was set up brings along."""
    loss, student, aux = objective.loss, objective.student.view.module, objective.loss.aux
    read = [f"student {_points(objective.student)}"] if objective.student.names else []
    if objective.teacher is not None and objective.teacher.names:
        read.append(f"teacher {_points(objective.teacher)}")
    deployed = loss.deploy(student) if loss.requires.deploys else None
    return Parts(
        trained=0 if aux is None else size(aux),
        kept=0 if aux is None else sum(b.numel() * b.element_size() for b in aux.buffers()),
        deployed=None if deployed is None else size(deployed),
        taps="; ".join(read),
    )


def _points(taps: TapSet) -> str:
    """Names and shapes of the tapped maps."""
    shapes = taps.shapes.maps or taps.shapes.preact
    return ", ".join(f"{name} ({'x'.join(map(str, shape))})" for name, shape in zip(taps.names, shapes, strict=True))


def announcement(task: DistillTask, runtime: Runtime, path: Path) -> list[str]:
    """The lines before the start, the notes last."""
    cfg = task.cfg
    loaded, _ = task.student(cfg.seed)
    start = "fresh weights" if loaded.path is None else f"weights of {loaded.path}"
    flags = f" with {', '.join(task.changed)} by flag" if task.changed else ""
    beside = f" + {cfg.label_weight:g}*cross-entropy" if cfg.label_weight else ""
    return [
        f"distill: student {cfg.student} ({size(loaded.module):,} parameters, {start})",
        f"  teacher {teacher(task)}, {targets(task)}",
        f"  loss {cfg.loss_name}{beside}, labels {cfg.labels}{modules(task.parts, size(loaded.module))}",
        *([f"  maps: {task.parts.taps}"] if task.parts.taps else []),
        f"  bank {cfg.bank}: {len(task.train):,} images of {task.bank.shape}, {len(task.held):,} held out, "
        f"order {'as stored' if task.views else cfg.order}, fresh {task.fresh:g}",
        f"  protocol {task.protocol}{flags}: {task.plan.describe()}{extras(task, runtime.world)}",
        f"  out {path}; {runtime.describe()}",
        *(f"  note: {text}" for text in task.notes),
    ]


def teacher(task: DistillTask) -> str:
    """Who teaches, in words."""
    named = str(task.teacher_facts.get("spec") or task.teacher_facts.get("name") or "unnamed")
    if task.teacher is None:
        return named
    if isinstance(task.teacher, TeacherEnsemble):
        return f"{named} ({len(task.teacher.teachers)} as one, the mean of their softmaxes)"
    return f"{named} ({size(task.teacher.module):,} parameters)"


def targets(task: DistillTask) -> str:
    """Where the teacher's logits come from, in words."""
    labels = task.labels
    if labels is None:
        return f"{'live' if task.live else 'stored'} logits"
    kept = "all logits" if labels.spec.top_k is None else f"top {labels.spec.top_k}"
    return f"label set {labels.name} ({len(labels):,} {labels.kind}, {kept}, {format_bytes(labels.nbytes)})"


def modules(parts: Parts, alone: int) -> str:
    """What the loss brings along and whether it stays, in words; nothing where it brings nothing.

    Args:
        alone: parameters of the student alone.
    """
    said = []
    if parts.trained or parts.kept:
        memory = f" and {format_bytes(parts.kept)} of buffers" if parts.kept else ""
        said.append(f"; its own modules: {parts.trained:,} parameters{memory}")
    if parts.deployed is not None:
        said.append(
            f"; deployed with modules of the loss: {parts.deployed:,} parameters in all, the student alone "
            f"({alone:,}) is evaluated beside it"
        )
    elif said:
        said.append(", dropped after training")
    return "".join(said)


def extras(task: DistillTask, world: int) -> str:
    """What is done beside the plan, in words."""
    cfg = task.cfg
    said = [f"in {cfg.accumulate} micro-batches"] if cfg.accumulate > 1 else []
    said += [f"{task.plan.batch_size // world} images per process"] if world > 1 else []
    said += [f"moving average {cfg.ema:g} beside"] if cfg.ema else []
    said += [f"{cfg.seeds} seeds"] if cfg.seeds > 1 else []
    said += [f"control {cfg.control}"] if cfg.control != "none" else []
    return "".join(f", {text}" for text in said)


def size(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def advice(loss: Loss, cfg: DistillConfig, plan: Plan) -> list[str]:
    """Notes about a loss that is allowed, but hardly what is meant."""
    name, said = cfg.loss_name, []
    if not loss.stands_alone and not cfg.label_weight:
        example = f"kd+{loss.beta:g}*{name}" if name.isidentifier() else f"kd+{name}"
        said.append(
            f"loss {name} compares features only, so the student's classifier stays as it began: use it beside a loss "
            f'of the outputs, for example --loss "{example}"'
        )
    terms = [term.name for term in parse_terms(name)]
    if plan.optimizer == "dot" and not cfg.label_weight and "ce" not in terms:
        said.append(
            f"optimizer dot keeps the momentum of the labels apart from that of the teacher, and loss {name} has no "
            f'labels to learn: add them, for example --loss "ce+{name}" --labels argmax'
        )
    return said
