"""AB against the original code, the hinge by hand, and its connectors."""

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
    taps,
)
from synthkit.distillation.losses.ab import AB, boundary_loss
from synthkit.errors import ConfigError


def test_original_code():
    case = golden("ab")
    student, teacher = maps(case, "s", grad=True), maps(case, "t")
    s, t = taps(student, kind="preact"), taps(teacher, kind="preact")
    loss = build(AB(), s, t)
    for i in (1, 2):
        fill(loss.aux, case, {f"{i}.0": f"conn.connectors.{i}.conv", f"{i}.1": f"conn.connectors.{i}.bn"})
    each = [boundary_loss(loss.aux[i](student[i]), teacher[i]).item() * 2 ** (i - 2) * 0.003 for i in range(3)]
    close(each, case["out_each"])
    total = run(loss, s, t)
    assert total.shape == (6,)
    close(total.mean(), case["out_sum"])
    for i, gradient in enumerate(torch.autograd.grad(total.mean(), student)):
        close(gradient, case[f"out_grad_s{i}"])


@pytest.mark.parametrize("margin", [1.0, 0.5])
def test_naive_loop(margin):
    s, t = random_maps((3, 2, 2, 2), (3, 2, 2, 2))
    expected = []
    for a, b in zip(s.flatten(1).tolist(), t.flatten(1).tolist(), strict=True):
        total = 0.0
        for x, y in zip(a, b, strict=True):
            if y > 0 and x <= margin:
                total += (x - margin) ** 2
            if y <= 0 and x > -margin:
                total += (x + margin) ** 2
        expected.append(total)
    close(boundary_loss(s, t, margin=margin, reduction="none"), torch.tensor(expected, dtype=torch.float64))


def test_only_the_teachers_signs_count():
    s, t = random_maps((3, 2, 3, 3), (3, 2, 3, 3))
    close(boundary_loss(s, t), boundary_loss(s, 100 * t.sign()))
    close(boundary_loss(1.5 * t.sign(), t), 0.0)  # every neuron beyond the margin on the right side


def test_gradient():
    (s,) = random_maps((2, 2, 4, 4), grad=True)
    (t,) = random_maps((2, 2, 2, 2), seed=1)
    assert torch.autograd.gradcheck(lambda x: boundary_loss(x, t, reduction="none"), s)


def test_connectors():
    student = random_maps((4, 3, 8, 8), (4, 4, 4, 4), (4, 5, 3, 3))
    teacher = random_maps((4, 3, 8, 8), (4, 6, 4, 4), (4, 7, 7, 7), seed=1)
    s, t = taps(student, kind="preact"), taps(teacher, kind="preact")
    loss = build(AB(), s, t)
    assert [count(c) for c in loss.aux] == [0, 4 * 6 + 6 + 2 * 6, 5 * 7 * 9 + 7 + 2 * 7]
    assert not any(isinstance(m, torch.nn.ReLU) for m in loss.aux.modules())  # signs must stay
    assert run(loss, s, t).shape == (4,)  # RepDistiller refuses 3 x 3 to 7 x 7
    check_reproducible(AB, s, t)
    with pytest.raises(ConfigError, match="loss.margin"):
        AB.Config(margin=-1.0)
