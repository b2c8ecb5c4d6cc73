"""FastDFKD: the inherited contract, the meta-steps, the warm-up and the reset."""

from __future__ import annotations

import copy

import pytest
import torch
from contract import SynthesizerContract

from synthesis.tiny import task
from synthkit.errors import ConfigError
from synthkit.models.generators import build_generator
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.fastdfkd import FastDFKD, FastDFKDConfig, reset_first_layers

SMALL = {
    "epochs": 4,
    "ep_steps": 4,
    "batch_size": 16,
    "synthesis_batch": 8,
    "g_steps": 3,
    "warmup": 0.3,
    "nz": 8,
    "width": 4,
    "lr_g": 0.02,
    "lr": 0.05,
    "reset_l0": 4,
}


class TestFastDFKD(SynthesizerContract):
    name = "fastdfkd"
    options = {**SMALL, "student": "convnet_d1_w8_bn"}
    engine_options = {**SMALL, "student": "lenet5_half", "epochs": 2, "batch_size": 8}
    inner = {"learn_to_adapt": (3, 2)}
    arrivals = (3, 2)
    falling = ("g_loss",)
    longer = {"epochs": 4, "ep_steps": 6, "synthesis_batch": 2, "lr_g": 5e-3, "adv": 0.0, "reset_l0": 0}


def method(**options) -> FastDFKD:
    of_task = {k: options.pop(k) for k in ("teachers", "images", "curriculum", "seed") if k in options}
    return FastDFKD(FastDFKDConfig(**{**SMALL, "student": "convnet_d1_w8_bn", **options}), task(**of_task))


