"""CuDFKD under the contract of all synthesis methods, and what its curriculum variants change."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from contract import SynthesizerContract

from synthesis.tiny import task
from synthkit import tables
from synthkit.errors import ConfigError
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.cudfkd import CuDFKD, CuDFKDConfig

SMALL = {"epochs": 4, "ep_steps": 4, "kd_steps": 2, "batch_size": 16, "nz": 8, "width": 4, "depth": 1, "lr_g": 0.02}


def test_every_method_has_its_contract():
    here = Path(__file__).parent
    missing = [name for name in tables.METHODS if not (here / f"test_contract_{name}.py").exists()]
    assert not missing, f"derive a test class from contract.SynthesizerContract for {missing}"


class TestCuDFKD(SynthesizerContract):
    name = "cudfkd"
    options = {**SMALL, "student": "convnet_d1_w8_bn", "grad_adv": 2.0}
    engine_options = {**SMALL, "student": "lenet5_half", "grad_adv": 2.0, "snapshots": 2}
    inner = {"student_step": (7, 5, 2), "generator_step": (2, 4, 2)}
    falling = ("g_loss", "kd")
    longer = {"epochs": 6, "ep_steps": 20, "batch_size": 32, "lr": 0.05}


# ---- curriculum ----------------------------------------------------------------------------------------------


def method(curriculum: str, **settings) -> CuDFKD:
    config = CuDFKDConfig(**{**SMALL, "epochs": 8, "student": "convnet_d1_w8_bn", **settings})
    return CuDFKD(config, task(curriculum=Curriculum.named(curriculum)))


def ramp(found: CuDFKD) -> list[float]:
    """a(e) of every epoch."""
    weights = []
    for epoch in range(found.config.epochs):
        found.step = epoch * found.config.ep_steps
        weights.append(found.adversarial_weight(found.epoch))
    return weights


# With 8 epochs, begin 0.25 and end 0.75: e_b = 2, e_e = 6, so a(e) = a_0 + g max(0, min(e - 1, 5) - 2).
RAMP = [0, 0, 0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("curriculum", ["easy2hard", "easy2hard-hard", "easy2hard-soft", "ramp-only"])
def test_ramp_is_on(curriculum):
    assert ramp(method(curriculum, adv=0.25, grad_adv=0.5)) == [0.25 + 0.5 * r for r in RAMP]


@pytest.mark.parametrize("curriculum", ["none", "weights-only"])
def test_ramp_is_off(curriculum):
    assert ramp(method(curriculum, adv=0.25, grad_adv=0.5)) == [0.25] * 8


LOSSES = torch.tensor([0.0, 0.5, 1.5, 2.0, 4.0])
AGE = 2.0
WEIGHTS = {
    "easy2hard": [(1 + math.exp(-AGE)) / (1 + math.exp(x - AGE)) for x in LOSSES.tolist()],
    "weights-only": [(1 + math.exp(-AGE)) / (1 + math.exp(x - AGE)) for x in LOSSES.tolist()],
    "easy2hard-hard": [1, 1, 1, 0, 0],
    "easy2hard-soft": [1, 0.75, 0.25, 0, 0],
    "ramp-only": [1, 1, 1, 1, 1],
    "none": [1, 1, 1, 1, 1],
}


def test_the_hand_made_weights_cover_every_variant():
    assert sorted(WEIGHTS) == sorted(tables.CURRICULA)


@pytest.mark.parametrize("curriculum", sorted(WEIGHTS))
def test_student_loss_of_every_variant(curriculum):
    """mean_i v(l_i) l_i at lambda_0 = 2, and the gradient is v / B: the weight itself carries none."""
    losses = LOSSES.clone().requires_grad_(True)
    loss = method(curriculum, lambda_0=AGE).student_loss(losses)
    weights = torch.tensor(WEIGHTS[curriculum])
    torch.testing.assert_close(loss.detach(), (weights * LOSSES).mean())
    (gradient,) = torch.autograd.grad(loss, losses)
    torch.testing.assert_close(gradient, weights / len(LOSSES))


def test_granularity_batch_weighs_the_mean():
    found = method("easy2hard", lambda_0=AGE, granularity="batch")
    mean = float(LOSSES.mean())
    weight = (1 + math.exp(-AGE)) / (1 + math.exp(mean - AGE))
    torch.testing.assert_close(found.student_loss(LOSSES), torch.tensor(weight * mean))


def test_age_grows_with_the_student_steps():
    found = method("easy2hard", lambda_0=1.5, alpha=0.01)
    found.step = 7
    assert found.age == pytest.approx(1.57)


def test_curriculum_changes_the_images():
    images = {}
    for name in ("easy2hard", "none"):
        found = method(name, grad_adv=5.0, lambda_0=0.05)
        images[name] = torch.cat([batch.images for batch in found.generate()])
    assert not torch.equal(images["easy2hard"], images["none"])


def test_unknown_curriculum_offers_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'easy2hard'"):
        Curriculum.named("easy2hart")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"begin": 0.8, "end": 0.2}, "begin <= end"),
        ({"lambda_0": 0.0}, "lambda_0 must be positive"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lr_g": -1.0}, "lr_g must be positive"),
        ({"store_from": 1.0}, "store_from"),
    ],
)
def test_settings_out_of_range(settings, what):
    with pytest.raises(ConfigError, match=what):
        CuDFKDConfig(**settings)
