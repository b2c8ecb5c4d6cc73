"""Learning rates by hand, presets, and which value wins."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit.config.schema import DistillConfig, TeachConfig
from synthkit.data.policies import POLICIES
from synthkit.distillation.optimizers import make_optimizer
from synthkit.distillation.protocols import PROTOCOLS, Plan, beside_note, distill_plan, protocol_for, teach_plan
from synthkit.distillation.weighted import parse_terms, weighted_sum
from synthkit.errors import ConfigError


def config(**changes) -> DistillConfig:
    return DistillConfig(**{"bank": "b", "student": "resnet8", **changes})


def test_cosine_with_warmup():
    plan = Plan(lr=0.4, epochs=10, warmup=0.1)
    rates = [plan.lr_at(step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.04 * (k + 1) for k in range(10)])
    assert rates[10] == pytest.approx(0.4)
    assert rates[55] == pytest.approx(0.2)
    assert rates[99] == pytest.approx(0.2 * (1 + math.cos(math.pi * 89 / 90)))


def test_cosine_per_epoch_is_that_of_the_source():
    plan = PROTOCOLS["dfkd"].plan
    total = plan.total_steps(7)
    for epoch in (0, 1, 50, 199):
        expected = 0.05 * (1 + math.cos(math.pi * epoch / 200))  # CosineAnnealingLR(T_max=200), stepped per epoch
        assert [plan.lr_at(7 * epoch + k, total, 7) for k in range(7)] == pytest.approx([expected] * 7)


def test_crd_falls_where_the_source_does():
    plan = PROTOCOLS["crd"].plan
    total = plan.total_steps(782)
    by_epoch = [plan.lr_at(782 * e, total, 782) for e in range(240)]
    assert by_epoch[149] == 0.05  # the 150th epoch, counted from 1
    assert by_epoch[150] == pytest.approx(0.005)
    assert by_epoch[180] == pytest.approx(0.0005) and by_epoch[179] == pytest.approx(0.005)
    assert by_epoch[210] == pytest.approx(0.00005) and by_epoch[209] == pytest.approx(0.0005)
    assert (plan.batch_size, plan.momentum, plan.weight_decay, plan.nesterov) == (64, 0.9, 5e-4, False)
    assert plan.augment == "crop_flip"


def test_constant_schedule():
    plan = Plan(lr=0.3, schedule="constant", steps=5)
    assert {plan.lr_at(step, 5, 2) for step in range(5)} == {0.3}


GOLDEN = {
    "sre2l_cos_eta1": {},
    "rded_cos_eta2": {"eta": 2.0},
    "edc_in1k_cos_st2": {"schedule": "linear", "eta": 2.0},  # its cosine is overwritten
    "sre2l_linear": {"schedule": "linear"},
    "edc_small_cos_st2": {"eta": 2.0},
    "edc_small_cos2_st2": {"schedule": "cosine_drop", "eta": 2.0},
    "edc_in1k_cos2_st2": {"schedule": "cosine_drop", "eta": 2.0},
    "idc_multistep": {"schedule": "step", "milestones": (2 / 3, 5 / 6), "gamma": 0.2},  # CIM's too
}


@pytest.mark.parametrize(("name", "changes"), GOLDEN.items())
def test_post_training_schedules_are_those_of_the_sources(name, changes):
    golden = np.load(Path(__file__).parents[1] / "reference" / "posttrain_lr_schedules.npz")
    epochs, wanted = int(golden["epochs"]), golden[name]
    plan = Plan(lr=1.0, epochs=epochs, per_epoch=True, **changes)
    for epoch in range(epochs):
        rates = [plan.lr_at(3 * epoch + k, 3 * epochs, 3) for k in range(3)]
        assert rates == pytest.approx([wanted[epoch]] * 3, rel=1e-9)


def test_cosine_of_eta_two_ends_at_half_the_rate():
    plan = PROTOCOLS["rded"].plan
    total = plan.total_steps(50)
    assert plan.lr_at(total - 1, total, 50) == pytest.approx(0.5e-3, rel=0.01)
    assert PROTOCOLS["sre2l"].plan.lr_at(total - 1, total, 50) < 1e-7


@pytest.mark.parametrize(("total", "warmup"), [(40, 0.3), (200, 0.25), (10, 0.5), (4, 0.1)])
def test_one_cycle_is_torchs(total, warmup):
    plan = Plan(lr=0.4, steps=total, schedule="onecycle", warmup=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.4, total_steps=total, pct_start=warmup, cycle_momentum=False
    )
    for step in range(total):
        assert plan.lr_at(step, total, 7) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        if step < total - 1:
            theirs.step()


def test_vectors_may_be_spared_the_decay():
    spared, usual = PROTOCOLS["sre2l"].plan, PROTOCOLS["crd"].plan
    assert [spared.decay_of(d) for d in (0, 1, 2, 4)] == [0, 0, 0.01, 0.01]
    assert [usual.decay_of(d) for d in (1, 4)] == [5e-4, 5e-4]
    assert "none on vectors" in spared.describe() and "vectors" not in usual.describe()


def test_the_optimiser_spares_vectors():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten())
    groups = make_optimizer(PROTOCOLS["sre2l"].plan, network, torch.device("cpu")).param_groups
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [(0.01, [4]), (0, [1, 1, 1])]
    assert all(g["lr_scale"] == 1 for g in groups)
    (whole,) = make_optimizer(PROTOCOLS["crd"].plan, network, torch.device("cpu")).param_groups
    assert whole["weight_decay"] == 5e-4 and len(whole["params"]) == 4


def test_published_plans():
    """largescale.md 1 and kd.md 1.2, by hand: optimiser, lr, wd, batch, epochs, eta."""
    rows = {
        "imagenet": ("sgd", 0.2, 1e-4, 512, 100, 1),
        "sre2l": ("adamw", 1e-3, 0.01, 1024, 300, 1),
        "dwa": ("adamw", 1e-3, 0.01, 128, 300, 1),
        "rded": ("adamw", 1e-3, 0.01, 100, 300, 2),
        "cvdd": ("adamw", 1e-3, 0.01, 16, 300, 1),
        "gvbsm": ("adamw", 1e-3, 0.01, 1024, 300, 1),
        "edc": ("adamw", 1e-3, 0.01, 100, 300, 2),
        "sre2l-cifar": ("adamw", 1e-3, 0.01, 128, 400, 1),
        "infer-cifar": ("adamw", 1e-3, 0.01, 64, 80, 1),
        "sre2l-tiny": ("sgd", 0.2, 1e-4, 64, 200, 1),
        "fkd": ("sgd", 0.1, 1e-4, 1024, 300, 1),
        "cim": ("adamw", 1e-3, 1e-4, 100, 1000, 1),
    }
    for name, row in rows.items():
        plan = PROTOCOLS[name].plan
        found = (plan.optimizer, plan.lr, plan.weight_decay, plan.batch_size, plan.epochs, plan.eta)
        assert found == row, name
    imagenet = PROTOCOLS["imagenet"].plan
    by_epoch = [imagenet.lr_at(10 * e, 1000, 10) for e in range(100)]
    assert by_epoch[29] == 0.2 and by_epoch[30] == by_epoch[59] == pytest.approx(0.02)
    assert by_epoch[60] == pytest.approx(0.002) and by_epoch[90] == pytest.approx(0.0002)
    assert PROTOCOLS["simkd"].plan == PROTOCOLS["crd"].plan
    tiny = PROTOCOLS["sre2l-tiny"].plan
    assert tiny.lr_at(5 * 10, 2000, 10) == 0.2 and tiny.lr_at(4 * 10, 2000, 10) < 0.2


def test_the_published_losses_can_be_built():
    for name, protocol in PROTOCOLS.items():
        expression = protocol.loss or protocol.beside
        assert not (protocol.loss and protocol.beside), name
        if expression:
            assert weighted_sum(expression)
        if protocol.options:
            (term,) = parse_terms(expression)
            config = getattr(weighted_sum(expression)().config, term.name)
            assert set(protocol.options) <= set(vars(config)), name


def test_what_a_protocol_puts_beside_a_method_is_said():
    assert beside_note("bank-fast", "kd") is None and beside_note("dfkd", "l1") is None
    assert beside_note("crd", "ce+0.9*kd@ramp20") is None
    assert "lacks: its figures are for --loss ce+kd" in (beside_note("crd", "kd") or "")
    said = beside_note("simkd", "ce+dkd@ramp20") or ""
    assert "with kd, which loss ce+dkd@ramp20 lacks" in said and "--loss ce+kd+dkd" in said
    assert beside_note("simkd", "ce+kd+dkd") is None


def test_the_loss_of_a_post_training_protocol_is_said():
    published = {"temperature": 20.0, "t_squared": False}
    assert beside_note("sre2l", "kd", published) is None
    assert "--loss kd --loss.temperature 20.0 --loss.t_squared false" in (beside_note("sre2l", "l1") or "")
    said = beside_note("sre2l", "kd", {"temperature": 4.0, "t_squared": True}) or ""
    assert "temperature and t_squared of this run differs" in said
    assert "t_squared of this run" in (beside_note("sre2l-tiny", "kd", published) or "")
    assert "lacks: its figures are for --loss mse+0.1*ce" in (beside_note("gvbsm", "mse") or "")
    assert beside_note("gvbsm", "mse+0.1*ce") is None


def test_auto_protocol_by_image_shape():
    assert protocol_for("auto", (1, 32, 32)) == "mnist"
    assert protocol_for("auto", (3, 32, 32)) == "bank-fast"
    with pytest.raises(ConfigError, match="did you mean 'crd'"):
        protocol_for("crdd", (3, 32, 32))


def test_flags_win_and_are_named():
    name, plan, changed = distill_plan(config(protocol="crd", lr=0.2, batch_size=32, augment="none"), (3, 32, 32))
    assert name == "crd"
    assert (plan.lr, plan.batch_size, plan.augment, plan.epochs) == (0.2, 32, "none", 240)
    assert changed == ["augment", "batch_size", "lr"]


def test_steps_replace_epochs():
    _, plan, _ = distill_plan(config(steps=7), (1, 32, 32))
    assert plan.epochs is None and plan.total_steps(100) == 7
    with pytest.raises(ConfigError, match="exclude each other"):
        distill_plan(config(steps=7, epochs=1), (1, 32, 32))


def test_light_networks_get_their_own_rate():
    assert distill_plan(config(protocol="crd", student="shufflev1"), (3, 32, 32))[1].lr == 0.01
    assert distill_plan(config(protocol="crd", student="mobilenetv2", lr=0.3), (3, 32, 32))[1].lr == 0.3


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.0},
        {"lr": float("nan")},
        {"epochs": 0},
        {"steps": -1},
        {"batch_size": 1},
        {"momentum": 1.0},
        {"warmup": 1.0},
        {"weight_decay": -1.0},
        {"schedule": "cosin"},
        {"optimizer": "sgdd"},
        {"eta": 0.5},
        {"floor": 1.0},
        {"gamma": 0.0},
        {"milestones": (0.5, 1.5)},
        {"schedule": "onecycle"},
    ],
)
def test_values_out_of_range(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        Plan(**changes)


def test_a_floor_lifts_the_end():
    for schedule in ("cosine", "linear"):
        plan = Plan(lr=0.2, schedule=schedule, epochs=10, floor=0.05)
        rates = [plan.lr_at(step, 1000, 100) for step in range(1001)]
        assert rates[0] == pytest.approx(0.2) and rates[-1] == pytest.approx(0.01)
        plain = replace(plan, floor=0.0)
        assert all(r == pytest.approx(0.01 + 0.95 * plain.lr_at(s, 1000, 100)) for s, r in enumerate(rates))
    assert "cosine to 0.01" in Plan(lr=0.2, epochs=1, floor=0.05).describe()


def test_flags_reach_the_optimiser():
    plan = distill_plan(config(nesterov=True, milestones=(0.5,), gamma=0.3, schedule="step"), (3, 32, 32))[1]
    network = torch.nn.Linear(2, 2)
    assert make_optimizer(plan, network, torch.device("cpu")).param_groups[0]["nesterov"]
    assert [round(plan.lr_at(s, 10, 10) / plan.lr, 6) for s in (4, 5)] == [1.0, 0.3]
    dot = distill_plan(config(optimizer="dot", dot_delta=0.05), (3, 32, 32))[1]
    assert make_optimizer(dot, network, torch.device("cpu")).param_groups[0]["delta"] == 0.05
    with pytest.raises(ConfigError, match="stay below 1"):
        make_optimizer(replace(dot, dot_delta=0.2), network, torch.device("cpu"))


def test_values_that_nobody_reads():
    plan = Plan(optimizer="adamw", schedule="cosine", epochs=1)
    assert plan.idle(["lr", "momentum", "nesterov", "dot_delta", "milestones", "gamma", "floor", "eta"]) == [
        "momentum", "nesterov", "dot_delta", "milestones", "gamma",
    ]  # fmt: skip
    assert replace(plan, optimizer="dot", schedule="step").idle(["momentum", "dot_delta", "gamma", "floor"]) == [
        "floor"
    ]


def test_every_protocol_is_whole():
    for name, protocol in PROTOCOLS.items():
        assert protocol.description and protocol.plan.augment in POLICIES, name
        assert Plan(**protocol.plan.to_dict()) == protocol.plan
        assert str(protocol.plan.batch_size) in protocol.plan.describe()


def test_teach_plan():
    grey, colour = TeachConfig(arch="a", data="d"), TeachConfig(arch="a", data="d", momentum=0.0)
    assert teach_plan(grey, 1).augment == "shift" and teach_plan(colour, 3).augment == "crop_flip"
    assert teach_plan(grey, 1).nesterov and not teach_plan(colour, 3).nesterov  # Nesterov needs momentum
    with pytest.raises(ConfigError, match="use rrc_flip"):
        teach_plan(TeachConfig(arch="a", data="d", augment="rrc_flip_cutmix"), 3)
