"""KD, standardised logits, JS (SSLD), cross-entropy and MSE: original numbers and identities."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synthkit.distillation.contract import Batch, Taps
from synthkit.distillation.losses.ce import CE, ce_loss
from synthkit.distillation.losses.js import js_loss
from synthkit.distillation.losses.kd import kd_loss
from synthkit.distillation.losses.logit_std import LogitStd, logit_std_loss, standardise
from synthkit.distillation.losses.mse import MSE, mse_loss
from synthkit.distillation.losses.soft_ce import soft_ce_loss
from synthkit.errors import ConfigError
from synthkit.logits import entropy_per_sample

REFERENCE = Path(__file__).parents[2] / "reference"
T, ALPHA, ALPHA2, BETA2 = 4.0, 0.1, 0.7, 1.3  # parameters of the torchdistill cases


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def close(found, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=rtol, atol=atol)


def value_and_gradient(loss, student):
    student = student.clone().requires_grad_()
    value = loss(student)
    return value.detach(), torch.autograd.grad(value, student)[0]


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(4)
    return [3 * torch.randn(6, 8, dtype=torch.float64, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("temperature", [1, 4])
def test_kd_is_repdistillers_and_mdistillers(temperature):
    case = golden("kd")
    value, gradient = value_and_gradient(lambda s: kd_loss(s, case["t"], temperature=temperature), case["s"])
    close(value, case[f"out_T{temperature}_rep"])
    close(value, case[f"out_T{temperature}_md"])
    close(gradient, case[f"out_T{temperature}_grad_s"])


@pytest.mark.parametrize("name, loss", [("kd_torchdistill", kd_loss), ("kd_logitstd", logit_std_loss)])
def test_torchdistill_with_and_without_the_factor(name, loss):
    """Its sums are ours; with alpha 0 it drops T^2, which we never do: both values are here."""
    case = golden(name)

    def mixed(s, a, b):
        return a * ce_loss(s, case["y"]) + b * loss(s, case["t"], temperature=T)

    value, gradient = value_and_gradient(lambda s: mixed(s, ALPHA, 1 - ALPHA), case["s"])
    close(value, case["out_a"])
    close(gradient, case["out_grad_s"])
    close(mixed(case["s"], ALPHA2, BETA2), case["out_ab"])
    ours, ours_gradient = value_and_gradient(lambda s: loss(s, case["t"], temperature=T), case["s"])
    close(ours, T**2 * case["out_a0"])
    close(ours_gradient, T**2 * case["out_grad_s_a0"])
    assert float(ours) > 10 * float(case["out_a0"])


def test_standardised_rows(pair):
    z = standardise(pair[0])
    close(z.mean(dim=1), torch.zeros(6, dtype=torch.float64))
    close(z.std(dim=1), torch.ones(6, dtype=torch.float64), rtol=1e-6)
    s, t = pair
    moved = torch.linspace(0.2, 5, 6, dtype=torch.float64)[:, None] * s + torch.arange(6.0)[:, None]
    close(logit_std_loss(moved, t), logit_std_loss(s, t), rtol=1e-6)
    x = t[2].tolist()  # one sample, the unbiased standard deviation written out
    mean = sum(x) / 8
    std = math.sqrt(sum((v - mean) ** 2 for v in x) / 7)
    close(standardise(t)[2], torch.tensor([(v - mean) / (1e-7 + std) for v in x], dtype=torch.float64), rtol=1e-12)
    constant = torch.zeros(2, 5, requires_grad=True)
    logit_std_loss(constant, torch.eye(5)[:2]).backward()
    assert constant.grad is not None and bool(torch.isfinite(constant.grad).all())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_cross_entropy_minus_entropy(pair, temperature):
    s, t = pair
    entropy = temperature**2 * entropy_per_sample(t, temperature)
    soft = soft_ce_loss(s, t, temperature=temperature, reduction="none")
    close(kd_loss(s, t, temperature=temperature, reduction="none"), soft - entropy)


def test_at_a_high_temperature_kd_is_half_the_mse_of_centred_logits(pair):
    s, t = (x - x.mean(dim=1, keepdim=True) for x in pair)
    value, gradient = value_and_gradient(lambda x: kd_loss(x, t, temperature=1e4, reduction="none").sum(), s)
    close(gradient, (s - t) / 8, rtol=1e-2, atol=1e-4)
    close(value, 0.5 * mse_loss(s, t, reduction="none").sum(), rtol=1e-3)


def test_js_is_the_loss_of_ssld(pair):
    """SSLD's card: half the KL of each network to their mean, at T = 1, mean over the batch."""
    s, t = pair
    expected = 0.0
    for q, p in zip(s.softmax(dim=1).tolist(), t.softmax(dim=1).tolist(), strict=True):
        for a, b in zip(q, p, strict=True):
            m = (a + b) / 2
            expected += 0.5 * (a * math.log(a / m) + b * math.log(b / m)) / 6
    assert float(js_loss(s, t)) == pytest.approx(expected, rel=1e-12)


def test_cross_entropy(pair):
    s, labels = pair[0], torch.tensor([0, 7, 3, 3, 1, 2])
    log_q = s.log_softmax(dim=1)
    naive = torch.stack([-log_q[i, k] for i, k in enumerate(labels.tolist())])
    close(ce_loss(s, labels, reduction="none"), naive)
    smoothed = 0.9 * naive - 0.1 * log_q.mean(dim=1)
    close(ce_loss(s, labels, label_smoothing=0.1), smoothed.mean())
    batch = Batch(images=torch.zeros(6, 1, 2, 2), labels=labels)
    found = CE(CE.Config(label_smoothing=0.1))(Taps(logits=s), Taps(logits=torch.full_like(s, torch.nan)), batch)
    close(found["ce"], smoothed)  # the teacher is not read
    assert CE.requires.labels
    with pytest.raises(ConfigError, match="label_smoothing"):
        CE.Config(label_smoothing=1.0)


def test_mse_is_the_original(pair):
    case = golden("kd_losses")
    close(mse_loss(case["s"], case["t"]), case["mse"])
    s, t = pair
    close(mse_loss(s, t), F.mse_loss(s, t))
    found = MSE()(Taps(logits=s), Taps(logits=t), Batch(images=torch.zeros(6, 1, 2, 2)))
    close(found["mse"], (s - t).square().mean(dim=1))


def test_the_classes_pass_their_options(pair):
    s, t = pair
    batch = Batch(images=torch.zeros(6, 1, 2, 2))
    found = LogitStd(LogitStd.Config(temperature=3.0))(Taps(logits=s), Taps(logits=t), batch)
    close(found["logit_std"], logit_std_loss(s, t, temperature=3.0, reduction="none"))
    with pytest.raises(ConfigError, match="temperature"):
        LogitStd.Config(temperature=0.0)


@pytest.mark.parametrize("loss", [logit_std_loss, mse_loss])
def test_gradients(pair, loss):
    s, t = pair
    assert torch.autograd.gradcheck(lambda x: loss(x, t, reduction="none"), s.clone().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x: ce_loss(x, torch.arange(6), label_smoothing=0.2, reduction="none"), s.clone().requires_grad_()
    )
