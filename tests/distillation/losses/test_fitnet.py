"""FitNet against the original code for every pair of sizes, and its choice of the layer."""

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
    random_maps,
    run,
    taps,
)
from synthkit.distillation.losses.fitnet import FitNet, hint_loss
from synthkit.distillation.losses.maps import pool_to_smaller, regressor
from synthkit.errors import ConfigError

CASES = ["fitnet_down2", "fitnet_up2", "fitnet_equal", "fitnet_valid", "fitnet_simkd_small"]


@pytest.mark.parametrize("name", CASES)
def test_original_code(name):
    case = golden(name)
    student = case["f_s"].clone().requires_grad_()
    loss = build(FitNet(FitNet.Config(layer=0)), taps([student]), taps([case["f_t"]]))
    fill(loss.aux, case, {"0": "reg.conv", "1": "reg.bn"})
    values = run(loss, taps([student]), taps([case["f_t"]]))
    assert values.shape == (6,)
    close(values.mean(), case["out_loss"])
    found = torch.autograd.grad(values.mean(), [student, loss.aux[0].weight])
    close(found[0], case["out_grad_f_s"])
    close(found[1], case["out_grad_conv_weight"])
    for buffer in ("running_mean", "running_var"):
        close(getattr(loss.aux[1], buffer), case[f"out_reg.bn.{buffer}"])
    close(loss.aux(student), case["out_reg"])
    close(pool_to_smaller(case["out_reg"], case["f_t"])[1], case.get("out_target", case["f_t"]))


def test_regressors_by_size():
    """(student, teacher) -> kernel, stride, parameters counted by hand: kernel, bias, BatchNorm's two."""
    for s, t, kernel, stride in (
        ((4, 8, 8), (6, 4, 4), (3, 3), (2, 2)),
        ((4, 4, 4), (6, 8, 8), (4, 4), (2, 2)),
        ((4, 8, 8), (6, 8, 8), (1, 1), (1, 1)),
        ((4, 32, 32), (6, 8, 8), (25, 25), (1, 1)),
        ((4, 7, 8), (6, 5, 8), (3, 1), (1, 1)),  # unequal sides
        ((4, 3, 3), (6, 7, 7), (3, 3), (1, 1)),  # RepDistiller has none here
        ((4, 8, 3), (6, 4, 6), (3, 3), (1, 1)),
    ):
        made = regressor(s, t)
        assert (made[0].kernel_size, made[0].stride) == (kernel, stride)
        assert count(made) == 4 * 6 * kernel[0] * kernel[1] + 6 + 2 * 6
        out = made(torch.zeros(2, *s))
        fits = pool_to_smaller(out, torch.zeros(2, *t))
        assert fits[0].shape == fits[1].shape
        if s[1:] != (3, 3) and s[1:] != (8, 3):
            assert tuple(out.shape[1:]) == t


@pytest.mark.parametrize(("layer", "used"), [(0, 0), (1, 1), (-1, 2)])
def test_layer(layer, used):
    student = random_maps((4, 2, 8, 8), (4, 3, 4, 4), (4, 5, 2, 2), grad=True)
    teacher = random_maps((4, 2, 8, 8), (4, 4, 4, 4), (4, 6, 2, 2), seed=1)
    loss = build(FitNet(FitNet.Config(layer=layer)), taps(student), taps(teacher))
    run(loss, taps(student), taps(teacher)).mean().backward()
    assert [f.grad is not None for f in student] == [i == used for i in range(3)]
    assert all(p.grad is not None for p in loss.aux.parameters())


def test_a_layer_that_is_not_there_is_refused():
    (two,) = random_maps((4, 2, 8, 8))
    for layer in (2, -3):
        with pytest.raises(ConfigError, match=r"the teacher has 2 tapped maps; got -?\d; give one of 0 to 1"):
            build(FitNet(FitNet.Config(layer=layer)), taps([two] * 3), taps([two] * 2))


def test_weights_depend_on_the_seed_alone():
    (f,) = random_maps((4, 2, 4, 4))
    check_reproducible(lambda: FitNet(FitNet.Config(layer=0)), taps([f]), taps([f]))


def test_hint_loss():
    (s,) = random_maps((2, 3, 4, 4), grad=True)
    (t,) = random_maps((2, 3, 2, 2), seed=1)
    assert torch.autograd.gradcheck(lambda x: hint_loss(x, t, reduction="none"), s)
    close(hint_loss(t + 2, t, reduction="none"), torch.full((2,), 4.0, dtype=torch.float64))
    close(hint_loss(s, t), torch.nn.functional.mse_loss(torch.nn.functional.avg_pool2d(s, 2), t))
