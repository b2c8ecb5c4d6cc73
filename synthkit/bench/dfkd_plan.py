"""What `synthkit bench dfkd` compares: teacher-student pairs, methods, and schedules that fit a budget."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from synthkit.config.schema import SynthesizeConfig


@dataclass(frozen=True)
class Pair:
    """One teacher and one student."""

    teacher: str
    student: str
    dataset: str
    protocol: str
    """Preset of the students that are trained from a bank (fresh ones, both ends)."""
    budget: float
    """CPU seconds of every run."""
    batchnorm: bool = True
    """Whether the teacher has BatchNorm."""
    checkpoints: int = 6
    """States of every run's student among which the stopping point is chosen."""
    probes: int = 2048
    """Images on which every state is judged without data."""
    fresh: float = 0.0
    """Share of the budget that a fresh student of the first seed's bank gets on top (0: none)."""
    finals: bool = False
    """Whether the methods ranked first run again with the larger budget, where that is asked for."""
    seeds: int = 3
    """Runs of every method."""
    rates: dict[str, Any] = field(default_factory=dict)
    """Fields of the student's optimiser instead of the recipes', whose rates are for students with BatchNorm."""
    ep_steps: int | None = None
    """Student steps per epoch instead of the recipe's, where these would not fit the budget."""


PAIRS = {
    "mnist_bn": Pair("lenet5_bn", "lenet5_half_bn", "mnist", "mnist", 60.0, fresh=0.25, finals=True),
    "mnist": Pair(
        "lenet5",
        "lenet5_half",
        "mnist",
        "mnist",
        20.0,
        batchnorm=False,
        probes=1024,
        rates={"optimizer": "adam", "lr": 2e-3, "weight_decay": 0.0, "student_lr": 0.01},  # DAFL's LeNet-5; adi: SGD
    ),
    "cifar10": Pair("resnet20.yaml", "resnet8", "cifar10", "bank-fast", 300.0, checkpoints=3, probes=512, ep_steps=10),
}

METHODS = (
    "cudfkd", "dafl", "dafl+easy2hard", "zskt", "dfad", "dfq", "dfq+easy2hard", "predfkd", "mbdfkd", "lra", "adadfkd",
    "tadfkd", "dfme", "adi", "cmi", "fastdfkd", "nayer", "spaceshipnet", "zskd", "softtarget",
)  # fmt: skip
RECIPES = {"cudfkd": "mnist/cudfkd-lenet5_bn-budget"}  # the others are called mnist/METHOD-lenet5_bn
ENDS = ("noise", "real", "real_labels")


def scaled(config: SynthesizeConfig, factor: float, images: int) -> SynthesizeConfig:
    """The config with a schedule `factor` times as long, and a curriculum that ends where it would have ended.

    Methods with a memory bank make `factor` times the images as well; `adi`, whose student learns between its rounds,
    has no other schedule than its images.
    """
    method = config.method
    pool = hasattr(method, "synthesis_batch")
    if pool or not hasattr(method, "epochs"):
        batch = method.synthesis_batch if pool else method.batch_size
        images = max(batch, round((config.images or 0) * factor))
    if hasattr(method, "epochs"):
        epochs = max(2, round(method.epochs * factor))
        stretch = method.epochs / epochs
        method = replace(
            method, epochs=epochs, grad_adv=method.grad_adv * stretch, alpha=method.alpha * stretch, checkpoints=0
        )
        if hasattr(method, "snapshots"):
            method = replace(method, snapshots=0)
    return replace(config, method=method, images=images, images_per_shard=max(1, -(-images // 4)))


def smallest(config: SynthesizeConfig) -> float:
    """The smallest factor of `scaled` that still scales."""
    method = config.method
    if hasattr(method, "synthesis_batch"):
        return max(2 / method.epochs, method.synthesis_batch / (config.images or 1))
    if hasattr(method, "epochs"):
        return 2 / method.epochs
    return (method.plain + 2) * method.batch_size / (config.images or 1)
