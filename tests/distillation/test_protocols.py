"""Learning rates by hand, presets, and which value wins."""

from __future__ import annotations

import math

import pytest

from synthkit.config.schema import DistillConfig, TeachConfig
from synthkit.data.policies import POLICIES
from synthkit.distillation.protocols import PROTOCOLS, Plan, distill_plan, protocol_for, teach_plan
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


def test_cifar_kd_falls_where_the_source_does():
    plan = PROTOCOLS["cifar-kd"].plan
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


def test_auto_protocol_by_image_shape():
    assert protocol_for("auto", (1, 32, 32)) == "mnist"
    assert protocol_for("auto", (3, 32, 32)) == "bank-fast"
    with pytest.raises(ConfigError, match="did you mean 'cifar-kd'"):
        protocol_for("cifar_kd", (3, 32, 32))


def test_flags_win_and_are_named():
    name, plan, changed = distill_plan(config(protocol="cifar-kd", lr=0.2, batch_size=32, augment="none"), (3, 32, 32))
    assert name == "cifar-kd"
    assert (plan.lr, plan.batch_size, plan.augment, plan.epochs) == (0.2, 32, "none", 240)
    assert changed == ["augment", "batch_size", "lr"]


def test_steps_replace_epochs():
    _, plan, _ = distill_plan(config(steps=7), (1, 32, 32))
    assert plan.epochs is None and plan.total_steps(100) == 7
    with pytest.raises(ConfigError, match="exclude each other"):
        distill_plan(config(steps=7, epochs=1), (1, 32, 32))


def test_light_networks_get_their_own_rate():
    assert distill_plan(config(protocol="cifar-kd", student="shufflev1"), (3, 32, 32))[1].lr == 0.01
    assert distill_plan(config(protocol="cifar-kd", student="mobilenetv2", lr=0.3), (3, 32, 32))[1].lr == 0.3


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
    ],
)
def test_values_out_of_range(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        Plan(**changes)


def test_every_protocol_is_whole():
    for name, protocol in PROTOCOLS.items():
        assert protocol.description and protocol.plan.augment in POLICIES, name
        assert Plan(**protocol.plan.to_dict()) == protocol.plan
        assert str(protocol.plan.batch_size) in protocol.plan.describe()


def test_teach_plan():
    grey, colour = TeachConfig(arch="a", data="d"), TeachConfig(arch="a", data="d", momentum=0.0)
    assert teach_plan(grey, 1).augment == "shift" and teach_plan(colour, 3).augment == "crop_flip"
    assert teach_plan(grey, 1).nesterov and not teach_plan(colour, 3).nesterov  # Nesterov needs momentum
