"""LRA under the contract of all synthesis methods, and its meta step against finite differences."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from contract import SynthesizerContract

from synthesis.tiny import TinyNet, task
from synthkit.errors import ConfigError
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.lra import LRA, LRAConfig

SMALL: dict[str, Any] = {
    "epochs": 4, "ep_steps": 4, "kd_steps": 2, "batch_size": 16, "nz": 8, "width": 4, "push_every": 1, "capacity": 2,
    "student": "convnet_d1_w8_bn", "lr_inner": 0.1,
}  # fmt: skip


class TestLRA(SynthesizerContract):
    name = "lra"
    options = {**SMALL, "epochs": 3, "ep_steps": 2, "batch_size": 8}
    engine_options = {**SMALL, "epochs": 3, "ep_steps": 2, "batch_size": 8, "student": "lenet5_half", "snapshots": 1}
    inner = {"retention": (3,)}
    arrivals = (9,)
    falling = ("g_loss", "kd")
    longer = {"epochs": 4, "ep_steps": 12, "batch_size": 16, "lr": 0.05, "adv": 0.0}


def build(*, curriculum: str = "none", **settings: Any) -> LRA:
    """LRA in float64 with a student of the golden cases."""
    method = LRA(LRAConfig(**{**SMALL, "batch_size": 6, **settings}), task(curriculum=Curriculum.named(curriculum)))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        method.student_view.module = TinyNet(width=3).double().train()
    method.teacher.module.double()
    method.optimizer_s = torch.optim.SGD(method.student_view.module.parameters(), lr=0.0)
    return method


def images(n: int = 10) -> torch.Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def slopes(method: LRA, x: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(method.distil(x).loss, list(method.student_view.module.parameters()))
    return torch.cat([slope.flatten() for slope in found])


def naive(method: LRA, x: torch.Tensor) -> torch.Tensor:
    """L_S with an inner step that is made on a real copy of the student."""
    b, c = method.config.batch_size, method.config
    view = method.student_view

    def loss(module: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = method.teacher(batch)
        return (module(view.normalize(batch)) - target).abs().mean()

    copied = copy.deepcopy(view.module)
    loss(copied, x[:b]).backward()
    with torch.no_grad():
        for weight in copied.parameters():
            assert weight.grad is not None
            weight -= c.lr_inner * (weight.grad + c.weight_decay * weight)
    return loss(copy.deepcopy(view.module), x) + loss(copied, x[b:])


def test_loss_against_a_real_copy():
    method, x = build(), images()
    torch.testing.assert_close(method.distil(x).loss.detach(), naive(method, x).detach())


@pytest.mark.parametrize("released", [False, True])
def test_gradient_against_finite_differences(released):
    """Along a direction: the whole derivative of L_S where it is differentiated, else that of the first term alone."""
    method, x = build(released=released), images()
    found = slopes(method, x)
    weights = list(method.student_view.module.parameters())
    draw = torch.Generator().manual_seed(6)
    direction = [torch.randn(w.shape, generator=draw, dtype=w.dtype) for w in weights]
    values = {}
    for sign in (1, -1):
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w += sign * 1e-6 * d
        values[sign] = naive(method, x) - (method.retention(*parts(method, x)) if released else 0)
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w -= sign * 1e-6 * d
    measured = (values[1] - values[-1]).detach() / 2e-6
    along = found @ torch.cat([d.flatten() for d in direction])
    torch.testing.assert_close(along, measured, rtol=1e-4, atol=1e-6)


def parts(method: LRA, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    b = method.config.batch_size
    with torch.no_grad():
        target = method.teacher(x)
    return x[:b], target[:b], x[b:], target[b:]


def test_released_form_is_the_update_of_mbdfkd():
    """Both values: the same loss is reported, but as released the retention term sends no gradient."""
    x = images()
    ours, released = build(), build(released=True)
    torch.testing.assert_close(ours.distil(x).loss.detach(), released.distil(x).loss.detach())
    plain = super(LRA, released).distil(x).loss
    weights = list(released.student_view.module.parameters())
    without = torch.cat([slope.flatten() for slope in torch.autograd.grad(plain, weights)])
    torch.testing.assert_close(slopes(released, x), without)
    assert (slopes(ours, x) - without).norm() > 0.1 * without.norm()


def test_batchnorm_of_the_student_moves_with_one_forward():
    """The statistics after a step are those of one forward on all images, as if there were no inner step."""
    method, x = build(), images()
    plain = copy.deepcopy(method.student_view.module)
    plain(method.student_view.normalize(x))
    method.distil(x)
    for ours, theirs in zip(method.student_view.module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_a_memory_it_is_plain_distillation():
    method, x = build(), images(6)
    torch.testing.assert_close(method.distil(x).loss, super(LRA, method).distil(x).loss)


def test_curriculum_weighs_all_three_losses(monkeypatch):
    method = build(curriculum="easy2hard")
    sizes: list[int] = []
    loss = method.student_loss
    monkeypatch.setattr(method, "student_loss", lambda losses: sizes.append(len(losses)) or loss(losses))
    method.distil(images())
    assert sorted(sizes) == [4, 6, 10]


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="lr_inner must be positive"):
        LRAConfig(lr_inner=0.0)
