"""PKT against the original code's numbers and its identities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit.distillation.contract import Batch, Taps
from synthkit.distillation.losses.pkt import PKT, conditional_similarities, pkt_loss

REFERENCE = Path(__file__).parents[2] / "reference"


@pytest.fixture
def golden():
    with np.load(REFERENCE / "pkt.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_equals_the_original_code(golden):
    student = golden["f_s"].requires_grad_()
    loss = pkt_loss(student, golden["f_t"])
    close(loss.detach(), golden["out_loss"])
    close(torch.autograd.grad(loss, student)[0], golden["out_grad_f_s"])


def test_identities(golden):
    s, t = golden["f_s"], golden["f_t"]
    close(conditional_similarities(s).sum(dim=1), torch.ones(8, dtype=torch.float64))
    assert abs(float(pkt_loss(s, 5 * s))) < 1e-9  # the scale is not seen
    assert float(pkt_loss(s, t)) > 0
    divergence = (conditional_similarities(t) * (conditional_similarities(t) / conditional_similarities(s)).log()).sum()
    assert float(pkt_loss(s, t) * 64) == pytest.approx(float(divergence), rel=1e-5)  # the paper's sum, without eps


def test_gradients_also_of_a_row_of_zeros(golden):
    s, t = golden["f_s"][:4].clone(), golden["f_t"][:4]
    assert torch.autograd.gradcheck(lambda x: pkt_loss(x, t), s.requires_grad_())
    dead = s.detach().clone()
    dead[1] = 0
    (gradient,) = torch.autograd.grad(pkt_loss(dead.requires_grad_(), t), dead)
    assert bool(torch.isfinite(gradient).all())
    source = dead / (dead.square().sum(dim=1, keepdim=True).sqrt() + 1e-7)  # the released form
    assert bool(torch.autograd.grad(source.sum(), dead)[0].isnan().any())


def test_loss_of_the_table(golden):
    student = Taps(logits=torch.zeros(8, 2), pooled=golden["f_s"].float().requires_grad_())
    teacher = Taps(logits=torch.zeros(8, 2), pooled=golden["f_t"].float())
    with torch.autocast("cpu", torch.bfloat16):
        found = PKT()(student, teacher, Batch(images=torch.zeros(8, 1, 2, 2)))
    assert float(found["pkt"]) == pytest.approx(float(golden["out_loss"]), rel=1e-4)
    assert PKT.requires.relational and PKT.beta == 30000
