"""What a distill run says before it begins, and which losses say that they need company."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from synthkit import tables
from synthkit.config.schema import DistillConfig, RuntimeConfig
from synthkit.distillation.announce import Parts, advice, modules, parts_of
from synthkit.distillation.contract import Loss
from synthkit.distillation.distill import distill
from synthkit.distillation.plan import Plan
from synthkit.models.card import ModelCard

from .test_loss_contract import NAMES, Scene


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_stands_alone_where_it_teaches_the_classifier(name):
    scene = Scene(name)
    scene.loss.prepare(scene.looks)
    torch.stack([v.mean() for v in scene.values().values()]).sum().backward()
    gradient = scene.student.classifier.weight.grad
    taught = gradient is not None and bool(gradient.any())
    assert scene.loss.stands_alone == (taught or scene.loss.requires.deploys)


def told(expression: str, optimizer: str = "sgd", **changes) -> list[str]:
    loss: Loss = tables.lookup("loss", expression)()
    cfg = DistillConfig(bank="b", student="s", loss_name=expression, **changes)
    return advice(loss, cfg, Plan(optimizer=optimizer, steps=1))


def test_features_alone_are_noted_with_the_published_weight():
    (note,) = told("at")
    assert "classifier stays as it began" in note and '--loss "kd+1000*at"' in note
    assert told("at+rkd")[0].endswith('--loss "kd+at+rkd"')
    for expression in ("kd", "kd+1000*at", "ofa", "simkd", "ce"):
        assert told(expression) == []
    assert told("at", labels="argmax", label_weight=0.1) == []


def test_dot_without_labels_is_noted():
    (note,) = told("kd", optimizer="dot")
    assert '--loss "ce+kd" --labels argmax' in note
    assert told("ce+kd", optimizer="dot") == told("kd", optimizer="dot", label_weight=0.1) == []


def brought(scene: Scene) -> Parts:
    objective: Any = SimpleNamespace(loss=scene.loss, student=scene.taps, teacher=scene.teacher_taps)
    return parts_of(objective)


def test_what_a_loss_brings_along():
    assert brought(Scene("kd")) == Parts()
    scene = Scene("simkd")
    assert isinstance(scene.loss.aux, nn.Module)
    found = brought(scene)
    assert found.trained == sum(p.numel() for p in scene.loss.aux.parameters()) > 0
    whole = scene.loss.deploy(scene.student.module)
    assert whole is not None and found.deployed == sum(p.numel() for p in whole.parameters())
    student, teacher = found.taps.split("; ")
    assert student.startswith("student ") and student.endswith("(64x4x4)") and student.count("x") == 6
    assert teacher.startswith("teacher ") and teacher.endswith("(128x4x4)")


def test_a_run_says_what_it_will_do(workshop, tmp_path, capsys):
    cfg = DistillConfig(
        bank=str(workshop.bank), student="lenet5_half", teacher=str(workshop.teacher), loss_name="lelp",
        loss={"directions": 1}, labels="argmax", steps=2, batch_size=32, accumulate=2, eval_data=workshop.data,
        out=str(tmp_path / "run"), runtime=RuntimeConfig(device="cpu"),
    )  # fmt: skip
    result = distill(cfg)
    said = capsys.readouterr().err
    assert "loss lelp, labels argmax; its own modules: " in said and "is evaluated beside it" in said
    assert "augment affine, in 2 micro-batches" in said and said.count("2/2 (100 %)") == 1 and "loss=" in said
    metrics = result.metrics
    for folder, key in (("run", "top1"), ("run/plain", "plain_top1")):
        claims = ModelCard.load(tmp_path / folder / "card.yaml").accuracy
        assert isinstance(claims, dict)
        assert list(claims.values())[0] == pytest.approx(metrics[key], abs=1e-6)
    distill(replace(cfg, resume=True))
    assert "is finished already: nothing is trained" in capsys.readouterr().err


def test_modules_in_words():
    assert modules(Parts(), 10) == ""
    assert modules(Parts(trained=1200), 10) == "; its own modules: 1,200 parameters, dropped after training"
    kept = modules(Parts(kept=2048), 10)
    assert kept == "; its own modules: 0 parameters and 2.0 KiB of buffers, dropped after training"
    deployed = modules(Parts(trained=5, deployed=15), 10)
    assert deployed.endswith("15 parameters in all, the student alone (10) is evaluated beside it")
