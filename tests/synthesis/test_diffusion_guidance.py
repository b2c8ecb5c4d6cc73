"""Energies and how they bend a step: by hand, against finite differences, and seen in the images."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from synthkit.errors import RequirementError
from synthkit.models.view import TeacherView
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.diffusion.diffusion import Diffusion, GuidedConfig
from synthkit.synthesis.diffusion.guidance import (
    adversarial_energy,
    class_energy,
    clean_image,
    diversity_energy,
    guided_noise,
)

from .tiny import MEAN, STD, task, teacher_view
from .tiny_diffusion import save_dit, save_unet


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_unet(tmp_path_factory.mktemp("unet"))


def method(model: str, settings: dict[str, Any], **of_task: Any) -> Diffusion:
    plain = {"curriculum": Curriculum.named("none"), "images": 40}
    return Diffusion(GuidedConfig(**{"model": model, "steps": 8, "sampler": "ddim", **settings}),
                     task(**{**plain, **of_task}))  # fmt: skip


def difficulty(found: Diffusion) -> float:
    return float(torch.cat([batch.difficulty for batch in found.generate()]).mean())  # type: ignore[misc]  # a teacher is there


# ---- energies by hand ----------------------------------------------------------------------------------------


def test_class_energy():
    logits = torch.tensor([[0.0, math.log(3.0)], [2.0, 2.0]])
    torch.testing.assert_close(
        class_energy(logits, torch.tensor([1, 0])), torch.tensor([-math.log(0.75), math.log(2.0)])
    )


def test_adversarial_energy_leaves_mistakes_alone():
    teacher = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0]])
    student = torch.tensor([[1e-6, 0.0], [0.0, 1e-6]])  # unsure both times; the second time it decides otherwise
    found = adversarial_energy(student, teacher, 1.0)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    torch.testing.assert_close(found, torch.tensor([-divergence, 0.0]), atol=1e-5, rtol=0)


def test_diversity_energy_looks_at_the_nearest_of_the_class():
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0], [1.0, 0.0]]).view(4, 1, 1, 2).requires_grad_()
    found = diversity_energy(images, torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(found.detach(), torch.tensor([0.6, 0.8, 0.8, 0.0]))
    (gradient,) = torch.autograd.grad(found[2], images)
    assert gradient[1].abs().sum() == 0, "the neighbour is a memory and is not pulled"
    assert gradient[2].abs().sum() > 0 and gradient[3].abs().sum() == 0


# ---- the bent step -------------------------------------------------------------------------------------------


def test_gradient_equals_finite_differences():
    """G is the gradient of the energy of x_0(x_t), with its factor 1 / sqrt(abar)."""
    torch.manual_seed(0)
    abar, matrix = 0.4, torch.randn(6, 6, dtype=torch.float64)
    state = torch.randn(2, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 1, 2, 3, dtype=torch.float64)
    scale = torch.tensor([0.7, 0.3], dtype=torch.float64)

    def energy(clean: torch.Tensor) -> torch.Tensor:
        return torch.sin(clean.flatten(1) @ matrix).sum()

    bent = guided_noise(state, noise, abar, energy, scale, normalise=False)
    with torch.no_grad():
        for index in ((0, 0, 1, 2), (1, 0, 0, 1)):
            moved = torch.zeros_like(state)
            moved[index] = 1e-6
            up, down = (energy(clean_image(state + s * moved, noise, abar)) for s in (1, -1))
            slope = float(up - down) / 2e-6
            expected = float(noise[index]) + math.sqrt(1 - abar) * float(scale[index[0]]) * slope
            assert float(bent[index]) == pytest.approx(expected, abs=1e-6)


def test_normalised_gradients_have_the_length_of_the_noise():
    torch.manual_seed(0)
    state, noise = torch.randn(3, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 4, 4)
    scale = torch.tensor([0.1, 0.5, 0.0])
    for factor in (1e-4, 1e4):
        bent = guided_noise(state, noise, 0.2, lambda x, f=factor: f * (x**3).sum(), scale, normalise=True)
        change = (bent - noise).flatten(1).norm(dim=1)
        torch.testing.assert_close(change, scale * math.sqrt(0.8) * noise.flatten(1).norm(dim=1))


def test_a_flat_energy_bends_nothing():
    state, noise = torch.randn(2, 1, 2, 2, requires_grad=True), torch.randn(2, 1, 2, 2)
    bent = guided_noise(state, noise, 0.5, lambda x: (0 * x).sum(), torch.ones(2), normalise=True)
    assert torch.equal(bent, noise)


def test_through_the_network_equals_finite_differences(model):
    """The gradient of E(x_0(x_t, net(x_t))), the network's own part included."""
    found = method(model, {"through": True, "normalise": False, "guidance": 1.0, "steps": 4})
    found.painter.network.double()
    matrix = torch.randn(3 * 8 * 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def energy(images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1) @ matrix).square().sum()

    step, labels = 2, torch.tensor([3])
    now, condition = found.sampler.times[step], found.painter.condition(labels)
    abar = found.sampler.abar[step]  # type: ignore[index]  # not a consistency model
    state = 0.3 * torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    network = found.painter.network

    def noise_at(x: torch.Tensor) -> torch.Tensor:
        return abar**0.5 * network(x, now, class_labels=condition).sample + (1 - abar) ** 0.5 * x

    def total(x: torch.Tensor) -> float:
        return float(energy(found._seen(clean_image(x, noise_at(x), abar))))

    x = state.clone().requires_grad_()
    bent = guided_noise(
        x, noise_at(x), abar, lambda clean: energy(found._seen(clean)), torch.ones(1).double(), normalise=False
    )
    with torch.no_grad():
        gradient = (bent - noise_at(state)) / (1 - abar) ** 0.5
        for index in ((0, 1, 3, 4), (0, 2, 7, 0)):
            moved = torch.zeros_like(state)
            moved[index] = 1e-5
            slope = (total(state + moved) - total(state - moved)) / 2e-5
            assert float(gradient[index]) == pytest.approx(slope, rel=1e-4, abs=1e-6)
        got = found.predict(state, step, now, condition, energy, torch.ones(1).double())
        expected = (bent - (1 - abar) ** 0.5 * state) / abar**0.5
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


