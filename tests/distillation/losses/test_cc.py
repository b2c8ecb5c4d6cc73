"""CC against the original code's numbers and a loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit.distillation.contract import Batch, Setup, Shapes, Taps
from synthkit.distillation.losses.cc import CC, cc_loss
from synthkit.errors import ConfigError

REFERENCE = Path(__file__).parents[2] / "reference"


@pytest.fixture
def golden():
    with np.load(REFERENCE / "cc.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def built(width=5, seed=0):
    loss = CC(CC.Config(width=width))
    shapes = Shapes(pooled=6), Shapes(pooled=10)
    loss.setup(Setup(student=shapes[0], teacher=shapes[1], num_classes=2, batch_size=8, epochs=1, images=40, seed=seed))
    return loss


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_equals_the_original_code(golden):
    loss = built()
    assert loss.aux is not None
    loss.aux.double().load_state_dict(
        {
            f"{side}.{p}": golden[f"embed_{side[0]}.linear.{p}"]
            for side in ("student", "teacher")
            for p in ("weight", "bias")
        }
    )
    student = golden["f_s"].requires_grad_()
    taps = Taps(logits=torch.zeros(8, 2), pooled=student), Taps(logits=torch.zeros(8, 2), pooled=golden["f_t"])
    value = loss(*taps, Batch(images=torch.zeros(8, 1, 2, 2)))["cc"]
    close(value.detach(), golden["out_loss"])
    weights = [p for name, p in loss.aux.named_parameters() if name.endswith("weight")]
    gradients = torch.autograd.grad(value, [student, *weights])
    for found, name in zip(gradients, ("f_s", "embed_s_weight", "embed_t_weight"), strict=True):
        close(found, golden[f"out_grad_{name}"])


def test_loop_and_order():
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    total = sum(
        abs(float(s[b, d] - t[b, d])) * abs(float(s[b + 1, d] - t[b + 1, d])) for b in range(4) for d in range(3)
    )
    assert float(cc_loss(s, t)) == pytest.approx(total / 4, rel=1e-12)
    order = [0, 2, 1, 4, 3]
    assert float(cc_loss(s[order], t[order])) != pytest.approx(total / 4, rel=1e-3)  # hence relational
    assert float(cc_loss(s, s)) == 0
    assert torch.autograd.gradcheck(lambda x: cc_loss(x, t), s.requires_grad_())


def test_both_embeddings_are_trained_and_seeded():
    loss, again, other = built(128), built(128), built(128, seed=1)
    assert loss.aux is not None and again.aux is not None and other.aux is not None
    assert sum(p.numel() for p in loss.aux.parameters()) == 128 * (6 + 10 + 2)
    assert all(torch.equal(a, b) for a, b in zip(loss.aux.parameters(), again.aux.parameters(), strict=True))
    assert not torch.equal(next(loss.aux.parameters()), next(other.aux.parameters()))
    student = Taps(logits=torch.zeros(8, 2), pooled=torch.randn(8, 6))
    found = loss(
        student, Taps(logits=torch.zeros(8, 2), pooled=torch.randn(8, 10)), Batch(images=torch.zeros(8, 1, 2, 2))
    )
    found["cc"].backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in loss.aux.parameters())
    assert CC.requires.relational and CC.beta == 0.02
    with pytest.raises(ConfigError, match="loss.width"):
        CC.Config(width=0)