def weights(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_meta_learning_pays():
    """The first loss of a late call is lower than that of the first one: adaptation starts from a better place."""
    found = method(reset_l0=0, adv=0.0, lr_g=5e-3)
    losses: list[torch.Tensor] = []
    found.note_generator = lambda terms, loss: losses.append(loss.detach())
    for call in range(20):
        found.synthesise(call)
    first = torch.stack(losses).view(20, 3)[:, 0]
    assert first[-5:].mean() < first[:5].mean()


@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
def test_meta_step(meta):
    """Adam's first step is lr times the sign of the meta-gradient: of the sum, or of the way back."""
    found = method(meta=meta, reset_l0=0)
    before = weights(found.generator)
    taken: dict[str, torch.Tensor] = {}
    learn = found.learn_to_adapt

    def noting(sums, fast):
        taken["sum"] = torch.cat([s.flatten() for s in sums])
        taken["fast"] = weights(fast)
        learn(sums, fast)

    found.learn_to_adapt = noting
    found.synthesise(0)
    gradient = taken["sum"] if meta == "fomaml" else 67 * (before - taken["fast"])
    clear = gradient.abs() > 1e-3
    step = 3 * 0.02 * gradient.sign()
    torch.testing.assert_close(weights(found.generator)[clear], (before - step)[clear], rtol=1e-3, atol=1e-4)
    assert clear.float().mean() > 0.5


def test_the_meta_generator_is_never_run():
    """Its BatchNorm statistics stay at their start, as in the released code."""
    found = method(images=24)
    list(found.generate())
    for layer in found.generator.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert int(layer.num_batches_tracked) == 0
            assert torch.equal(layer.running_mean, torch.zeros_like(layer.running_mean))
    assert found.snapshot() is None


def test_adversary_starts_at_the_last_call_of_the_warm_up():
    """Published: from epoch >= warmup on, counted from 1, where the student starts after epoch `warmup`."""
    found = method(images=40, warmup=0.6)
    seen, work = [], found.synthesise
    found.synthesise = lambda call: (seen.append((found.learned, found.adversarial_weight(found.epoch))), work(call))[1]
    list(found.generate())
    assert found.warm_calls == 3
    assert [weight for _, weight in seen] == [0, 0, 1.33, 1.33, 1.33]
    assert [learned for learned, _ in seen] == [0, 0, 0, 0, 8]


def test_published_counts():
    """220 calls of 256 images, 20 of them before the student; its rate falls from 0.2 to 2e-4 over 200 epochs."""
    config = FastDFKDConfig()
    found = FastDFKD(
        FastDFKDConfig(student="convnet_d1_w8_bn", nz=4, width=2), task(images=220 * config.synthesis_batch)
    )
    assert (found.calls, found.warm_calls, found.student_steps) == (220, 20, 80_000)
    assert [found._starts_at(call) for call in (0, 19, 20, 21, 219)] == [0, 0, 0, 400, 199 * 400]
    assert found.rate("cosine", config.lr, 0, config.lr_min) == 0.2
    assert found.rate("cosine", config.lr, 200, config.lr_min) == pytest.approx(2e-4)


def test_statistics_are_remembered_from_the_last_batch_of_a_call():
    """The EMA moves once per call: first a copy, then (1 - b) new + b old."""
    found = method(reset_l0=0, adv=0.0)
    batches: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    terms = found.terms

    def noting(*args):
        out = terms(*args)
        batches.append([(mean.detach(), var.detach()) for mean, var in out[1] or []])
        return out

    found.terms = noting
    found.synthesise(0)
    first = [mean for mean, _ in batches[2]]
    assert found.ema.memory is not None
    for (mean, _), expected in zip(found.ema.memory, first, strict=True):
        torch.testing.assert_close(mean, expected)
    found.synthesise(1)
    for (mean, _), old, (new, _) in zip(found.ema.memory, first, batches[5], strict=True):
        torch.testing.assert_close(mean, 0.9 * old + 0.1 * new)


def test_reset_draws_the_first_layers_anew():
    """Released form: the first BatchNorm's weight is about 0 (0.02), where one would expect 1; both are shown."""
    generator = build_generator("small", latent_dim=64, image_size=16, channels=3, width=32, seed=0)
    before = copy.deepcopy(generator)
    reset_first_layers(generator, torch.Generator().manual_seed(1))
    changed = [n for (n, a), b in zip(generator.named_parameters(), before.parameters(), strict=True) if (a != b).any()]
    assert changed == ["project.1.weight", "project.1.bias", "main.0.weight"]
    linear, norm = generator.project[1], generator.main[0]
    assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.05) and not linear.bias.any()
    assert float(norm.weight.detach().abs().mean()) < 0.05
    generator.reset(seed=0)
    assert float(norm.weight.detach().mean()) == pytest.approx(1.0, abs=0.02)


def test_reset_happens_before_its_call():
    found, never = method(images=40), method(images=40, reset_l0=0)
    first: dict[str, list[torch.Tensor]] = {"reset": [], "never": []}
    for name, run in (("reset", found), ("never", never)):
        work = run.synthesise

        def noting(call, work=work, name=name):
            images, labels = work(call)
            first[name].append(images)
            return images, labels

        run.synthesise = noting
        list(run.generate())
    same = [torch.equal(a, b) for a, b in zip(first["reset"], first["never"], strict=True)]
    assert same == [True, True, True, False, False]


def test_curriculum_raises_the_adversary():
    found = method(curriculum=Curriculum.named("ramp-only"), epochs=8, adv=1.0, grad_adv=0.25, warmup=0.0)
    assert [found.adversarial_weight(e) for e in range(8)] == [1, 1, 1, 1, 1.25, 1.5, 1.75, 1.75]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"lr_z": 0.0}, "lr_z must be positive"),
        ({"reset_l0": -1}, "reset_l0 must not be negative"),
        ({"bn_momentum": 1.0}, "bn_momentum must be in"),
        ({"warmup": 1.5}, "warmup must be in"),
    ],
)
def test_settings_out_of_range(settings, what):
    with pytest.raises(ConfigError, match=what):
        FastDFKDConfig(**settings)