# ---- seen in the images --------------------------------------------------------------------------------------


def test_guidance_makes_the_intended_class(model):
    plain = difficulty(method(model, {"guidance": 0.0}))
    cheap = difficulty(method(model, {"guidance": 0.3}))
    through = difficulty(method(model, {"guidance": 0.3, "through": True}))
    assert cheap < 0.9 * plain and through < 0.9 * plain


def test_guidance_through_an_autoencoder(tmp_path):
    latent = save_dit(tmp_path)
    plain, guided = (difficulty(method(latent, {"guidance": g, "steps": 6})) for g in (0.0, 0.9))
    assert guided < 0.98 * plain


def test_every_term_moves_the_images(model):
    base = torch.cat([b.images for b in method(model, {"guidance": 0.2}).generate()])
    student = {"student": teacher_view(seed=1)}
    for settings in ({"bn": 1.0}, {"adv": 5.0, "student": "s"}, {"diversity": 5.0}, {"cfg": 2.0}):
        moved = torch.cat([b.images for b in method(model, {"guidance": 0.2, **settings}, networks=student).generate()])
        assert not torch.equal(moved, base), settings


def test_bn_term_brings_the_statistics_nearer(model):
    def statistics(found: Diffusion) -> float:
        teacher, images = found.task.teacher, torch.cat([b.images for b in found.generate()])
        with torch.no_grad(), teacher.bn_statistics() as seen:
            teacher(images)
        return float(seen.loss())

    without, with_term = (
        statistics(method(model, {"guidance": 0.3, "ce": 0.0, "bn": w, "diversity": 1e-9})) for w in (0.0, 1.0)
    )
    assert with_term < without


def test_no_guidance_where_there_is_no_signal(model):
    found = method(model, {"abar_min": 0.5, "guidance": 0.5})
    seen = []
    original = found._seen
    found._seen = lambda clean: seen.append(1) or original(clean)  # type: ignore[method-assign]
    next(iter(found.generate()))
    assert len(seen) == sum(abar > 0.5 for abar in found.sampler.abar or []) > 0


def test_the_networks_stay_as_they_were(model):
    found = method(model, {"guidance": 0.2, "bn": 1.0, "through": True})
    networks = [found.painter.network, found.task.teacher.module]
    before = [{k: v.clone() for k, v in network.state_dict().items()} for network in networks]
    list(found.generate())
    for network, state in zip(networks, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        assert all(parameter.grad is None for parameter in network.parameters())


def test_adversary_needs_a_student(model):
    with pytest.raises(RequirementError, match="--method.student"):
        method(model, {"adv": 1.0})


def test_bn_term_needs_batchnorm(model):
    assert Diffusion.requires_for(GuidedConfig(bn=1.0)).batchnorm
    assert not Diffusion.requires_for(GuidedConfig()).batchnorm


def test_the_adversary_ramps_up_over_the_bank(model):
    networks = {"student": TeacherView(nn.Flatten(), MEAN, STD, input_size=(3, 8, 8), num_classes=192)}
    found = method(model, {"adv": 2.0, "student": "s"}, networks=networks, curriculum=Curriculum.named("easy2hard"))
    torch.testing.assert_close(found.adversarial_weight(0, 40), torch.linspace(0, 2, 40))
    flat = method(model, {"adv": 2.0, "student": "s"}, networks=networks)
    assert flat.adversarial_weight(0, 40).tolist() == [2.0] * 40
