"""DFAD under the contract of all synthesis methods, and what its docstring promises."""

from __future__ import annotations

import pytest
import torch
from contract import SynthesizerContract

from synthesis.tiny import task
from synthkit.errors import ConfigError
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.dfad import DFAD, DFADConfig

SMALL = {"epochs": 4, "ep_steps": 4, "kd_steps": 2, "batch_size": 16, "nz": 8, "width": 4}


class TestDFAD(SynthesizerContract):
    name = "dfad"
    options = {**SMALL, "student": "convnet_d1_w8_bn"}
    engine_options = {**SMALL, "student": "lenet5_half", "snapshots": 2}
    inner = {"generator_step": (3,)}
    falling = ("kd",)
    longer = {"epochs": 6, "ep_steps": 20, "batch_size": 32, "lr": 0.02}


def build(curriculum: str = "none", **settings) -> DFAD:
    config = DFADConfig(**{**SMALL, "student": "convnet_d1_w8_bn", **settings})
    return DFAD(config, task(curriculum=Curriculum.named(curriculum)))


def test_students_first_then_the_generator_both_in_train_mode(monkeypatch):
    method = build(kd_steps=3)
    order = []
    for name in ("student_step", "generator_step"):
        step = getattr(method, name)

        def noted(step=step, name=name):
            order.append((name, method.student_view.module.training, method.generator.training))
            return step()

        monkeypatch.setattr(method, name, noted)
    method.run_cycle(3)
    assert order == [("student_step", True, True)] * 3 + [("generator_step", True, True)]
    assert method.step == 3
    assert all(p.requires_grad for p in method.student_view.module.parameters())


def test_each_step_moves_the_statistics_of_both_networks():
    method = build()
    for generating in (False, True):
        method.set_modes(generating=generating)
        before = {k: v.clone() for k, v in statistics(method).items()}
        (method.generator_step if generating else method.student_step)()
        after = statistics(method)
        assert all(not torch.equal(before[k], after[k]) for k in before)


def statistics(method: DFAD) -> dict[str, torch.Tensor]:
    networks = {"g": method.generator, "s": method.student_view.module}
    return {f"{n}.{k}": v for n, m in networks.items() for k, v in m.state_dict().items() if "running_mean" in k}


def test_the_generator_widens_the_gap():
    method = build()
    method.set_modes(generating=True)
    gaps = [-float(method.generator_step()["adversarial"].detach()) for _ in range(30)]
    assert gaps[0] > 0 and sum(gaps[-5:]) > sum(gaps[:5])


def test_both_rates_fall_at_the_milestones():
    method = build(epochs=10)
    rates = []
    for epoch in (1, 2, 4):
        method.step = epoch * 4
        method.cycle()
        rates.append((method.optimizer_s.param_groups[0]["lr"], method.optimizer_g.param_groups[0]["lr"]))
    assert [r[0] for r in rates] == pytest.approx([0.1, 0.01, 0.001])
    assert [r[1] for r in rates] == pytest.approx([1e-3, 1e-4, 1e-5])


def test_a_generator_without_its_only_term_is_refused():
    with pytest.raises(ConfigError, match="adv must be positive"):
        DFADConfig(adv=0.0)


def test_adam_is_indifferent_to_the_weight_of_the_only_term():
    """Why the ramp does nothing here: ten times the weight gives the same generator."""
    one, ten = build(adv=1.0), build(adv=10.0)
    for method in (one, ten):
        for _ in range(3):
            method.run_cycle(2)
    latents = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = [method.generator(latents) for method in (one, ten, build())]
    assert (images[0] - images[1]).abs().mean() < 0.02 * (images[0] - images[2]).abs().mean()
