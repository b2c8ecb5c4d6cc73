"""DKD: the original's numbers, its identity with KL, and hard cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit.distillation.contract import Batch, Taps
from synthkit.distillation.losses.dkd import DKD, dkd_loss, dkd_parts, others
from synthkit.distillation.losses.kd import kd_loss
from synthkit.errors import ConfigError

REFERENCE = Path(__file__).parents[2] / "reference"


@pytest.fixture
def case():
    with np.load(REFERENCE / "dkd.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def close(found, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("temperature", [4, 1])
def test_the_original(case, temperature):
    tckd, nckd = dkd_parts(case["s"], case["t"], case["y"], temperature)
    close(tckd.mean(), case[f"out_T{temperature}_tckd"])
    close(nckd.mean(), case[f"out_T{temperature}_nckd"])
    for alpha, beta in ((1, 8), (1, 2), (0.5, 6.0)):
        student = case["s"].clone().requires_grad_()
        value = dkd_loss(student, case["t"], case["y"], alpha=alpha, beta=beta, temperature=temperature)
        close(value.detach(), case[f"out_T{temperature}_a{alpha}_b{beta:g}"])
    close(torch.autograd.grad(value, student)[0], case[f"out_T{temperature}_grad_s"])


def test_kl_is_the_sum_with_the_teachers_doubt(case):
    s, t, y = case["s"], case["t"], case["y"]
    tckd, nckd = dkd_parts(s, t, y, 1.0)
    doubt = 1 - t.softmax(dim=1).gather(1, y[:, None]).squeeze(1)
    close(kd_loss(s, t, temperature=1.0, reduction="none"), tckd + doubt * nckd)


def test_the_other_classes():
    logits = torch.arange(12.0).reshape(3, 4)
    found = others(logits, torch.tensor([0, 2, 3]))
    assert found.tolist() == [[1, 2, 3], [4, 5, 7], [8, 9, 10]]


def test_gradients(case):
    s, t, y = case["s"], case["t"], case["y"]
    assert torch.autograd.gradcheck(lambda x: dkd_loss(x, t, y, reduction="none"), s.clone().requires_grad_())


def test_certain_networks_stay_finite():
    """The log of the others' summed probabilities is -inf where the label has all of it; a logsumexp is not."""
    student = torch.tensor([[1000.0, 0.0, 1.0]], requires_grad=True)
    released = torch.log(1 - student.detach().softmax(dim=1)[:, 0])
    assert bool(torch.isinf(released).all())
    loss = dkd_loss(student, torch.tensor([[-300.0, 200.0, 1.0]]), torch.tensor([0]))
    loss.backward()
    assert bool(torch.isfinite(loss)) and student.grad is not None and bool(torch.isfinite(student.grad).all())


def test_two_classes_have_no_dark_knowledge():
    tckd, nckd = dkd_parts(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([1]))
    assert float(nckd) == 0 and float(tckd) > 0


def test_the_class(case):
    batch = Batch(images=torch.zeros(8, 1, 2, 2), labels=case["y"])
    config = DKD.Config(alpha=0.5, beta=6.0, temperature=4.0)
    found = DKD(config)(Taps(logits=case["s"]), Taps(logits=case["t"]), batch)
    assert DKD.requires.labels and all(value.shape == (8,) for value in found.values())
    close(found["dkd_tckd"].mean() + found["dkd_nckd"].mean(), case["out_T4_a0.5_b6"])
    with pytest.raises(ConfigError, match="loss.beta"):
        DKD.Config(beta=-1.0)
