"""NST against the original code, a naive loop over channel pairs, and its zero."""

from __future__ import annotations

import torch

from distillation.losses.map_cases import close, golden, maps, random_maps, run, taps
from synthkit.distillation.losses.nst import NST, nst_loss


def test_original_code():
    case = golden("nst")
    student, teacher = maps(case, "s", grad=True), maps(case, "t")
    close([nst_loss(s, t).item() for s, t in zip(student, teacher, strict=False)], case["out_each"])
    total = run(NST(), taps(student), taps(teacher))
    assert total.shape == (6,)
    close(total.mean(), case["out_sum"])
    for i, gradient in enumerate(torch.autograd.grad(total.mean(), student)):
        close(gradient, case[f"out_grad_s{i}"])


def test_naive_loop():
    s, t = random_maps((2, 3, 2, 2), (2, 4, 2, 2))
    expected = []
    for i in range(2):
        unit = [[c.flatten() / c.norm() for c in f[i]] for f in (s, t)]

        def kernel(a, b):
            return sum(float(x @ y) ** 2 for x in a for y in b) / (len(a) * len(b))

        expected.append(kernel(unit[1], unit[1]) + kernel(unit[0], unit[0]) - 2 * kernel(*unit))
    close(nst_loss(s, t, reduction="none"), torch.tensor(expected, dtype=torch.float64))


def test_zero_for_the_same_patterns_in_any_order_and_scale():
    (s,) = random_maps((3, 4, 3, 3))
    close(nst_loss(s, 5 * s[:, [2, 0, 3, 1]]), 0.0)
    (other,) = random_maps((3, 6, 3, 3), seed=5)
    assert float(nst_loss(s, other, reduction="none").min()) > 0


def test_gradient():
    (s,) = random_maps((2, 2, 4, 4), grad=True)
    (t,) = random_maps((2, 3, 2, 3), seed=1)
    assert torch.autograd.gradcheck(lambda x: nst_loss(x, t, reduction="none"), s)


def test_autocast_does_not_round_the_products():
    s, t = (f.float() for f in random_maps((4, 6, 8, 8), (4, 6, 8, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nst_loss(s, t)
    assert torch.equal(found, nst_loss(s, t))
