"""DeiT-LT's weighted hard distillation by hand, and its class weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from synthkit.distillation.contract import Batch, Look, Setup, Shapes, Taps
from synthkit.distillation.losses.deit_lt import DeiTLT, effective_number_weights, weighted_hard_loss
from synthkit.errors import ConfigError


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(3)
    return [3 * torch.randn(6, 4, dtype=torch.float64, generator=generator) for _ in range(2)]


def test_value_by_hand_and_torch(pair):
    s, t = pair
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    values = weighted_hard_loss(s, t, weights, reduction="none")
    for i, value in enumerate(values.tolist()):
        y = int(t[i].argmax())
        expected = float(weights[y] * (s[i].logsumexp(0) - s[i, y]))
        assert value == pytest.approx(expected, rel=1e-12)
    decision = t.argmax(dim=1)
    released = torch.nn.functional.cross_entropy(s, decision, weight=weights)
    scale = weights[decision].mean()  # torch's mean divides by the weights of the batch
    torch.testing.assert_close(weighted_hard_loss(s, t, weights) / scale, released)
    assert float(scale) != 1
    assert torch.autograd.gradcheck(lambda x: weighted_hard_loss(x, t, weights, reduction="none"), s.requires_grad_())


def test_weights():
    counts = torch.tensor([1000, 100, 10, 0])
    weights = effective_number_weights(counts, 0.9999)
    naive = [(1 - 0.9999) / (1 - 0.9999**n) for n in (1000, 100, 10, 1)]
    mean = sum(naive[:3]) / 3
    assert weights.tolist() == pytest.approx([n / mean for n in naive], rel=1e-9)
    assert effective_number_weights(counts, 0.0).tolist() == [1.0] * 4
    inverse = effective_number_weights(counts[:3], 1 - 1e-9)
    assert inverse.tolist() == pytest.approx((torch.tensor([1e-3, 1e-2, 1e-1]) * 3 / 0.111).tolist(), rel=1e-4)


def test_weights_come_from_the_bank_and_set_in_late(pair):
    s, t = pair
    loss = DeiTLT(DeiTLT.Config(defer=0.5))
    loss.setup(Setup(student=Shapes(), teacher=Shapes(), num_classes=4, batch_size=6, epochs=2, images=6))

    def looks():
        for rows in (torch.arange(4), torch.arange(4, 6)):
            yield Look(teacher=Taps(logits=t[rows]), labels=None, index=rows)

    loss.prepare(looks)
    assert loss.aux is not None
    weights = effective_number_weights(torch.bincount(t.argmax(dim=1), minlength=4), 0.9999)
    torch.testing.assert_close(loss.aux.get_buffer("weights"), weights.float())
    for progress, used in ((0.49, torch.ones(4)), (0.5, weights.float())):
        batch = Batch(images=torch.zeros(6, 1, 2, 2), progress=progress)
        found = loss(Taps(logits=s), Taps(logits=t), batch)["deit_lt"]
        torch.testing.assert_close(found, weighted_hard_loss(s, t, used, reduction="none"))


def test_bad_options_are_refused():
    options: list[dict[str, Any]] = [{"effective": 1.0}, {"defer": 1.5}]
    for bad in options:
        with pytest.raises(ConfigError, match=f"loss.{next(iter(bad))}"):
            DeiTLT.Config(**bad)
