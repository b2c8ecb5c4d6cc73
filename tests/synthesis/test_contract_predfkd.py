"""PRE-DFKD under the contract of all synthesis methods, and what its docstring promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contract import SynthesizerContract, frozen_copy

from synthesis.tiny import task
from synthkit.config.schema import RuntimeConfig
from synthkit.errors import ConfigError
from synthkit.runtime import Runtime
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.predfkd import PREDFKD, PREDFKDConfig, latent_loss, vae_loss

SMALL: dict[str, Any] = {
    "epochs": 4, "ep_steps": 4, "kd_steps": 2, "batch_size": 16, "nz": 8, "width": 4, "vae_steps": 1,
    "student": "convnet_d1_w8_bn",
}  # fmt: skip


class TestPREDFKD(SynthesizerContract):
    name = "predfkd"
    options = {**SMALL, "epochs": 3, "ep_steps": 2, "batch_size": 8}
    engine_options = {**SMALL, "epochs": 3, "ep_steps": 2, "batch_size": 8, "student": "lenet5_half", "snapshots": 1}
    inner = {"vae_step": (3,)}
    arrivals = (9,)
    falling = ("g_loss", "kd")
    longer = {"epochs": 4, "ep_steps": 12, "batch_size": 16, "lr": 0.05, "adv": 0.0}


def build(*, curriculum: str = "none", **settings: Any) -> PREDFKD:
    return PREDFKD(PREDFKDConfig(**{**SMALL, **settings}), task(curriculum=Curriculum.named(curriculum)))


# ---- what the student sees -----------------------------------------------------------------------------------


def test_the_student_sees_fresh_and_rehearsed_images(monkeypatch):
    method = build(batch_size=16, memory_share=0.25)
    seen: list[torch.Tensor] = []
    learn = method.learn
    monkeypatch.setattr(method, "learn", lambda images: seen.append(images) or learn(images))
    method.cycle()
    assert [len(images) for images in seen] == [20, 20]
    assert all(not images.requires_grad for images in seen)


@pytest.mark.parametrize(("batch", "share", "rehearsed"), [(1024, 0.125, 128), (16, 0.125, 2), (8, 0.01, 2)])
def test_number_of_rehearsed_images(batch, share, rehearsed):
    assert PREDFKDConfig(batch_size=batch, memory_share=share).rehearsed == rehearsed


def test_the_vae_learns_after_the_first_steps_of_every_cycle(monkeypatch):
    method = build(ep_steps=7, kd_steps=4, vae_steps=3)
    at: list[int] = []
    monkeypatch.setattr(method, "vae_step", lambda fresh: at.append(method.step))
    for _ in range(4):
        method.cycle()
    # two epochs of 7 steps, each a cycle of 4 and one of 3
    assert at == [0, 1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 13]


def test_the_vae_keeps_fresh_images_alone_in_the_first_cycle(monkeypatch):
    method = build(kd_steps=2, vae_steps=2, memory_share=0.25)
    sizes: list[int] = []
    forward = method.encoder.forward
    monkeypatch.setattr(method.encoder, "forward", lambda x: sizes.append(len(x)) or forward(x))
    method.cycle()
    method.cycle()
    assert sizes == [8, 8, 12, 12]


def test_the_vae_learns_to_make_the_images_of_the_generator_again():
    method = build(lr_memory=5e-3)
    method.set_modes(generating=False)
    method.step = 0
    fresh = method.student_images()
    losses = torch.stack([method.vae_step(fresh) for _ in range(40)])
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()


# ---- the latents ---------------------------------------------------------------------------------------------


def test_latents_make_one_step_of_adam():
    """Against torch.optim.Adam on the loss itself, and the memory generator is given no gradient."""
    method = build(memory_share=0.5, lr_z=0.03)
    method.memory.eval()
    z = torch.randn(8, 8, generator=torch.Generator().manual_seed(5))
    method.latents = lambda n, rng: z.clone()
    images, found = method.rehearse()
    assert all(p.grad is None for p in method.memory.parameters())

    ours = z.clone().requires_grad_()
    adam = torch.optim.Adam([ours], lr=0.03)
    loss = latent_loss(ours, method.teacher(method.memory(ours)), 1.0, 5.0)
    loss.backward()
    adam.step()
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(images, method.memory(ours).detach())
    assert (ours.detach() - z).abs().max() == pytest.approx(0.03, rel=1e-3)


def test_latent_loss_by_hand():
    """Two latents of one number, one sure class each: CE 0, a balanced batch, and the penalty of var 8 and mean 3."""
    logits = torch.tensor([[90.0, 0.0], [0.0, 90.0]], dtype=torch.float64)
    z = torch.tensor([[1.0], [5.0]], dtype=torch.float64)
    expected = -5 * math.log10(2) + (8 - 1) ** 2 + 3**2
    torch.testing.assert_close(latent_loss(z, logits, 1.0, 5.0), torch.tensor(expected, dtype=torch.float64))


def test_vae_loss_by_hand():
    mu, log_var = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, math.log(4.0)]])
    made, seen = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 0.5)
    logits, target = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2)
    divergence = (0.5 * 1 + 0.5 * (4 + 4 - 1 - math.log(4))) / 2
    found = vae_loss(made, seen, logits, target, mu, log_var, 0.1)
    torch.testing.assert_close(found, torch.tensor(0.5 + 0.25 + 0.1 * divergence))


# ---- the leak of the published code --------------------------------------------------------------------------


def vae_gradient(leak: bool, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Gradient of the memory generator at its update in one VAE step after the first cycle."""
    method = build(leak=leak, memory_share=0.5)
    method.set_modes(generating=False)
    method.step = 2
    kept: list[torch.Tensor] = []

    def step() -> None:
        kept.append(torch.cat([p.grad.flatten() for p in method.memory.parameters() if p.grad is not None]))

    monkeypatch.setattr(method.optimizer_v, "step", step)
    method.vae_step(method.student_images())
    return kept[0]


