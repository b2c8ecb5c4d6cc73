"""DAFL under the contract of all synthesis methods, in both forms, and what its docstring promises."""

from __future__ import annotations

import pytest
import torch
from contract import SynthesizerContract, equal_runs, frozen_copy

from synthesis.tiny import task
from synthkit.errors import ConfigError
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.dafl import DAFL, DAFLConfig

SMALL = {"epochs": 4, "ep_steps": 4, "batch_size": 16, "nz": 8, "width": 4}
BENCHMARK = {"form": "benchmark", "kd_steps": 2, "generator": "large"}


class TestDAFL(SynthesizerContract):
    name = "dafl"
    options = {**SMALL, "student": "convnet_d1_w8_bn", "grad_adv": 2.0}
    engine_options = {**SMALL, "student": "lenet5_half", "snapshots": 2}
    inner = {"distil": (7,)}
    falling = ("g_loss", "kd")
    longer = {"epochs": 6, "ep_steps": 20, "batch_size": 32, "lr": 0.02, "schedule": "constant"}


def build(curriculum: str = "none", **settings) -> DAFL:
    config = DAFLConfig(**{**SMALL, "student": "convnet_d1_w8_bn", **settings})
    return DAFL(config, task(curriculum=Curriculum.named(curriculum)))


def test_the_benchmark_form_resumes():
    method = build(**BENCHMARK)
    batches, states = [], []
    for batch in method.generate():
        batches.append(batch)
        states.append(frozen_copy(method.state_dict()))
    assert sum(len(batch.images) for batch in batches) == 40
    again = build(**BENCHMARK)
    again.load_state_dict(states[len(states) // 2])
    assert equal_runs(list(again.generate()), batches[len(states) // 2 + 1 :])


@pytest.mark.parametrize(("form", "shared"), [({}, True), (BENCHMARK, False)])
def test_what_the_student_sees(monkeypatch, form, shared):
    """The original: the images that the generator was just judged on. The benchmark: fresh ones."""
    method = build(**form)
    judged, seen = [], []
    terms, distil = method.generator_terms, method.distil
    monkeypatch.setattr(method, "generator_terms", lambda images: judged.append(images.detach()) or terms(images))
    monkeypatch.setattr(method, "distil", lambda images: seen.append(images) or distil(images))
    method.cycle()
    assert not seen[0].requires_grad
    assert torch.equal(judged[0], seen[0]) == shared
    assert method._shared is None, "a batch outlives its iteration"


def test_the_original_form_asks_the_teacher_once(monkeypatch):
    counts = {}
    for name, form in (("original", {}), ("benchmark", {**BENCHMARK, "kd_steps": 1})):
        method = build(**form)
        calls: list[int] = []
        forward = method.teacher.module.forward
        monkeypatch.setattr(method.teacher.module, "forward", lambda x, f=forward, c=calls: c.append(1) or f(x))
        method.cycle()
        counts[name] = len(calls)
    assert counts == {"original": 1, "benchmark": 2}


def test_the_adversary_comes_with_the_ramp_alone():
    images = torch.rand(8, 3, 8, 8)
    for curriculum, expected in (("none", False), ("weights-only", False), ("easy2hard", True), ("ramp-only", True)):
        method = build(curriculum, epochs=8)
        method.step = 7 * 4
        method.set_modes(generating=True)
        assert ("adversarial" in method.generator_terms(images)) == expected


def test_the_original_form_is_one_step_each():
    with pytest.raises(ConfigError, match="kd_steps and g_steps are 1"):
        DAFLConfig(kd_steps=5)
    assert DAFLConfig(kd_steps=5, form="benchmark").kd_steps == 5


def test_the_student_rate_falls_at_its_milestones():
    method = build(epochs=10, lr=0.1)
    rates = [method.rate("step", 0.1, epoch) for epoch in (0, 3, 4, 7, 8, 9)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    method.cycle()
    assert method.optimizer_g.param_groups[0]["lr"] == method.config.lr_g
