"""The optimiser of a run: groups and rates of a loss, and the two momenta of DOT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from distillation.trainer_case import (
    CLASSES,
    SHAPE,
    Relation,
    assert_same,
    distillation,
    network,
    plan_of,
    student_view,
    trainer,
)
from synthkit.distillation import trainer as trainer_module
from synthkit.distillation.protocols import Plan
from synthkit.distillation.trainer import Trainer
from synthkit.distillation.weighted import weighted_sum
from synthkit.models.view import ModelView

# --- optimiser groups -------------------------------------------------------------------------------------------------


class Grouped(Relation):
    """Half the rate on the student's first layer, none on its own module, the last layer left out."""

    def parameter_groups(self, student: nn.Module) -> list[dict[str, Any]]:
        assert self.aux is not None and isinstance(student, nn.Sequential)
        return [
            {"params": list(student[1].parameters()), "lr_scale": 0.5},
            {"params": list(self.aux.parameters()), "lr_scale": 0.0, "weight_decay": 0.0},
        ]


@pytest.mark.parametrize("vectors", [True, False])
def test_groups_of_a_loss_have_their_own_rates(tmp_path, vectors):
    moved = {}
    plan = plan_of(epochs=None, steps=1, momentum=0.0, schedule="constant", weight_decay=0.0, decay_vectors=vectors)
    for kind in (Relation, Grouped):
        view = student_view()
        loss = kind()
        made = trainer(tmp_path / kind.__name__, distillation(loss, view), view, plan)
        assert loss.aux is not None
        before = {k: v.clone() for k, v in made.parts.state_dict().items()}
        made.fit()
        moved[kind] = {k: v - before[k] for k, v in made.parts.state_dict().items()}
    plain, grouped = moved[Relation], moved[Grouped]
    for name in ("network.1.weight", "network.1.bias"):
        assert bool(plain[name].any())
        torch.testing.assert_close(grouped[name], 0.5 * plain[name], rtol=1e-4, atol=1e-7)
    assert bool(plain["aux.weight"].any()) and not bool(grouped["aux.weight"].any())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "dot"])
def test_parameters_in_no_group_stay_and_the_state_is_stored(tmp_path, monkeypatch, optimizer):
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", 0.0)
    plan = plan_of(optimizer=optimizer, lr=0.01, schedule="constant")

    def make(name: str) -> Trainer:
        view = student_view()
        return trainer(tmp_path / name, distillation(Grouped(), view), view, plan)

    whole = make("whole")
    whole.fit()
    started = network()
    ended, began = whole.network.state_dict(), started.state_dict()
    assert torch.equal(ended["4.weight"], began["4.weight"]) and not torch.equal(ended["1.weight"], began["1.weight"])
    broken = make("parts")
    monkeypatch.setattr(broken, "total", 7)
    broken.fit()
    resumed = make("parts")
    assert resumed.restore() and resumed.step == 6  # the last step of a run is no state
    resumed.fit()
    assert_same(whole.parts, resumed.parts)


def test_a_loss_may_set_rates_at_every_step(tmp_path):
    told: list[tuple[float, float]] = []

    class Still(Relation):
        def on_step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
            told.append((progress, optimizer.param_groups[0]["lr"]))
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    view = student_view()
    before = copy.deepcopy(view.module)
    made = trainer(tmp_path, distillation(Still(), view), view)
    made.fit()
    assert [progress for progress, _ in told] == pytest.approx([step / 12 for step in range(12)])
    assert [rate for _, rate in told] == pytest.approx([made.plan.lr_at(step, 12, 4) for step in range(12)])
    assert_same(before, view.module)


# --- dot --------------------------------------------------------------------------------------------------------------


def dot_plan(**changes) -> Plan:
    return plan_of(**{"optimizer": "dot", "schedule": "constant", "lr": 0.05, "epochs": 1, **changes})


def test_dot_keeps_the_labels_part_apart(tmp_path):
    """Four steps against the two momenta written out."""
    view = student_view()
    start = copy.deepcopy(view.module)
    made = trainer(tmp_path, distillation(weighted_sum("ce+2*kd")(), view, labels="stored"), view, dot_plan())
    made.fit()
    mine = ModelView(start, [0.5], [0.25], input_size=SHAPE, num_classes=CLASSES)
    written = distillation(weighted_sum("ce+2*kd")(), mine, labels="stored")
    parameters = list(start.parameters())
    buffers = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    for step in range(4):
        batch = made.source.batch(step)
        seen = written.look(batch)
        assert seen.student is not None and seen.teacher is not None
        values = written.loss(seen.student, seen.teacher, batch)
        for name, momentum, decay, buffer in (("ce", 0.825, 1e-3, buffers[0]), ("kd", 0.975, 0.0, buffers[1])):
            gradients = torch.autograd.grad(values[name].mean(), parameters, retain_graph=True)
            for p, v, g in zip(parameters, buffer, gradients, strict=True):
                v.mul_(momentum).add_(g + decay * p.detach())
        with torch.no_grad():
            for p, task, rest in zip(parameters, *buffers, strict=True):
                p -= 0.05 * (task + rest)
    assert_same(start, view.module, rtol=1e-4, atol=1e-6)


def test_dot_without_labels_is_sgd(tmp_path):
    found = []
    for optimizer in ("dot", "sgd"):
        view = student_view()
        plan = dot_plan(optimizer=optimizer, nesterov=False)
        trainer(tmp_path / optimizer, distillation(weighted_sum("1*kd")(), view), view, plan).fit()
        found.append(view.module)
    assert_same(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_dot_in_micro_batches(tmp_path):
    found = []
    for parts in (1, 3):
        view = student_view()
        made = distillation(weighted_sum("ce+kd")(), view, labels="stored")
        trainer(tmp_path / str(parts), made, view, dot_plan(), accumulate=parts).fit()
        found.append(view.module)
    assert_same(found[0], found[1], rtol=1e-4, atol=1e-6)
