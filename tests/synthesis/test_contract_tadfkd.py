"""TA-DFKD under the contract of all synthesis methods, and what its selection promises."""

from __future__ import annotations

import pytest
import torch
from contract import SynthesizerContract

from synthesis.tiny import task, teacher_view
from synthkit.errors import ConfigError
from synthkit.synthesis.generator import tadfkd
from synthkit.synthesis.generator.tadfkd import TADFKD, TADFKDConfig, clean_probability, select_clean

SMALL = {"epochs": 4, "ep_steps": 4, "kd_steps": 2, "batch_size": 12, "nz": 8, "width": 4, "lr": 0.05, "lr_g": 0.02}


class TestTADFKD(SynthesizerContract):
    name = "tadfkd"
    options = {**SMALL, "student": "convnet_d1_w8_bn"}
    engine_options = {**SMALL, "student": "lenet5_half_bn", "snapshots": 2}
    inner = {"student_step": (7, 5, 2), "generator_step": (3, 2, 2)}
    falling = ("g_bn", "kd")
    longer = {"epochs": 6, "ep_steps": 20, "batch_size": 32}


def build(*, of_task=None, **settings) -> TADFKD:
    config = TADFKDConfig(**{**SMALL, "student": "convnet_d1_w8_bn", **settings})
    return TADFKD(config, task(**(of_task or {})))


def test_two_clear_clusters_are_told_apart():
    losses = torch.tensor([0.01, 2.0, 0.02, 2.1, 0.05, 1.9, 0.0, 2.2])
    assert select_clean(losses, 0.5).tolist() == [True, False, True, False, True, False, True, False]
    assert (clean_probability(losses) - torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0])).abs().max() < 1e-3


def test_equal_losses_are_all_clean():
    """There the original divides by zero."""
    assert clean_probability(torch.full((6,), 0.7)).tolist() == [1.0] * 6


def test_two_images_are_kept_at_least():
    losses = torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0])
    assert select_clean(losses, 1.0).tolist() == [False, True, False, True, False]


def test_the_fit_ignores_scale_and_order():
    losses = torch.rand(24, generator=torch.Generator().manual_seed(3)).square()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(4))
    found = clean_probability(losses)
    torch.testing.assert_close(clean_probability(7 * losses + 2)[order], found[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clean_probability(losses[order]), found[order], rtol=1e-4, atol=1e-5)


def test_the_student_sees_a_full_batch_of_kept_images(monkeypatch):
    method = build(augment="none")
    method.set_modes(generating=False)
    drawn: list[torch.Tensor] = []
    honest = method.select
    monkeypatch.setattr(method, "select", lambda images: (drawn.append(images), honest(images))[1])
    images = method.student_images()
    assert len(images) == method.config.batch_size and not images.requires_grad
    kept = torch.cat([part[honest(part)] for part in drawn])
    assert torch.equal(images, kept[: len(images)])


def test_draws_are_bounded_and_said(monkeypatch):
    told: list[str] = []
    method = build(of_task={"warn": told.append})
    monkeypatch.setattr(tadfkd, "MAX_DRAWS", 2)
    monkeypatch.setattr(method, "select", lambda images: torch.arange(len(images)) < 2)
    assert len(method.student_images()) == 4
    assert len(told) == 1 and "kept 4 of 24" in told[0]


def test_bn_statistics_and_adversary_are_of_the_kept_images_and_priors_of_all(monkeypatch):
    view = teacher_view()
    method = build(augment="none", of_task={"teachers": [view]})
    method.set_modes(generating=True)
    chosen = torch.tensor([True, False, True, True, False, False])
    monkeypatch.setattr(method, "select", lambda images: chosen)
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    terms = method.generator_terms(images)
    with view.bn_statistics() as statistics:
        view(images[chosen])
    torch.testing.assert_close(terms["bn"], 10 * statistics.loss())
    torch.testing.assert_close(terms["l2"], 6e-3 * view.normalize(images).norm())
    (gradient,) = torch.autograd.grad(terms["adversarial"] + terms["bn"], images)
    assert (gradient[chosen] != 0).any() and (gradient[~chosen] == 0).all()


def test_student_learns_first_and_both_networks_stay_in_train_mode(monkeypatch):
    method = build()
    seen: list[tuple[str, bool, bool]] = []
    for name in ("student_step", "generator_step"):
        honest = getattr(method, name)

        def noted(name=name, honest=honest):
            seen.append((name, method.generator.training, method.student_view.module.training))
            return honest()

        monkeypatch.setattr(method, name, noted)
    method.cycle()
    assert seen == [("student_step", True, True)] * 2 + [("generator_step", True, True)]


def test_the_teacher_without_bn_has_no_bn_term():
    method = build(bn=0.0)
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert sorted(method.generator_terms(images)) == ["adversarial", "l2", "tv"]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"batch_size": 1}, "at least 2"),
        ({"selection": 1.0}, "selection"),
        ({"tv": -1.0}, "tv must not be negative"),
        ({"augment": "blur"}, "augment: no such policy"),
    ],
)
def test_settings_out_of_range(settings, what):
    with pytest.raises(ConfigError, match=what):
        TADFKDConfig(**settings)
