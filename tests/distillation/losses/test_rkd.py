"""RKD against the original code's numbers, a naive loop and its invariances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit.distillation.contract import Batch, Taps
from synthkit.distillation.losses.rkd import RKD, angle_loss, distance_loss, relative_distances, rkd_loss
from synthkit.errors import ConfigError

REFERENCE = Path(__file__).parents[2] / "reference"


@pytest.fixture
def golden():
    with np.load(REFERENCE / "rkd.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_equals_the_original_code(golden):
    student = golden["f_s"].requires_grad_()
    close(distance_loss(student, golden["f_t"]).detach(), golden["out_d"])
    close(angle_loss(student, golden["f_t"]).detach(), golden["out_a"])
    total = rkd_loss(student, golden["f_t"])
    close(total.detach(), golden["out_total"])
    close(torch.autograd.grad(total, student)[0], golden["out_grad_f_s"])


@pytest.mark.parametrize("chunk", [1, 250, 640])
def test_chunks_are_the_same_sum(golden, chunk):
    student = golden["f_s"].requires_grad_()
    whole, parts = angle_loss(student, golden["f_t"]), angle_loss(student, golden["f_t"], chunk=chunk)
    close(parts, whole)
    close(torch.autograd.grad(parts, student)[0], torch.autograd.grad(whole, student)[0])
    with torch.no_grad():
        close(angle_loss(student, golden["f_t"], chunk=chunk), whole.detach())


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def test_naive_loop():
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(4, width, dtype=torch.float64, generator=generator) for width in (3, 2))

    def cosine(f, i, j, k):
        a, b = f[j] - f[i], f[k] - f[i]
        norms = float(a.norm() * b.norm())
        return float(a @ b) / norms if norms else 0.0

    def mean_distance(f):
        return sum(float((f[i] - f[j]).norm()) for i in range(4) for j in range(4)) / 12

    pairs = [(i, j) for i in range(4) for j in range(4)]
    means = mean_distance(s), mean_distance(t)
    distance = sum(
        huber(float((s[i] - s[j]).norm()) / means[0] - float((t[i] - t[j]).norm()) / means[1]) for i, j in pairs
    )
    angle = sum(huber(cosine(s, i, j, k) - cosine(t, i, j, k)) for i, j in pairs for k in range(4))
    assert float(distance_loss(s, t)) == pytest.approx(distance / 16, rel=1e-9)
    assert float(angle_loss(s, t)) == pytest.approx(angle / 64, rel=1e-9)


def test_scale_shift_and_rotation_are_not_seen(golden):
    f = golden["f_s"]
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    assert float(rkd_loss(3 * f @ rotation + 7, f)) < 1e-12
    assert float(rkd_loss(f.flip(0), f)) > 0.1


def test_far_from_the_origin_float32_keeps_its_digits(golden):
    exact = relative_distances(golden["f_s"])
    moved = relative_distances((golden["f_s"] + 1000).float())
    assert float((moved - exact).abs().max()) < 2e-3  # the inputs themselves lose 6e-5 each
    squares = (golden["f_s"] + 1000).float()
    gram = squares @ squares.T
    plain = (gram.diag()[:, None] + gram.diag()[None] - 2 * gram).clamp_min(1e-12).sqrt()
    assert float((plain / (plain.sum() / 56) - exact).abs().max()) > 0.02  # the source's form


def test_gradients(golden):
    s, t = golden["f_s"][:4], golden["f_t"][:4]
    assert torch.autograd.gradcheck(lambda x: rkd_loss(x, t), s.clone().requires_grad_())


def test_loss_of_the_table(golden):
    taps = Taps(logits=torch.zeros(8, 2), pooled=golden["f_s"].float().requires_grad_())
    teacher = Taps(logits=torch.zeros(8, 2), pooled=golden["f_t"].float())
    batch = Batch(images=torch.zeros(8, 1, 2, 2))
    found = RKD()(taps, teacher, batch)
    assert sorted(found) == ["rkd_angle", "rkd_distance"]
    assert float(torch.stack(list(found.values())).sum().detach()) == pytest.approx(
        float(golden["out_total"]), rel=1e-4
    )
    assert list(RKD(RKD.Config(angle=0.0))(taps, teacher, batch)) == ["rkd_distance"]
    with torch.autocast("cpu", torch.bfloat16):
        half = RKD()(taps, teacher, batch)
    assert all(torch.equal(half[key], found[key]) for key in found)
    assert RKD.requires.relational
    for values in ({"distance": -1.0}, {"distance": 0.0, "angle": 0.0}):
        with pytest.raises(ConfigError, match="loss.distance"):
            RKD.Config(**values)
