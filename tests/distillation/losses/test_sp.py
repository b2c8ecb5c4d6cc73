"""SP against the original code, a naive loop, and its invariances."""

from __future__ import annotations

import torch

from distillation.losses.map_cases import close, golden, random_maps, run, taps
from synthkit.distillation.losses.sp import SP, sp_loss


def test_original_code():
    case = golden("sp")
    student = case["f_s"].clone().requires_grad_()
    (first,) = random_maps((8, 2, 8, 8))
    found = run(SP(), taps([first, student]), taps([first, first, case["f_t"]]))  # the last maps count
    close(found, case["out_loss"])
    close(torch.autograd.grad(found, student)[0], case["out_grad_f_s"])


def test_naive_loop():
    s, t = random_maps((4, 2, 2, 2), (4, 3, 1, 1))
    total = 0.0
    for i in range(4):
        rows = []
        for f in (s, t):
            row = [float((f[i] * f[j]).sum()) for j in range(4)]
            norm = sum(x * x for x in row) ** 0.5
            rows.append([x / norm for x in row])
        total += sum((a - b) ** 2 for a, b in zip(*rows, strict=True))
    close(sp_loss(s, t), total / 16)


def test_relations_only():
    s, t = random_maps((5, 3, 2, 2), (5, 4, 2, 2))
    close(sp_loss(3 * s, 0.5 * t), sp_loss(s, t))
    close(sp_loss(s, -s), 0.0)
    order = torch.tensor([3, 1, 4, 0, 2])
    close(sp_loss(s[order], t[order]), sp_loss(s, t))
    assert float((sp_loss(s[order], t) - sp_loss(s, t)).abs()) > 1e-4
    assert SP.requires.relational  # so the whole global batch is compared


def test_gradient():
    (s,) = random_maps((4, 2, 2, 2), grad=True)
    (t,) = random_maps((4, 3, 3, 3), seed=1)
    assert torch.autograd.gradcheck(lambda x: sp_loss(x, t), s)


def test_autocast_does_not_round_the_products():
    s, t = (f.float() for f in random_maps((6, 4, 4, 4), (6, 4, 4, 4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sp_loss(s, t)
    assert torch.equal(found, sp_loss(s, t))
