"""VID against the original code, the normal density, and mdistiller's untrained scales."""

from __future__ import annotations

import math

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
    taps,
)
from synthkit.distillation.losses.vid import VID, vid_loss
from synthkit.errors import ConfigError


def test_original_code():
    case = golden("vid")
    student, teacher = maps(case, "s", grad=True), maps(case, "t")
    loss = build(VID(), taps(student), taps(teacher))
    for scale in loss.aux["scales"]:
        close(scale, torch.full_like(scale, float(case["out_init_log_scale"])), rtol=1e-6)  # drawn in float32
    for i in range(3):
        fill(loss.aux, case, {f"means.{i}": f"vid{i}.regressor"})
        loss.aux["scales"][i].data.copy_(case[f"vid{i}.log_scale"])
    total = run(loss, taps(student), taps(teacher))
    assert total.shape == (6,)
    close(total.mean(), case["out_sum"])
    scales = list(loss.aux["scales"])
    found = torch.autograd.grad(total.mean(), [*student, *scales, loss.aux["means"][0][0].weight], retain_graph=True)
    for i in range(3):
        close(found[i], case[f"out_grad_s{i}"])
        close(found[3 + i], case[f"out_grad_rho{i}"])
    close(found[6], case["out_grad_w0"])
    each = []
    for i in range(3):
        one = build(VID(), taps(student[i : i + 1]), taps(teacher[i : i + 1]))
        fill(one.aux, case, {"means.0": f"vid{i}.regressor"})
        one.aux["scales"][0].data.copy_(case[f"vid{i}.log_scale"])
        each.append(run(one, taps(student[i : i + 1]), taps(teacher[i : i + 1])).mean().item())
    close(each, case["out_each"])


def test_it_is_the_normal_likelihood():
    mean, teacher = random_maps((3, 2, 2, 2), (3, 2, 2, 2))
    scale = torch.tensor([0.3, -1.0], dtype=torch.float64)
    spread = (torch.log1p(scale.exp()) + 1e-5).sqrt().view(1, 2, 1, 1)
    log_p = torch.distributions.Normal(mean, spread).log_prob(teacher)
    close(vid_loss(mean, teacher, scale) + 0.5 * math.log(2 * math.pi), -log_p.mean())


def test_the_best_variance_is_the_mean_squared_error():
    """At v = mean squared error per channel the scale has no gradient."""
    mean, teacher = random_maps((3, 2, 4, 4), (3, 2, 4, 4))
    best = (mean - teacher).square().mean(dim=(0, 2, 3)) - 1e-5
    scale = torch.log(torch.expm1(best)).requires_grad_()
    (gradient,) = torch.autograd.grad(vid_loss(mean, teacher, scale), scale)
    close(gradient, torch.zeros(2, dtype=torch.float64), atol=1e-12)


def test_gradient_and_large_scales():
    mean, scale = random_maps((2, 2, 2, 2), (2,), grad=True)
    (t,) = random_maps((2, 2, 2, 2), seed=1)
    assert torch.autograd.gradcheck(lambda m, r: vid_loss(m, t, r, reduction="none"), (mean, scale))
    big = torch.full((2,), 1000.0, requires_grad=True)  # log(1 + exp) of it is infinite in the original
    loss = vid_loss(mean.detach().float(), t.float(), big)
    loss.backward()
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(big.grad).all())


def test_parameters_and_trained_scales():
    student, teacher = random_maps((4, 3, 4, 4), (4, 5, 2, 2)), random_maps((4, 6, 4, 4), (4, 7, 4, 4), seed=1)
    for train in (True, False):
        loss = build(VID(VID.Config(train_scale=train)), taps(student), taps(teacher))
        assert count(loss.aux) == sum(s * t + 2 * t * t + t for s, t in ((3, 6), (5, 7)))
        learning = [p for p in loss.aux.parameters() if p.requires_grad]
        values = []
        for _ in range(3):
            value = run(loss, taps(student), taps(teacher)).mean()
            for p, g in zip(learning, torch.autograd.grad(value, learning), strict=True):
                p.data -= 0.3 * g
            values.append(value.item())
        assert values[-1] < values[0]
        variances = torch.nn.functional.softplus(torch.cat(list(loss.aux["scales"])).detach()) + 1e-5
        moved = (variances - 5).abs().max().item()
        # RepDistiller learns the variances (below 5 for unit maps), mdistiller leaves them at 5
        assert (moved > 0.01 and bool((variances < 5).all())) if train else moved < 1e-5


def test_set_up():
    (f,) = random_maps((4, 2, 4, 4))
    check_reproducible(VID, taps([f]), taps([f]))
    with pytest.raises(ConfigError, match="loss.variance"):
        VID.Config(variance=0.0)
