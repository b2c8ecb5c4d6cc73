"""Soft-target under the contract of all synthesis methods, and what its docstring promises."""

from __future__ import annotations

import pytest
import torch
from contract import SynthesizerContract, batches_of, equal_runs
from torch import nn

from synthesis.tiny import MEAN, STD, task, teacher_view
from synthkit.errors import RequirementError
from synthkit.models.build import build_model
from synthkit.synthesis.generator.softtarget import (
    SoftTarget,
    SoftTargetConfig,
    last_convolution,
    soft_target_loss,
)

SMALL = {"epochs": 2, "ep_steps": 6, "batch_size": 16, "synthesis_batch": 10, "g_steps": 3}


class TestSoftTarget(SynthesizerContract):
    name = "softtarget"
    options = {**SMALL, "student": "convnet_d1_w8_bn"}
    engine_options = {**SMALL, "student": "lenet5_half", "augment": "crop"}
    inner = {"synthesise": (2, 3), "learn": (3,)}
    arrivals = (2,)
    safe_points = (3,)
    falling = ("kd",)
    longer = {"epochs": 6, "ep_steps": 20, "lr": 0.05}


def build(warnings: list[str] | None = None, **settings) -> SoftTarget:
    warn = None if warnings is None else warnings.append
    return SoftTarget(
        SoftTargetConfig(**{**SMALL, "student": "convnet_d1_w8_bn", **settings}), task(images=20, warn=warn)
    )


@pytest.mark.parametrize(
    ("name", "layer", "width"),
    [
        ("resnet18", "layer4.1.conv2", 512),
        ("wrn40_2", "block3.layer.5.conv2", 128),
        ("wrn16_1", "block3.layer.1.conv2", 64),
        ("resnet8", "layer3.0.conv2", 64),
        ("vgg8", None, 512),
    ],
)
def test_the_last_convolution_as_wide_as_the_classifier(name, layer, width):
    network = build_model(name, num_classes=10)
    found = last_convolution(network, width)
    if layer is None:  # its last block widens only at the pooling before it: 512 -> 512
        assert found is not None and found.in_channels == found.out_channels == width
    else:
        assert found is dict(network.named_modules())[layer]


def test_a_teacher_without_such_a_convolution_takes_the_classifier_and_says_so():
    """The tiny net's last convolution has 4 input channels, its classifier takes 8 features."""
    said: list[str] = []
    method = build(said)
    assert method.factor.shape == (10, 8) and any("classifier's columns" in text for text in said)
    assert build(layer="classifier").factor.shape == (10, 8)
    with pytest.raises(RequirementError, match="no convolution .*8 features"):
        build(layer="conv")


def test_grouped_convolutions_are_passed_over():
    network = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    assert last_convolution(network, 8) is network[0]


def test_features_have_the_correlation_of_the_columns():
    """Many drawn features: their covariance is the cosine matrix, singular or not."""
    method = build(synthesis_batch=50_000)
    seen: list[torch.Tensor] = []
    method.teacher.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits = method.soft_targets(torch.Generator().manual_seed(0))
    columns = method.teacher.classifier.weight
    cosine = torch.nn.functional.cosine_similarity(columns[:, :, None], columns[:, None, :], dim=0)
    torch.testing.assert_close(torch.cov(seen[0].T), cosine, rtol=0, atol=0.03)
    torch.testing.assert_close(logits, seen[0] @ columns.T + method.teacher.classifier.bias)


def test_the_pixels_are_optimised():
    """What the seed does not do: the loss on the stored images is lower than on the noise they started from."""
    method = build(g_steps=100, a=0.0, jitter=0, flip=False)
    targets = method.soft_targets(method.task.rng("call-0-features"))
    noise = method.to_pixels(method.fresh(0, torch.randn)).detach().clamp(0, 1)
    images, labels = method.synthesise(0)
    assert labels is None
    before, after = (float(soft_target_loss(method.teacher(x), targets, 20.0)) for x in (noise, images))
    assert after < 0.8 * before


def test_clamped_pixels_stay_within_black_and_white_all_along():
    method, extremes = build(lr_g=1.0), []
    honest = method.view
    method.view = lambda pixels, *of: (extremes.append(method.to_pixels(pixels).aminmax()), honest(pixels, *of))[1]
    method.synthesise(0)
    assert all(low > -1e-6 and high < 1 + 1e-6 for low, high in extremes[1:])  # the first is the bare noise
    loose = build(lr_g=1.0, clamp=False, a=1.0)
    loose.view = lambda pixels, *of: (extremes.append(loose.to_pixels(pixels).aminmax()), honest(pixels, *of))[1]
    loose.synthesise(0)
    assert extremes[-1][1] > 1.05


def test_options_change_the_images():
    first = batches_of(build())
    for other in ({"resample": True}, {"a": 0.0}, {"clamp": False, "lr_g": 1.0}, {"flip": False}):
        assert not equal_runs(batches_of(build(**other)), first)


def test_a_view_rolls_and_mirrors_and_nothing_else():
    method = build(jitter=2)
    pixels = torch.arange(10 * 3 * 64, dtype=torch.float32).view(10, 3, 8, 8)
    found = set()
    for iteration in range(60):
        view = method.view(pixels, 0, iteration)
        places = [
            (r, c, m) for r in range(-2, 3) for c in range(-2, 3) for m in (0, 1)
            if torch.equal(view, pixels.roll((r, c), (2, 3)).flip(3) if m else pixels.roll((r, c), (2, 3)))
        ]  # fmt: skip
        assert len(places) == 1
        found.add(places[0])
    assert len(found) > 25 and torch.equal(method.view(pixels, 0, 7), method.view(pixels, 0, 7))


def test_constants_of_the_house_reach_the_pixels():
    method = build()
    x = torch.zeros(1, 3, 2, 2)
    assert torch.allclose(method.to_pixels(x)[0, :, 0, 0], torch.tensor(MEAN))
    assert torch.allclose(method.to_pixels(x + 1)[0, :, 0, 0], torch.tensor(MEAN) + torch.tensor(STD))
    assert teacher_view().mean == MEAN
