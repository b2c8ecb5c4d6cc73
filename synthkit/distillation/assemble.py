"""The objective of a distill run: the loss by name, set up on the probed features of both networks."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import torch

from synthkit.config.schema import DistillConfig
from synthkit.distillation.contract import Loss, Setup, Shapes
from synthkit.distillation.objective import Distillation
from synthkit.distillation.sources import easy_share, stream_seed
from synthkit.errors import ConfigError
from synthkit.models.taps import TapSet
from synthkit.models.view import ModelView
from synthkit.tables import lookup

if TYPE_CHECKING:
    from synthkit.distillation.task import DistillTask


def make_loss(cfg: DistillConfig) -> Loss:
    """The loss that a config names.

    Raises:
        ConfigError: unknown name or option, or the config of another loss.
    """
    kind = lookup("loss", cfg.loss_name)
    config = cfg.loss
    if config is None:
        config = kind.Config()
    elif isinstance(config, dict):
        known = [f.name for f in dataclasses.fields(kind.Config)]
        for key in config:
            if key not in known:
                raise ConfigError(f"loss {cfg.loss_name}: no such option", got=key, allowed=known)
        config = kind.Config(**config)
    elif not isinstance(config, kind.Config):
        raise ConfigError(f"loss {cfg.loss_name}: its config is needed", got=type(config).__qualname__)
    return kind(config)


def points(text: str | None) -> list[str] | None:
    """The tap points of a config."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def assemble(
    task: DistillTask, view: ModelView, *, seed: int, control: bool = False, bank_labels: torch.Tensor | None = None
) -> Distillation:
    """The objective of one student.

    Args:
        control: the control student, whose images are not the bank's: the teacher is always live.
        bank_labels: label of every training row, for losses that look them up.

    Raises:
        ConfigError, ModelError: the features that the loss needs cannot be read, or do not suit it.
    """
    cfg, loss = task.cfg, make_loss(task.cfg)
    live = task.live or control
    student = TapSet(view, loss.requires.student, points=points(cfg.student_taps))
    teacher = None
    if live:
        assert task.teacher is not None  # check_task saw to it
        teacher = TapSet(task.teacher, loss.requires.teacher, points=points(cfg.teacher_taps))
    real = task.control_data if control else None
    loss.setup(
        Setup(
            student=student.shapes,
            teacher=Shapes() if teacher is None else teacher.shapes,
            num_classes=view.num_classes,
            batch_size=task.plan.batch_size,
            epochs=-(-task.plan.total_steps(task.steps_per_epoch) // task.steps_per_epoch),
            images=len(task.bank) if real is None else len(real),
            student_points=list(student.names),
            student_classifier=view.last_linear,
            teacher_classifier=None if teacher is None else teacher.view.last_linear,
            bank_labels=bank_labels,
            seed=stream_seed(seed, "weights", 1),
        )
    )
    policy = "argmax" if control and cfg.labels == "stored" else cfg.labels
    epochs = max(1, task.plan.total_steps(task.steps_per_epoch) // task.steps_per_epoch)
    pace = functools.partial(easy_share, epochs=epochs) if cfg.order == "self_paced" else None
    return Distillation(loss, student, teacher, labels=policy, label_weight=cfg.label_weight, pace=pace)


def placeholder_labels(task: DistillTask) -> torch.Tensor:
    """Labels of every class for a trial set-up, before any image was looked at."""
    return torch.arange(len(task.bank)) % task.bank.num_classes
