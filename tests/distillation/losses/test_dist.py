"""DIST: the original's numbers, what it is blind to, and constant columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit.distillation.contract import Batch, Taps
from synthkit.distillation.losses.dist import DIST, dist_loss, dist_parts, pearson
from synthkit.errors import ConfigError

REFERENCE = Path(__file__).parents[2] / "reference"


@pytest.fixture
def case():
    with np.load(REFERENCE / "dist.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def close(found, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=rtol, atol=atol)


@pytest.mark.parametrize("tau", [1, 4])
def test_the_original(case, tau):
    inter, intra = dist_parts(case["s"], case["t"], tau)
    assert inter.shape == (16,) and intra.shape == (10,)
    close(inter.mean(), case[f"out_tau{tau}_inter"])
    close(intra.mean(), case[f"out_tau{tau}_intra"])
    student = case["s"].clone().requires_grad_()
    value = dist_loss(student, case["t"], temperature=tau)
    close(value.detach(), case[f"out_tau{tau}_total"])
    close(torch.autograd.grad(value, student)[0], case[f"out_tau{tau}_grad_s"])


def test_correlation_is_numpys(case):
    found = pearson(case["s"], case["t"], 1)
    close(
        found, [np.corrcoef(a, b)[0, 1] for a, b in zip(case["s"].numpy(), case["t"].numpy(), strict=True)], rtol=1e-7
    )


def test_a_positive_affine_map_of_the_probabilities_costs_nothing(case):
    p = case["t"].softmax(dim=1)
    mapped = 0.3 * p + 0.07  # rows sum to 0.3 + 0.7: probabilities again
    inter, intra = dist_parts(mapped.log(), case["t"], 1.0)
    assert float(inter.max()) < 1e-5 and float(intra.max()) < 1e-5  # the 1e-8 in the divisor is what is left
    other = dist_parts((0.2 - p / 10).log(), case["t"], 1.0)[0]
    assert float(other.min()) > 1.5  # falling where the teacher rises: correlation near -1


def test_constant_rows_and_columns_are_worth_the_square_of_the_temperature(case):
    inter, intra = dist_parts(torch.zeros_like(case["t"]), case["t"], 4.0)
    close(inter, torch.full_like(inter, 16.0))
    close(intra, torch.full_like(intra, 16.0))


def test_gradients(case):
    s, t = case["s"][:6, :5], case["t"][:6, :5]
    assert torch.autograd.gradcheck(lambda x: dist_loss(x, t), s.clone().requires_grad_())


def test_the_class(case):
    assert DIST.requires.relational and DIST.requires.smallest_batch == 64 and DIST.beta == 2.0
    batch = Batch(images=torch.zeros(16, 1, 2, 2))
    found = DIST(DIST.Config(beta=0.5, gamma=3.0))(Taps(logits=case["s"]), Taps(logits=case["t"]), batch)
    assert found["dist_inter"].shape == (16,) and found["dist_intra"].shape == ()
    close(found["dist_inter"].mean(), 0.5 * case["out_tau4_inter"])
    close(found["dist_intra"], 3 * case["out_tau4_intra"])
    with pytest.raises(ConfigError, match="loss.gamma"):
        DIST.Config(gamma=-1.0)