def test_leak_of_the_latents_loss_into_the_memory_generator(monkeypatch):
    """Both values: the clean gradient, and the published one, which has the gradient of L_z on top."""
    clean, leaked = vae_gradient(False, monkeypatch), vae_gradient(True, monkeypatch)
    method = build(memory_share=0.5)
    method.set_modes(generating=False)
    method.student_images()  # the same draws as above
    method.memory.train()
    z = method.latents(method.config.rehearsed, method.noise)
    latent_loss(z, method.teacher(method.memory(z)), 1.0, 5.0).backward()
    extra = torch.cat([p.grad.flatten() for p in method.memory.parameters() if p.grad is not None])
    torch.testing.assert_close(leaked, clean + extra, rtol=1e-4, atol=1e-6)
    assert extra.norm() > 0.1 * clean.norm()


# ---- curriculum and modes ------------------------------------------------------------------------------------


def test_curriculum():
    assert PREDFKD.default_curriculum == "none"
    assert build(adv=1.0, grad_adv=0.5).adversarial_weight(3) == 1.0
    assert build(curriculum="easy2hard", epochs=8, adv=1.0, grad_adv=0.5).adversarial_weight(7) == 1.0 + 0.5 * 3


def test_both_networks_stay_in_train_mode():
    method = build()
    for generating in (True, False):
        method.set_modes(generating=generating)
        assert method.generator.training and method.student_view.module.training
        frozen = [not p.requires_grad for p in method.student_view.module.parameters()]
        assert all(frozen) if generating else not any(frozen)


def test_the_adversary_reaches_the_generator_through_the_student():
    """Without a student's gradient the adversarial term would train nothing."""
    method = build()
    method.set_modes(generating=True)
    images = method.generator(method.latents(16, method.noise))
    slope = torch.autograd.grad(method.generator_terms(images)["adversarial"], images)[0]
    assert slope.abs().max() > 0


def test_the_estimate_leaves_the_memory_alone():
    method = build()
    before = method.memory.state_dict()["main.0.running_mean"].clone()
    method.estimate()
    assert torch.equal(method.memory.state_dict()["main.0.running_mean"], before)


def test_half_precision_leaves_none_in_the_state():
    """Losses and figures are float32 or wider: what the bank can store, and what can be summed over an epoch."""
    runtime = Runtime.create(RuntimeConfig(device="cpu", precision="bf16"))
    method = PREDFKD(PREDFKDConfig(**SMALL), task(runtime=runtime))
    method.cycle()
    method.cycle()
    assert all(value.dtype == torch.float32 for value in method._sums.values())
    frozen_copy(method.state_dict())


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"batch_size": 2}, "batch_size must be at least 4"),
        ({"memory_share": 0.0}, "memory_share"),
        ({"memory_share": 1.5}, "memory_share"),
        ({"lr_z": 0.0}, "lr_z must be positive"),
        ({"vae_steps": -1}, "vae_steps must not be negative"),
    ],
)
def test_settings_out_of_range(settings, what):
    with pytest.raises(ConfigError, match=what):
        PREDFKDConfig(**settings)
