"""DFQ under the contract of all synthesis methods, and what its docstring promises."""

from __future__ import annotations

import pytest
import torch
from contract import SynthesizerContract

from synthesis.tiny import task
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.dfq import DFQ, DFQConfig

SMALL = {"epochs": 4, "ep_steps": 4, "kd_steps": 2, "batch_size": 16, "nz": 8, "width": 4, "lr_g": 0.02}


class TestDFQ(SynthesizerContract):
    name = "dfq"
    options = {**SMALL, "student": "convnet_d1_w8_bn", "grad_adv": 2.0}
    engine_options = {**SMALL, "student": "lenet5_half", "snapshots": 2}
    inner = {"generator_step": (3,)}
    falling = ("g_bn",)
    longer = {"epochs": 6, "ep_steps": 20, "batch_size": 32, "lr": 0.05}


def build(curriculum: str = "none", **settings) -> DFQ:
    config = DFQConfig(**{**SMALL, "student": "convnet_d1_w8_bn", **settings})
    return DFQ(config, task(curriculum=Curriculum.named(curriculum)))


def test_the_adversary_counts_every_sample_and_points_towards_disagreement():
    """Without a mask the term is -mean KL over all samples; raising it means more disagreement."""
    method = build(bn=0.0, oh=0.0, balance=0.0)
    method.set_modes(generating=True)
    gap = []
    for _ in range(20):
        gap.append(-float(method.generator_step()["adversarial"].detach()))
    assert gap[0] > 0 and sum(gap[-5:]) > sum(gap[:5])


def test_terms_that_are_off_cost_no_forward(monkeypatch):
    method = build(adv=0.0)
    monkeypatch.setattr(method, "student_view", None)
    method.set_modes = lambda **_: None
    assert "adversarial" not in method.generator_terms(torch.rand(4, 3, 8, 8))


@pytest.mark.parametrize(("curriculum", "last"), [("none", 1.0), ("easy2hard", 5.0), ("weights-only", 1.0)])
def test_the_ramp_starts_at_the_published_weight(curriculum, last):
    """epochs 8, begin .25, end .75: a(7) = 1 + 3 g more after epochs 3, 4 and 5."""
    method = build(curriculum, epochs=8, grad_adv=4 / 3)
    assert method.adversarial_weight(0) == 1.0
    assert method.adversarial_weight(7) == pytest.approx(last)
