"""What the tests of the trainer share: a small network, a teacher, losses and a run of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from synthkit.config.schema import RuntimeConfig
from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.pkt import pkt_loss
from synthkit.distillation.objective import Distillation
from synthkit.distillation.protocols import Plan
from synthkit.distillation.sources import RandomOrder, ResidentStore, StoreSource
from synthkit.distillation.trainer import Trainer
from synthkit.distillation.weighted import weighted_sum
from synthkit.models.taps import TapSet
from synthkit.models.view import ModelView, TeacherView
from synthkit.runtime import RunDir, Runtime

CPU = torch.device("cpu")
CLASSES, COUNT, SHAPE = 3, 48, (1, 6, 6)


def network(*, norm: bool = False, dropout: float = 0.0, width: int = 8) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(7 + width)
        middle = [nn.BatchNorm1d(width)] if norm else []
        return nn.Sequential(
            nn.Flatten(), nn.Linear(36, width), *middle, nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, CLASSES)
        )


def student_view(**options) -> ModelView:
    return ModelView(network(**options), [0.5], [0.25], input_size=SHAPE, num_classes=CLASSES)


def layers(view: ModelView) -> nn.Sequential:
    assert isinstance(view.module, nn.Sequential)
    return view.module


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (COUNT, *SHAPE), generator=generator, dtype=torch.uint8)
    return images, (images.float().mean((1, 2, 3)).argsort().argsort() // (COUNT // CLASSES)).long()


def plan_of(**changes) -> Plan:
    return Plan(**{"lr": 0.05, "epochs": 3, "batch_size": 12, "weight_decay": 1e-3, **changes})


def trainer(path, objective: Any, view: ModelView, plan: Plan | None = None, *, tracker: str | None = None, **options):
    plan = plan or plan_of()
    store = ResidentStore(*data(), None, CPU)
    source = StoreSource(store, RandomOrder(np.arange(COUNT), 3), plan.batch_size, policy=plan.augment, device=CPU)
    return Trainer(
        runtime=Runtime.create(RuntimeConfig(device="cpu", tracker=tracker)), view=view, objective=objective,
        source=source, plan=plan, run_dir=RunDir(path).create(), **options,
    )  # fmt: skip


def distillation(loss: Loss, view: ModelView, **options) -> Distillation:
    """A loss set up on the student and a wider teacher."""
    teacher = TeacherView(network(width=16), [0.5], [0.25], input_size=SHAPE, num_classes=CLASSES)
    taps, taught = TapSet(view, loss.requires.student), TapSet(teacher, loss.requires.teacher)
    loss.setup(
        Setup(
            student=taps.shapes, teacher=taught.shapes, num_classes=CLASSES, batch_size=12, epochs=3, images=COUNT,
            seed=4,
        )
    )  # fmt: skip
    return Distillation(loss, taps, taught, **options)


def records(path) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in RunDir(path).metrics()]


def assert_same(a: nn.Module, b: nn.Module, *, rtol: float = 0, atol: float = 0) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


class Relation(Loss):
    """Similarities of a batch, of the student's pooled features behind a trained layer: a batch in parts is another
    loss."""

    requires = LossNeeds(student=("pooled",), teacher=("pooled",), relational=True)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Nothing."""

    def setup(self, setup: Setup) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(setup.seed)
            self.aux = nn.Linear(setup.student.pooled, setup.teacher.pooled)

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, torch.Tensor]:
        assert self.aux is not None and student.pooled is not None and teacher.pooled is not None
        return {"relation": 50 * pkt_loss(self.aux(student.pooled), teacher.pooled)}


LOSSES: dict[str, Callable[[], Loss]] = {
    "per sample": lambda: weighted_sum("ce+0.5*kd")(),
    "relational": lambda: weighted_sum("ce+dist")(),
    "relational with modules": Relation,
}


class Stopped(Exception):
    """A run that dies."""
