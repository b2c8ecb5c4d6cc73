"""ZSKT under the contract of all synthesis methods, and what its docstring promises."""

from __future__ import annotations

import math

import pytest
import torch
from contract import SynthesizerContract
from torch import nn

from synthesis.tiny import TinyNet, task, teacher_view
from synthkit.models.build import build_model
from synthkit.models.view import ModelView, TeacherView
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.zskt import ZSKT, ZSKTConfig, attention_gap, stage_maps

SMALL = {"epochs": 4, "ep_steps": 4, "kd_steps": 2, "batch_size": 16, "nz": 8, "width": 4, "lr": 0.01}


class TestZSKT(SynthesizerContract):
    name = "zskt"
    options = {**SMALL, "student": "convnet_d1_w8_bn"}
    engine_options = {**SMALL, "student": "lenet5_half", "snapshots": 2}
    inner = {"generator_step": (3,)}
    falling = ("kd",)
    longer = {"epochs": 6, "ep_steps": 20, "batch_size": 32, "attention": 0.0}


def build(curriculum: str = "none", student: str = "convnet_d1_w8_bn", teacher=None, **settings) -> ZSKT:
    config = ZSKTConfig(**{**SMALL, "student": student, **settings})
    of_task = {} if teacher is None else {"teachers": [teacher]}
    return ZSKT(config, task(curriculum=Curriculum.named(curriculum), **of_task))


# ---- a cycle -----------------------------------------------------------------------------------------------------


def test_a_cycle_has_one_batch_of_latents_and_asks_the_teacher_twice(monkeypatch):
    """Once for the generator, once for all students; the images are made anew each time."""
    method = build(kd_steps=3)
    latents, seen, asked = [], [], []
    forward, distil = method.generator.forward, method.distil
    monkeypatch.setattr(method.generator, "forward", lambda z: latents.append(z) or forward(z))
    monkeypatch.setattr(method, "distil", lambda images: seen.append(images) or distil(images))
    teacher = method.teacher.module.forward
    monkeypatch.setattr(method.teacher.module, "forward", lambda x: asked.append(1) or teacher(x))
    method.run_cycle(3)
    assert len(latents) == 4 and all(torch.equal(z, latents[0]) for z in latents)
    assert len(asked) == 2
    torch.testing.assert_close(seen[0], seen[1])  # one generator, its batch statistics, one batch
    method.run_cycle(3)
    assert not torch.equal(latents[4], latents[0])
    assert method._taught is None and method._z is None


def test_bank_images_do_not_share_the_latents_of_a_cycle():
    method = build()
    method._z = method.latents(16, method.noise)
    assert torch.equal(method.latents(16, method.noise), method._z)
    assert not torch.equal(method.latents(16, method.bank_noise), method._z)


def test_both_rates_follow_a_cosine_over_the_cycles():
    method = build()
    rates = []
    while method.step < method.total_steps:
        progress = method.step / method.total_steps
        method.cycle()
        rates.append(0.5 * (1 + math.cos(math.pi * progress)))
        assert method.optimizer_s.param_groups[0]["lr"] == pytest.approx(0.01 * rates[-1])
        assert method.optimizer_g.param_groups[0]["lr"] == pytest.approx(1e-3 * rates[-1])
    assert len(set(rates)) == 8, "the rate moves within an epoch"


def test_gradients_are_clipped(monkeypatch):
    norms: list[float] = []
    clip = nn.utils.clip_grad_norm_

    def watched(parameters, limit):
        parameters = list(parameters)
        found = clip(parameters, limit)
        norms.append(max(float(found), 0.0))
        assert math.sqrt(sum(float(p.grad.square().sum()) for p in parameters)) <= limit * 1.001
        return found

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched)
    build(clip=0.01, kd_steps=2).run_cycle(2)
    assert len(norms) == 3 and max(norms) > 0.01


def test_student_loss_is_an_element_mean_and_the_attention_term():
    method = build(attention=0.0)
    images = torch.rand(8, 3, 8, 8)
    found = method.distil(images)
    torch.testing.assert_close(found.loss, found.per_sample.mean() / 10)
    method.attention = 250.0
    _, ours = stage_maps(method.student_view, images)
    _, theirs = stage_maps(method.teacher, images)
    gap = sum(attention_gap(ours[size], theirs[size]) for size in ours.keys() & theirs.keys())
    torch.testing.assert_close(method.distil(images).loss, found.loss + 250 * gap)
    assert gap > 0


def test_the_generator_widens_the_gap():
    method = build()
    method.set_modes(generating=True)
    gaps = [-float(method.generator_step()["adversarial"].detach()) for _ in range(30)]
    assert gaps[0] > 0 and sum(gaps[-5:]) > sum(gaps[:5])


# ---- stages ------------------------------------------------------------------------------------------------------


def stages(name: str, size: int = 32, channels: int = 3) -> dict[tuple[int, ...], torch.Tensor]:
    module = build_model(name, num_classes=10, in_channels=channels, image_size=size, seed=0).eval()
    constants = [0.5] * channels
    view = ModelView(module, constants, constants, input_size=(channels, size, size), num_classes=10)
    with torch.no_grad():
        logits, maps = stage_maps(view, torch.rand(2, channels, size, size))
    assert logits.shape == (2, 10)
    assert all(not m._forward_hooks for m in module.modules())
    return maps


def test_stages_of_a_wide_residual_network_are_its_three_groups():
    maps = stages("wrn16_1")
    assert {k: v.shape[1] for k, v in maps.items()} == {(32, 32): 16, (16, 16): 32, (8, 8): 64}


@pytest.mark.parametrize(
    ("teacher", "student", "channels", "sizes"),
    [
        ("resnet34", "resnet18", 3, [32, 16, 8, 4]),
        ("vgg11", "resnet18", 3, [32, 16, 8, 4]),
        ("lenet5", "lenet5_half", 1, [28, 10]),
    ],
)
def test_common_stages_of_the_usual_pairs(teacher, student, channels, sizes):
    common = stages(teacher, channels=channels).keys() & stages(student, channels=channels).keys()
    assert sorted((k[0] for k in common), reverse=True) == sizes


def test_a_network_that_names_no_stages_is_watched_at_all_modules():
    net = TinyNet()
    view = teacher_view(net)
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        _, maps = stage_maps(view, images)
        first = net.relu(net.bn1(net.conv1(view.normalize(images))))
        second = net.relu(net.bn2(net.conv2(first)))
    assert maps.keys() == {(8, 8), (4, 4)}
    assert torch.equal(maps[8, 8], first) and torch.equal(maps[4, 4], second)


def test_a_failing_forward_leaves_no_hook():
    view = teacher_view(TinyNet())
    with pytest.raises(RuntimeError):
        stage_maps(view, torch.rand(2, 3, 8, 8, dtype=torch.float64))
    assert all(not m._forward_hooks for m in view.module.modules())


class Flat(nn.Module):
    """A network without a single feature map."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 10)

    def forward(self, x):
        return self.linear(x.flatten(1))


def test_without_common_stages_the_term_is_off_and_said_so():
    warnings: list[str] = []
    flat = TeacherView(Flat(), [0.5] * 3, [0.5] * 3, input_size=(3, 8, 8), num_classes=10)
    config = ZSKTConfig(**SMALL, student="convnet_d1_w8_bn")
    method = ZSKT(config, task(teachers=[flat], warn=warnings.append))
    assert any("attention term is off" in text for text in warnings)
    assert method.attention == 0.0
    method.run_cycle(2)
