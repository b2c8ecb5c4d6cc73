"""ZSKD under the contract of all synthesis methods, and what its docstring promises."""

from __future__ import annotations

import pytest
import torch
from contract import SynthesizerContract, batches_of, equal_runs, equal_states, frozen_copy

from synthesis.tiny import task
from synthkit.errors import ConfigError
from synthkit.synthesis.generator.zskd import ZSKD, ZSKDConfig, rescale_

SMALL = {"epochs": 2, "ep_steps": 6, "batch_size": 16, "synthesis_batch": 10, "g_steps": 3, "lr_g": 0.05}
SEED = {**SMALL, "form": "seed", "lr_g": 2.0, "T": 10.0}


class TestZSKD(SynthesizerContract):
    name = "zskd"
    options = {**SMALL, "student": "convnet_d1_w8_bn"}
    engine_options = {**SMALL, "student": "lenet5_half", "augment": "crop"}
    inner = {"synthesise": (2, 3), "learn": (3,)}
    arrivals = (2,)
    safe_points = (3,)
    falling = ("kd",)
    longer = {"epochs": 6, "ep_steps": 20, "lr": 0.05}


class Carried(TestZSKD):
    """The seed's form: pixels and Adam go on from class to class. Two tests of the contract concern them."""

    options = {**SEED, "student": "convnet_d1_w8_bn"}
    engine_options = {**SEED, "student": "lenet5_half", "augment": "crop"}
    inner = {"synthesise": (2, 3)}
    arrivals = ()
    safe_points = ()


def build(**settings) -> ZSKD:
    return ZSKD(ZSKDConfig(**{**SMALL, "student": "convnet_d1_w8_bn", **settings}), task(images=40))


def test_the_carried_form_keeps_the_contract_of_resuming(tmp_path, monkeypatch):
    Carried().test_resume_at_any_yield()
    Carried().test_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch)


def test_every_batch_holds_every_class_at_every_scale():
    """Rows go round the classes, and round the betas after each round of classes."""
    method, seen = build(synthesis_batch=40), []
    method._dirichlet = lambda alpha, call: seen.append(alpha)  # type: ignore[method-assign]  # a spy
    method.targets(0)
    (alpha,) = seen
    assert torch.equal(alpha[:10].argmax(1), torch.arange(10)) and torch.equal(alpha[:20], alpha[20:])
    torch.testing.assert_close(alpha[10:20] - 1e-4, 0.1 * (alpha[:10] - 1e-4))
    torch.testing.assert_close(alpha[:10].amax(1), torch.full((10,), 1.0001, dtype=torch.float64))


def test_targets_are_distributions_around_their_class():
    targets = build(synthesis_batch=10_000, betas=(1.0,)).targets(0)
    assert targets.min() >= 0
    torch.testing.assert_close(targets.sum(1), torch.ones(10_000))
    method = build()
    alpha = method.concentration.double() + 1e-4
    means = targets.view(1000, 10, 10).double().mean(0)  # row r is of class r mod 10
    torch.testing.assert_close(means, alpha / alpha.sum(1, keepdim=True), rtol=0, atol=0.03)


def test_images_fit_their_targets_better_than_the_noise():
    from synthkit.synthesis.generator.zskd import impression_loss

    method = build(g_steps=60, lr_g=0.02, T=2.0)
    noise = method.fresh(0, torch.rand)
    images, labels = method.synthesise(0)
    assert labels is None and images.min() == 0 and images.max() == 1
    before, after = (impression_loss(method.teacher(x), method.targets(0), 2.0) for x in (noise, images))
    assert float(after.detach()) < 0.9 * float(before.detach())


def test_rescaling_reaches_black_and_white():
    pixels = torch.tensor([[-1.0, 0.5], [2.0, 3.0]])
    rescale_(pixels)
    assert pixels.tolist() == [[0.0, 0.375], [0.75, 1.0]]


def test_the_carried_form_goes_on_where_the_class_before_ended():
    """The start of call 1 is the end of call 0; a new round of classes starts from noise."""
    method = build(**SEED)
    method.synthesise(0)
    kept = method.carried
    assert kept is not None
    method.synthesise(1)
    assert method.carried is kept and method.optimizer_x is not None
    assert method.optimizer_x.state[kept]["step"] == 6
    method.synthesise(10)
    assert method.carried is not kept


def test_the_original_form_has_no_memory():
    method, again = build(), build()
    method.synthesise(0)
    assert torch.equal(method.synthesise(1)[0], again.synthesise(1)[0]) and method.extra_state() == {}


def test_the_state_of_the_carried_form_between_two_classes():
    method, again = build(**SEED), build(**SEED)
    method.synthesise(0)
    again.load_extra_state(frozen_copy(method.extra_state()))
    assert equal_states(again.extra_state(), method.extra_state())
    assert torch.equal(again.synthesise(1)[0], method.synthesise(1)[0])


def test_forms_and_betas_change_the_images():
    first = batches_of(build())
    for other in ({"betas": (1.0,)}, {"form": "seed"}):
        assert not equal_runs(batches_of(build(**other)), first)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"betas": ()}, "betas must be positive"),
        ({"betas": (1.0, 0.0)}, "betas must be positive"),
        ({"adv": 1.0}, "without looking at the student"),
        ({"grad_adv": 0.5}, "without looking at the student"),
        ({"jitter": -1}, "jitter must not be negative"),
    ],
)
def test_settings_out_of_range(settings, what):
    with pytest.raises(ConfigError, match=what):
        ZSKDConfig(**settings)
