"""ReviewKD against the original code, the pooled sizes by hand, and its fusions."""

from __future__ import annotations

import pytest
import torch

from distillation.losses.map_cases import (
    build,
    check_reproducible,
    close,
    count,
    fill,
    golden,
    maps,
    random_maps,
    run,
)
from synthkit.distillation.contract import Taps
from synthkit.distillation.losses.reviewkd import ReviewKD, fuse, hcl_loss
from synthkit.errors import ConfigError

F = torch.nn.functional
NAMES = {"reduce": "conv1", "out": "conv2", "attend": "att_conv"}


def networks(student, teacher, pooled):
    logits = torch.zeros(len(student[0]), 3)
    return Taps(logits=logits, maps=student, pooled=pooled[0]), Taps(logits=logits, preact=teacher, pooled=pooled[1])


def test_original_code():
    case = golden("reviewkd")
    student, teacher = maps(case, "sf", grad=True), maps(case, "tf")
    pooled = case["sp"].clone().requires_grad_()
    s, t = networks(student[1:], teacher[1:], (pooled, case["tp"]))  # taps hold no stem
    loss = build(ReviewKD(), s, t)
    for i, level in enumerate(loss.aux):
        fill(level, case, {own: f"abfs.{i}.{theirs}" for own, theirs in NAMES.items() if i or own != "attend"})
    values = run(loss, s, t)
    assert values.shape == (6,)
    ramp = min(10 / 20, 1.0)  # the case's epoch; here a schedule of the sum of losses
    close(ramp * values.mean(), case["out_loss_kd"])
    found = torch.autograd.grad(ramp * values.mean(), [pooled, *student[1:]])
    close(found[0], case["out_grad_sp"])
    for i in (1, 2, 3):
        close(found[i], case[f"out_grad_sf{i}"])
    assert not case["out_grad_sf0"].any()  # the stem is not used there either
    deeper = None
    features = [pooled[:, :, None, None], *reversed(student[1:])]
    for i, (level, feature) in enumerate(zip(loss.aux, features, strict=True)):
        expected = case[f"out_res{3 - i}"]
        out, deeper = fuse(level, feature, deeper, expected.shape[2:])
        close(out, expected)


def test_a_stem_changes_nothing_because_stages_meet_at_the_end():
    student, teacher = random_maps((4, 2, 8, 8), (4, 3, 4, 4)), random_maps((4, 4, 8, 8), (4, 5, 4, 4), seed=1)
    pooled = random_maps((4, 3), (4, 5), seed=2)
    with_stem = networks([random_maps((4, 2, 8, 8), seed=3)[0], *student], teacher, pooled)
    without = networks(student, teacher, pooled)
    close(run(build(ReviewKD(), *with_stem), *with_stem), run(build(ReviewKD(), *without), *without).detach())


def test_hcl_original_code():
    case = golden("reviewkd_hcl")
    student, teacher = maps(case, "s", grad=True), maps(case, "t")
    values = [hcl_loss(s, t) for s, t in zip(student, teacher, strict=True)]
    close([v.item() for v in values], case["out_each"])
    for i, gradient in enumerate(torch.autograd.grad(sum(values), student)):
        close(gradient, case[f"out_grad_s{i}"])


@pytest.mark.parametrize(
    ("side", "weights"),
    [
        (8, {8: 1, 4: 1 / 2, 2: 1 / 4, 1: 1 / 8}),
        (4, {4: 1, 2: 1 / 2, 1: 1 / 4}),  # the weight halves per size that is used
        (3, {3: 1, 2: 1 / 2, 1: 1 / 4}),
        (2, {2: 1, 1: 1 / 2}),
        (1, {1: 1}),
    ],
)
def test_hcl_naive(side, weights):
    s, t = random_maps((3, 2, side, side), (3, 2, side, side))
    expected = torch.zeros(3, dtype=torch.float64)
    for size, weight in weights.items():
        error = F.adaptive_avg_pool2d(s, size) - F.adaptive_avg_pool2d(t, size)
        expected += weight * error.square().mean(dim=(1, 2, 3)) / sum(weights.values())
    close(hcl_loss(s, t, reduction="none"), expected)
    close(hcl_loss(s, t), expected.mean())


def test_gradients():
    s, t = random_maps((2, 2, 5, 6), (2, 2, 5, 6))
    assert torch.autograd.gradcheck(lambda x: hcl_loss(x, t, reduction="none"), s.requires_grad_())
    close(hcl_loss(t, t), 0.0)


def test_parameters_and_widths():
    student, teacher = random_maps((4, 2, 8, 8), (4, 6, 4, 4)), random_maps((4, 3, 9, 9), (4, 5, 6, 6), seed=1)
    s, t = networks(student, teacher, random_maps((4, 6), (4, 7), seed=2))
    for middle, width in ((512, 6), (4, 4)):
        loss = build(ReviewKD(ReviewKD.Config(middle=middle)), s, t)
        expected = [a * width + 2 * width + 9 * width * b + 2 * b for a, b in ((6, 7), (6, 5), (2, 3))]
        attention = 2 * width * 2 + 2
        assert [count(level) for level in loss.aux] == [expected[0], expected[1] + attention, expected[2] + attention]
        assert run(loss, s, t).shape == (4,)
    check_reproducible(ReviewKD, s, t)
    with pytest.raises(ConfigError, match="loss.middle"):
        ReviewKD.Config(middle=0)
