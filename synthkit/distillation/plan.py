"""How a network is optimised: batch, optimiser, learning-rate schedule, augmentation. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

from synthkit.errors import ConfigError

Schedule = Literal["cosine", "linear", "cosine_drop", "onecycle", "step", "constant"]
SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear", "cosine_drop", "onecycle", "step", "constant")
OPTIMIZERS = ("sgd", "adamw", "adam", "dot")
_ONE_CYCLE_START = 25.0  # one-cycle begins at lr / 25 and ends at a 10,000th of that (Smith & Topin; torch's defaults)
_ONE_CYCLE_END = 1e4
_DROP_AT = 5 / 6  # share of the run after which cosine_drop falls on a line (EDC's `cos2`)


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
    """sgd, adamw, adam or dot (SGD with a momentum for each of two losses)."""
    momentum: float = 0.9
    """Momentum of SGD; not read by the Adams."""
    nesterov: bool = False
    """Nesterov momentum of SGD."""
    dot_delta: float = 0.075
    """How far dot moves the two momenta apart: momentum - delta for the labels' part, + delta for the teacher's."""
    weight_decay: float = 5e-4
    """On all parameters, BatchNorm and biases included unless `decay_vectors` says otherwise."""
    decay_vectors: bool = True
    """Whether parameters of one dimension or none (BatchNorm, biases) decay too."""
    schedule: str = "cosine"
    """cosine, linear, cosine_drop, onecycle, step or constant: see `lr_at`."""
    eta: float = 1.0
    """How slowly cosine, linear and cosine_drop fall: a run is 1/eta of the way to 0 (eta 2 ends at half the rate)."""
    floor: float = 0.0
    """Share of `lr` at which cosine and linear end (eta 1)."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """Shares of the whole run at which a step schedule falls."""
    gamma: float = 0.1
    """Factor at a milestone."""
    warmup: float = 0.0
    """Share of the steps with linear warm-up from lr / warm-up steps; of a one-cycle run the share that rises."""
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
        if self.schedule == "onecycle" and self.warmup == 0:
            raise ConfigError("schedule onecycle: warmup says which share rises", got=0, hint="0.3 is usual")
        if not self.eta >= 1:
            raise ConfigError("eta must be at least 1 (a smaller one would reach 0 before the end)", got=self.eta)
        if not 0 <= self.floor < 1:
            raise ConfigError("floor is a share of lr in [0, 1)", got=self.floor)
        if not self.gamma > 0 or not all(0 < share < 1 for share in self.milestones):
            raise ConfigError(
                "gamma must be positive, and milestones are shares of the run in (0, 1)",
                got=(self.gamma, self.milestones),
                hint="0.625,0.75,0.875 for epochs 150, 180, 210 of 240",
            )
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError("optimizer: not known", got=self.optimizer, allowed=OPTIMIZERS)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the whole run."""
        return self.steps if self.steps is not None else (self.epochs or 1) * steps_per_epoch

    def decay_of(self, dimensions: int) -> float:
        """Weight decay of a parameter of so many dimensions."""
        return self.weight_decay if self.decay_vectors or dimensions > 1 else 0.0

    def lr_at(self, step: int, total: int, steps_per_epoch: int) -> float:
        """Learning rate of step `step` (from 0) of `total`.

        With p the share of the steps after the warm-up that is done: cosine `(1 + cos(pi p / eta)) / 2`, linear
        `1 - p / eta` (both between 1 and `floor` instead of 1 and 0), cosine_drop the same cosine until p = 5/6 and
        `(1 + cos(5 pi / (6 eta))) / 2 * (1 - p)` after it (a jump, as released), step `gamma` to the number of
        milestones passed, constant 1; all times lr. onecycle: a half cosine from lr/25 up to lr in the first `warmup`
        of the steps, another down to lr/250,000.
        """
        if self.schedule == "onecycle":
            return self._one_cycle(step, total)
        warm = int(round(self.warmup * total))
        if step < warm:
            return self.lr * (step + 1) / warm
        if self.schedule == "constant":
            return self.lr
        at = step // steps_per_epoch * steps_per_epoch if self.per_epoch else step
        if self.schedule == "step":
            passed = sum(at >= round(share * total) for share in self.milestones)
            return self.lr * self.gamma**passed
        done = min(max(at - warm, 0) / max(total - warm, 1), 1.0)
        if self.schedule == "linear":
            return self.lr * (self.floor + (1.0 - self.floor) * (1.0 - done / self.eta))
        if self.schedule == "cosine_drop" and done > _DROP_AT:
            return self.lr * _half_cosine(_DROP_AT / self.eta) * (1.0 - done)
        if self.schedule == "cosine_drop":
            return self.lr * _half_cosine(done / self.eta)
        return self.lr * (self.floor + (1.0 - self.floor) * _half_cosine(done / self.eta))

    def _one_cycle(self, step: int, total: int) -> float:
        first, last = self.lr / _ONE_CYCLE_START, self.lr / _ONE_CYCLE_START / _ONE_CYCLE_END
        peak = self.warmup * total - 1.0  # the step (a fraction) at which the rate is lr; before the first: never
        if peak > 0 and step <= peak:
            return self.lr + (first - self.lr) * _half_cosine(step / peak)
        return last + (self.lr - last) * _half_cosine(min((step - peak) / max(total - 1.0 - peak, 1e-9), 1.0))

    def describe(self) -> str:
        """One line: what the network is trained with."""
        length = f"{self.steps} steps" if self.steps is not None else f"{self.epochs or 1} epochs"
        own = {"sgd": " nesterov" if self.nesterov else "", "dot": f" -/+ {self.dot_delta:g}"}
        who = self.optimizer + (f" momentum {self.momentum:g}{own[self.optimizer]}" if self.optimizer in own else "")
        warm = f" after {100 * self.warmup:g} % warm-up" if self.warmup else ""
        slow = f" eta {self.eta:g}" if self.eta != 1 else ""
        slow += f" to {self.lr * self.floor:g}" if self.floor else ""
        spared = "" if self.decay_vectors else " (none on vectors)"
        return (
            f"{who}, lr {self.lr:g} {self.schedule}{slow}{warm}, "
            f"wd {self.weight_decay:g}{spared}, batch {self.batch_size}, {length}, augment {self.augment}"
        )

    def idle(self, names: Collection[str]) -> list[str]:
        """Which of the named values this plan does not read."""
        read = {
            "momentum": self.optimizer in ("sgd", "dot"),
            "nesterov": self.optimizer == "sgd",
            "dot_delta": self.optimizer == "dot",
            "milestones": self.schedule == "step",
            "gamma": self.schedule == "step",
            "floor": self.schedule in ("cosine", "linear"),
            "eta": self.schedule in ("cosine", "linear", "cosine_drop"),
        }
        return [name for name in names if not read.get(name, True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for run.json."""
        return asdict(self)


def _half_cosine(share: float) -> float:
    """1 at 0, 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * share))
