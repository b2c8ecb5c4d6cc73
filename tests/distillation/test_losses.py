"""The distillation losses against the original code's numbers, hand calculation and their identities."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit import tables
from synthkit.distillation.contract import Batch, Taps
from synthkit.distillation.losses.js import js_loss
from synthkit.distillation.losses.kd import KD, kd_loss
from synthkit.distillation.losses.l1 import l1_loss
from synthkit.distillation.losses.soft_ce import soft_ce_loss
from synthkit.errors import ConfigError
from synthkit.logits import entropy_per_sample, js_per_sample, kl_per_sample, l2_per_sample

GOLDEN = Path(__file__).parents[1] / "reference" / "kd_losses.npz"
FUNCTIONS = {"kd": kd_loss, "l1": l1_loss, "soft_ce": soft_ce_loss, "js": js_loss}


@pytest.fixture
def golden():
    with np.load(GOLDEN) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(3)
    return [3 * torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(2)]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("temperature", [1, 2, 5, 20])
def test_kd_equals_the_original_code(golden, temperature):
    student = golden["s"].clone().requires_grad_()
    loss = kd_loss(student, golden["t"], temperature=temperature)
    close(loss.detach(), golden[f"kl_T{temperature}"])
    close(torch.autograd.grad(loss, student)[0], golden[f"grad_kl_T{temperature}"])
    per_sample = kd_loss(golden["s"], golden["t"], temperature=temperature, reduction="none")
    close(per_sample, golden[f"kl_sample_T{temperature}"])


def test_l1_and_l2_equal_the_original_code(golden):
    student = golden["s"].clone().requires_grad_()
    loss = l1_loss(student, golden["t"])
    close(loss.detach(), golden["l1"])
    close(torch.autograd.grad(loss, student)[0], golden["grad_l1"])
    close(l1_loss(golden["s"], golden["t"], reduction="none"), golden["l1_sample"])
    close(l2_per_sample(golden["s"], golden["t"]).mean(), golden["mse"])


def test_values_by_hand():
    teacher = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)  # p = (1/4, 3/4)
    student = torch.zeros(1, 2, dtype=torch.float64)  # q = (1/2, 1/2)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(kd_loss(student, teacher, temperature=1.0)) == pytest.approx(kl, rel=1e-12)
    assert float(soft_ce_loss(student, teacher)) == pytest.approx(math.log(2), rel=1e-12)
    middle = (0.375, 0.625)
    js = 0.5 * (0.25 * math.log(0.25 / middle[0]) + 0.75 * math.log(0.75 / middle[1]))
    js += 0.5 * (0.5 * math.log(0.5 / middle[0]) + 0.5 * math.log(0.5 / middle[1]))
    assert float(js_loss(student, teacher)) == pytest.approx(js, rel=1e-12)
    assert float(l1_loss(student, teacher)) == pytest.approx(math.log(3) / 2, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_identities(pair, temperature):
    s, t = pair
    square = temperature**2
    close(
        soft_ce_loss(s, t, temperature=temperature, reduction="none"),
        kl_per_sample(s, t, temperature) + square * entropy_per_sample(t, temperature),
    )
    close(js_per_sample(s, t, temperature), js_per_sample(t, s, temperature))
    assert bool((js_per_sample(100 * s, -100 * s, temperature) <= square * math.log(2) + 1e-9).all())
    for name in ("kd", "js"):  # softmax losses do not see a shift of the logits, and vanish on equal ones
        loss = FUNCTIONS[name]
        close(loss(s + 5, t - 2, temperature=temperature), loss(s, t, temperature=temperature))
        assert abs(float(loss(s, s + 1, temperature=temperature))) < 1e-12


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_gradients(pair, name):
    s, t = pair
    assert torch.autograd.gradcheck(lambda x: FUNCTIONS[name](x, t), s.clone().requires_grad_())


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_extreme_logits_stay_finite(name):
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = FUNCTIONS[name](student, torch.tensor([[-1e4, 1e4, 0.0]]))
    loss.backward()
    assert bool(torch.isfinite(loss)) and student.grad is not None and bool(torch.isfinite(student.grad).all())


def test_bad_arguments_are_refused(pair):
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        kd_loss(*pair, reduction="meen")  # type: ignore[arg-type]
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="loss.temperature"):
            KD.Config(temperature=value)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_the_class_is_the_function(name, pair):
    kind = tables.lookup("loss", name)
    found = kind()(Taps(logits=pair[0]), Taps(logits=pair[1]), Batch(images=torch.zeros(5, 1, 2, 2)))
    options = {k: v for k, v in dataclasses.asdict(kind.Config()).items()}
    close(found[name], FUNCTIONS[name](*pair, reduction="none", **options))


def test_unknown_loss_offers_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'soft_ce'"):
        tables.lookup("loss", "soft-ce")
