"""Named presets of batch, optimiser, schedule and augmentation. No torch.

A protocol is never mixed silently: the effective plan is printed, stored in run.json, and says which values came from
flags. Sources: ../shared methods cards kd.md §1.1 (`cifar-kd`) and dfkd.md §1.1 (`dfkd`); `bank-fast` and `mnist` are
synthkit's own.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from synthkit.config.schema import DistillConfig, TeachConfig
from synthkit.errors import ConfigError

Schedule = Literal["cosine", "step", "constant"]
SCHEDULES = ("cosine", "step", "constant")
OPTIMIZERS = ("sgd", "adamw", "adam")
_LIGHT = ("mobile", "shuffle")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a network is optimised."""

    batch_size: int = 128
    """Global batch size."""
    epochs: int | None = None
    """Passes over the training images; None when `steps` counts."""
    steps: int | None = None
    """Optimiser steps; None when `epochs` counts."""
    lr: float = 0.05
    """Peak learning rate."""
    optimizer: str = "sgd"
    """sgd, adamw or adam."""
    momentum: float = 0.9
    """Momentum of SGD; not read by the others."""
    nesterov: bool = False
    """Nesterov momentum of SGD."""
    weight_decay: float = 5e-4
    """On all parameters, BatchNorm and biases included."""
    schedule: str = "cosine"
    """cosine (to 0), step (times `gamma` at `milestones`) or constant."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """Shares of the whole run at which a step schedule falls."""
    gamma: float = 0.1
    """Factor at a milestone."""
    warmup: float = 0.0
    """Share of the steps with linear warm-up from lr / warm-up steps."""
    per_epoch: bool = False
    """Change the rate at epoch boundaries only (as `scheduler.step()` after each epoch does)."""
    augment: str = "none"
    """Augmentation policy (synthkit/data/augment.py)."""

    def __post_init__(self):
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1", got=value)
        if self.batch_size < 2:
            raise ConfigError("batch_size must be at least 2 (BatchNorm needs two samples)", got=self.batch_size)
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError("lr must be a positive number", got=self.lr)
        if self.weight_decay < 0:
            raise ConfigError("weight_decay must not be negative", got=self.weight_decay)
        if not 0 <= self.momentum < 1:
            raise ConfigError("momentum must be in [0, 1)", got=self.momentum)
        if not 0 <= self.warmup < 1:
            raise ConfigError("warmup is a share of the steps in [0, 1)", got=self.warmup)
        if self.schedule not in SCHEDULES:
            raise ConfigError("schedule: not known", got=self.schedule, allowed=SCHEDULES)
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError("optimizer: not known", got=self.optimizer, allowed=OPTIMIZERS)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the whole run."""
        return self.steps if self.steps is not None else (self.epochs or 1) * steps_per_epoch

    def lr_at(self, step: int, total: int, steps_per_epoch: int) -> float:
        """Learning rate of step `step` (from 0) of `total`."""
        warm = int(round(self.warmup * total))
        if step < warm:
            return self.lr * (step + 1) / warm
        if self.schedule == "constant":
            return self.lr
        at = step // steps_per_epoch * steps_per_epoch if self.per_epoch else step
        if self.schedule == "step":
            passed = sum(at >= round(share * total) for share in self.milestones)
            return self.lr * self.gamma**passed
        progress = max(at - warm, 0) / max(total - warm, 1)
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))

    def describe(self) -> str:
        """One line: what the network is trained with."""
        length = f"{self.steps} steps" if self.steps is not None else f"{self.epochs or 1} epochs"
        detail = f" momentum {self.momentum:g}" + (" nesterov" if self.nesterov else "")
        warm = f" after {100 * self.warmup:g} % warm-up" if self.warmup else ""
        return (
            f"{self.optimizer}{detail if self.optimizer == 'sgd' else ''}, lr {self.lr:g} {self.schedule}{warm}, "
            f"wd {self.weight_decay:g}, batch {self.batch_size}, {length}, augment {self.augment}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for run.json."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A named plan with a line of description."""

    description: str
    plan: Plan
    light_lr: float | None = None
    """Learning rate for MobileNet and ShuffleNet students, where the source uses another."""


PROTOCOLS: dict[str, Protocol] = {
    "bank-fast": Protocol(
        description="colour banks on two cores: SGD Nesterov .05, wd 5e-4, cosine, batch 128, 30 epochs, crop and flip",
        plan=Plan(batch_size=128, epochs=30, lr=0.05, nesterov=True, warmup=0.02, augment="crop_flip"),
    ),
    "mnist": Protocol(
        description="grey banks: SGD Nesterov .1, wd 5e-4, cosine, batch 128, 20 epochs, affine augmentation",
        plan=Plan(batch_size=128, epochs=20, lr=0.1, nesterov=True, warmup=0.03, augment="affine"),
    ),
    "cifar-kd": Protocol(
        description="RepDistiller: SGD .05 (.01 mobile/shuffle), wd 5e-4, batch 64, 240 epochs, /10 at 150/180/210",
        plan=Plan(batch_size=64, epochs=240, lr=0.05, schedule="step", per_epoch=True, augment="crop_flip"),
        light_lr=0.01,
    ),
    "dfkd": Protocol(
        description="data-free line: SGD .1, wd 1e-4, cosine per epoch, batch 256, 200 epochs, no augmentation",
        plan=Plan(batch_size=256, epochs=200, lr=0.1, weight_decay=1e-4, per_epoch=True),
    ),
}


def protocol_for(name: str, shape: tuple[int, int, int]) -> str:
    """The protocol that `name` means for images of (C, H, W): `auto` is mnist for grey ones, else bank-fast.

    Raises:
        ConfigError: no such protocol; the nearest one is offered.
    """
    if name == "auto":
        return "mnist" if shape[0] == 1 else "bank-fast"
    if name not in PROTOCOLS:
        raise ConfigError("protocol: not known", got=name, allowed=["auto", *PROTOCOLS], hint="synthkit list protocols")
    return name


def distill_plan(cfg: DistillConfig, shape: tuple[int, int, int]) -> tuple[str, Plan, list[str]]:
    """(protocol name, effective plan, names of the values that flags changed) of a distill run.

    Raises:
        ConfigError: unknown protocol, a value out of range, or epochs and steps both given.
    """
    name = protocol_for(cfg.protocol, shape)
    preset = PROTOCOLS[name]
    plan = preset.plan
    if preset.light_lr is not None and any(word in cfg.student.lower() for word in _LIGHT):
        plan = replace(plan, lr=preset.light_lr)
    if cfg.epochs is not None and cfg.steps is not None:
        raise ConfigError("epochs and steps exclude each other", got=(cfg.epochs, cfg.steps), hint="give one of them")
    given: dict[str, Any] = {}
    for f in fields(Plan):
        value = getattr(cfg, f.name, None)
        if value is None:
            continue
        given[f.name] = value
    if cfg.steps is not None:
        given["epochs"] = None
    plan = replace(plan, **given)
    return name, plan, sorted(k for k in given if k != "epochs" or cfg.steps is None)


def teach_plan(cfg: TeachConfig, channels: int) -> Plan:
    """The plan of a teach run; `augment auto` is crop_flip for colour images and shift for grey ones.

    Raises:
        ConfigError: a value out of range, or epochs and steps both given.
    """
    if cfg.epochs is not None and cfg.steps is not None:
        raise ConfigError("epochs and steps exclude each other", got=(cfg.epochs, cfg.steps), hint="give one of them")
    augment = cfg.augment if cfg.augment != "auto" else ("shift" if channels == 1 else "crop_flip")
    return Plan(
        batch_size=cfg.batch_size,
        epochs=None if cfg.steps is not None else 200 if cfg.epochs is None else cfg.epochs,
        steps=cfg.steps,
        lr=0.1 if cfg.lr is None else cfg.lr,
        optimizer=cfg.optimizer or "sgd",
        momentum=cfg.momentum,
        nesterov=cfg.nesterov and cfg.momentum > 0,
        weight_decay=5e-4 if cfg.weight_decay is None else cfg.weight_decay,
        schedule=cfg.schedule,
        milestones=(0.6, 0.75, 0.9),
        warmup=cfg.warmup,
        augment=augment,
    )
