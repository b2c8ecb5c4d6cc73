"""What a distill run says before it begins, and which losses say that they need company."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from synthkit import tables
from synthkit.config.schema import DistillConfig
from synthkit.distillation.announce import Parts, advice, modules, parts_of
from synthkit.distillation.contract import Loss
from synthkit.distillation.plan import Plan

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


def test_sizes_of_what_a_loss_brings_along():
    plain = Scene("kd")
    assert parts_of(plain.loss, plain.student.module) == Parts()
    scene = Scene("simkd")
    assert isinstance(scene.loss.aux, nn.Module)
    found = parts_of(scene.loss, scene.student.module)
    assert found.trained == sum(p.numel() for p in scene.loss.aux.parameters()) > 0
    whole = scene.loss.deploy(scene.student.module)
    assert whole is not None and found.deployed == sum(p.numel() for p in whole.parameters())


def test_modules_in_words():
    assert modules(Parts(), 10) == ""
    assert modules(Parts(trained=1200), 10) == "; its own modules: 1,200 parameters, dropped after training"
    kept = modules(Parts(kept=2048), 10)
    assert kept == "; its own modules: 0 parameters and 2.0 KiB of buffers, dropped after training"
    deployed = modules(Parts(trained=5, deployed=15), 10)
    assert deployed.endswith("15 parameters in all, the student alone (10) is evaluated beside it")
