"""PLD: cross-entropy as a special case, a naive reference, convexity."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from synthkit.distillation.contract import Batch, Taps
from synthkit.distillation.losses.pld import PLD, plackett_luce, pld_loss, teacher_ranking
from synthkit.errors import ConfigError


@pytest.fixture
def triple():
    generator = torch.Generator().manual_seed(5)
    s, t = (3 * torch.randn(6, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    return s, t, torch.tensor([0, 6, 3, 3, 1, 2])


def close(found, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=rtol, atol=atol)


def naive(s, t, labels, temperature=1.0):
    total = []
    for row, worth, label in zip(s.tolist(), t.tolist(), labels, strict=True):
        left = set(range(len(row)))
        exps = [math.exp(w / temperature) for w in worth]
        value = 0.0
        for k in range(len(row)):
            best = max(left, key=lambda c: worth[c])
            choice = label if k == 0 and label is not None else best
            value += exps[choice] / sum(exps) * (math.log(sum(math.exp(row[c]) for c in left)) - row[choice])
            left.remove(choice)
        total.append(value)
    return torch.tensor(total, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_naive(triple, temperature):
    s, t, y = triple
    found = pld_loss(s, t, y, temperature=temperature, reduction="none")
    close(found, naive(s, t, y.tolist(), temperature))
    close(pld_loss(s, t, temperature=temperature), naive(s, t, [None] * 6, temperature).mean())


def test_cross_entropy_is_a_special_case(triple):
    s, t, y = triple
    weights = torch.zeros_like(s)
    weights[:, 0] = 1
    close(plackett_luce(s, teacher_ranking(t, y), weights), F.cross_entropy(s, y, reduction="none"))


def test_argmax_labels_are_the_teachers_own_order(triple):
    s, t, _ = triple
    assert torch.equal(teacher_ranking(t, t.argmax(dim=1)), teacher_ranking(t))
    close(pld_loss(s, t, t.argmax(dim=1)), pld_loss(s, t))


def test_convex_and_blind_to_a_shift(triple):
    s, t, y = triple
    other = s.flip(0) * 1.7
    close(pld_loss(s + 11, t - 3, y), pld_loss(s, t, y))
    middle = pld_loss(0.3 * s + 0.7 * other, t, y, reduction="none")
    chord = 0.3 * pld_loss(s, t, y, reduction="none") + 0.7 * pld_loss(other, t, y, reduction="none")
    assert bool((middle <= chord + 1e-12).all()) and bool((middle < chord - 1e-3).any())


def test_gradients(triple):
    s, t, y = triple
    assert torch.autograd.gradcheck(lambda x: pld_loss(x, t, y, reduction="none"), s.clone().requires_grad_())


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = pld_loss(student, torch.tensor([[-1e4, 1e4, 0.0]]), torch.tensor([0]))
    loss.backward()
    assert bool(torch.isfinite(loss)) and student.grad is not None and bool(torch.isfinite(student.grad).all())


def test_the_class(triple):
    s, t, y = triple
    batch = Batch(images=torch.zeros(6, 1, 2, 2), labels=y)
    found = PLD(PLD.Config(temperature=2.0))(Taps(logits=s), Taps(logits=t), batch)
    close(found["pld"], pld_loss(s, t, y, temperature=2.0, reduction="none"))
    free = PLD(PLD.Config(first="teacher"))
    assert PLD().requires.labels and not free.requires.labels
    close(free(Taps(logits=s), Taps(logits=t), batch)["pld"], pld_loss(s, t, reduction="none"))
    with pytest.raises(ConfigError, match="loss.first"):
        PLD.Config(first="student")  # type: ignore[arg-type]
