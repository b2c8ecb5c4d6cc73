"""FerKD against a loop; T^2 of KD and soft cross-entropy against the formula and the released values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthkit.distillation.contract import Batch, Taps
from synthkit.distillation.losses.ferkd import FerKD, ferkd_loss
from synthkit.distillation.losses.kd import KD, kd_loss
from synthkit.distillation.losses.soft_ce import SoftCE, soft_ce_loss
from synthkit.errors import ConfigError


def drawn(batch: int = 12, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(0, classes, (batch,), generator=generator)


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(v / temperature) for v in row]
    return [p / sum(powers) for p in powers]


@pytest.mark.parametrize(("below", "above"), [("discard", "label"), ("label", "discard"), ("label", "label")])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_ferkd_is_the_loop(below, above, temperature):
    student, teacher, labels = drawn()
    options = {"low": 0.1, "high": 0.6, "below": below, "above": above, "temperature": temperature, "smoothing": 0.1}
    found = ferkd_loss(student, teacher, labels, **options, reduction="none").tolist()
    regions = set()
    for i, value in enumerate(found):
        sure = softmax(teacher[i].tolist(), 1.0)[int(labels[i])]
        p, q = (softmax(x[i].tolist(), temperature) for x in (teacher, student))
        plain = softmax(student[i].tolist(), 1.0)
        smooth = [0.1 / 5 + 0.9 * (k == int(labels[i])) for k in range(5)]
        hard = -sum(a * math.log(b) for a, b in zip(smooth, plain, strict=True))
        soft = -(temperature**2) * sum(a * math.log(b) for a, b in zip(p, q, strict=True))
        region = "below" if sure < 0.1 else "above" if sure > 0.6 else "between"
        regions.add(region)
        action = {"below": below, "above": above, "between": "soft"}[region]
        assert value == pytest.approx({"discard": 0.0, "label": hard, "soft": soft}[action], rel=1e-12)
    assert regions == {"below", "between", "above"}


def test_ferkd_without_bounds_is_soft_cross_entropy_and_the_bounds_can_take_all():
    student, teacher, labels = drawn()
    assert torch.equal(ferkd_loss(student, teacher, labels, low=0.0, high=1.0), soft_ce_loss(student, teacher))
    nothing = ferkd_loss(student.requires_grad_(), teacher, labels, low=1.0, high=1.0)
    assert float(nothing.detach()) == 0.0
    hard = ferkd_loss(student, teacher, labels, low=0.0, high=0.0)
    wanted = torch.nn.functional.cross_entropy(student, labels)
    assert torch.allclose(hard, wanted, rtol=1e-12)


def test_gradients():
    student, teacher, labels = drawn(6)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ferkd_loss(s, teacher, labels, low=0.1, high=0.6), (student,))
    for loss in (kd_loss, soft_ce_loss):
        assert torch.autograd.gradcheck(lambda s, f=loss: f(s, teacher, temperature=3.0, t_squared=False), (student,))


def test_ferkd_of_the_table():
    student, teacher, labels = drawn()
    loss = FerKD(FerKD.Config(low=0.2, high=0.7))
    assert loss.requires.labels
    batch = Batch(images=torch.zeros(12, 1, 2, 2), labels=labels)
    value = loss(Taps(logits=student), Taps(logits=teacher), batch)["ferkd"]
    assert value.shape == (12,) and float(value.mean()) == pytest.approx(
        float(ferkd_loss(student, teacher, labels, low=0.2, high=0.7))
    )
    refused: list[dict[str, Any]] = [
        {"low": 0.9, "high": 0.1}, {"high": 1.5}, {"temperature": 0}, {"smoothing": 1.0}, {"below": "keep"},
    ]  # fmt: skip
    for wrong in refused:
        with pytest.raises(ConfigError, match="loss"):
            FerKD.Config(**wrong)


@pytest.mark.parametrize(("kind", "function"), [(KD, kd_loss), (SoftCE, soft_ce_loss)])
def test_t_squared_is_a_factor(kind, function):
    student, teacher, _ = drawn()
    batch = Batch(images=torch.zeros(12, 1, 2, 2))
    for temperature in (1.0, 4.0, 20.0):
        both = [
            next(iter(kind(kind.Config(temperature=temperature, t_squared=t))(
                Taps(logits=student), Taps(logits=teacher), batch).values()))
            for t in (True, False)
        ]  # fmt: skip
        assert torch.allclose(both[0], both[1] * temperature**2, rtol=1e-12)
    p, q = [softmax(x[0].tolist(), 20.0) for x in (teacher, student)]
    entropy = -sum(a * math.log(a) for a in p)
    cross = -sum(a * math.log(b) for a, b in zip(p, q, strict=True))
    bare = float(function(student[:1], teacher[:1], temperature=20.0, t_squared=False))
    assert bare == pytest.approx(cross - (entropy if kind is KD else 0.0), rel=1e-9)


def test_the_bare_divergence_is_torchdistills_of_alpha_zero():
    golden = np.load(Path(__file__).parents[2] / "reference" / "kd_torchdistill.npz")
    student, teacher = (torch.from_numpy(golden[k]) for k in ("s", "t"))
    student.requires_grad_()
    value = kd_loss(student, teacher, temperature=4.0, t_squared=False)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(golden["out_a0"]), rel=1e-9)
    assert student.grad is not None
    assert torch.allclose(student.grad, torch.from_numpy(golden["out_grad_s_a0"]), rtol=1e-9, atol=1e-15)
    released = float(kd_loss(student, teacher, temperature=4.0).detach())
    assert released == pytest.approx(16 * float(golden["out_a0"]), rel=1e-9)  # what alpha > 0 would weigh
