"""Attention transfer against the original code, a naive loop, and what it must not see."""

from __future__ import annotations

import pytest
import torch

from distillation.losses.map_cases import close, golden, maps, random_maps, run, taps
from synthkit.distillation.losses.at import AT, at_loss
from synthkit.errors import ConfigError


def test_original_code():
    case = golden("at")
    student, teacher = maps(case, "s", grad=True), maps(case, "t")
    assert (len(student), len(teacher)) == (3, 4)  # paired from the start, the last of the teacher is left out
    close([at_loss(s, t).item() for s, t in zip(student, teacher, strict=False)], case["out_each"])
    total = run(AT(), taps(student), taps(teacher))
    assert total.shape == (6,)
    close(total.mean(), case["out_sum"])
    for i, gradient in enumerate(torch.autograd.grad(total.mean(), student)):
        close(gradient, case[f"out_grad_s{i}"])


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_naive_loop(power):
    s, t = random_maps((2, 3, 4, 4), (2, 5, 2, 2))
    expected = []
    for i in range(2):
        vectors = []
        for f, step in ((s, 2), (t, 1)):
            q = torch.zeros(2, 2, dtype=torch.float64)
            for y in range(2):
                for x in range(2):
                    cell = f[i, :, step * y : step * (y + 1), step * x : step * (x + 1)].mean(dim=(1, 2))
                    q[y, x] = sum(abs(float(v)) ** power for v in cell) / len(cell)
            vectors.append(q / float((q * q).sum()) ** 0.5)
        expected.append(float(((vectors[0] - vectors[1]) ** 2).mean()))
    close(at_loss(s, t, power=power, reduction="none"), torch.tensor(expected, dtype=torch.float64))


def test_scale_and_sign_of_the_maps_do_not_matter():
    s, t = random_maps((3, 4, 5, 5), (3, 2, 5, 5))
    close(at_loss(-7 * s, 0.1 * t), at_loss(s, t))
    close(at_loss(s, -2 * s), 0.0)


def test_unequal_sides_and_gradient():
    (s,) = random_maps((2, 2, 3, 4), grad=True)
    (t,) = random_maps((2, 3, 4, 2), seed=1)
    assert torch.autograd.gradcheck(lambda x: at_loss(x, t, reduction="none"), s)


def test_half_precision_is_summed_in_single():
    s, t = (f.bfloat16() for f in random_maps((2, 4, 8, 8), (2, 4, 8, 8)))
    close(at_loss(s, t), at_loss(s.float(), t.float()), rtol=1e-6)
    assert at_loss(s, t).dtype == torch.float32


def test_bad_power_is_refused():
    for value in (0.0, 0.5, float("nan")):  # below 1 zeros have no finite gradient
        with pytest.raises(ConfigError, match="loss.power"):
            AT.Config(power=value)
    zeros = torch.zeros(2, 3, 2, 2, requires_grad=True)
    at_loss(zeros, torch.ones(2, 3, 2, 2), power=1.0).backward()
    assert zeros.grad is not None and bool(torch.isfinite(zeros.grad).all())
