"""The ND loss of KD++ against the original code's numbers, by hand, and its class directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from synthkit.distillation.contract import Batch, Look, Setup, Shapes, Taps
from synthkit.distillation.losses.kdpp import ND, add_to_classes, class_means, nd_loss
from synthkit.errors import ConfigError

REFERENCE = Path(__file__).parents[2] / "reference"


def golden(case: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{case}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def made(*, own: int = 6, width: int = 6, classes: int = 4, bank=None, **options: Any) -> ND:
    torch.manual_seed(0)
    loss = ND(ND.Config(**options))
    classifier = nn.Linear(width, classes).requires_grad_(False)
    setup = Setup(
        student=Shapes(pooled=own),
        teacher=Shapes(pooled=width),
        num_classes=classes,
        batch_size=8,
        epochs=1,
        images=40,
        teacher_classifier=classifier,
    )
    loss.setup(setup)
    assert loss.aux is not None
    torch.testing.assert_close(
        loss.aux.get_buffer("directions"), classifier.weight / classifier.weight.norm(dim=1, keepdim=True)
    )
    if bank is not None:
        loss.prepare(lambda: looks_of(*bank))
    return loss


def looks_of(features: torch.Tensor, labels: torch.Tensor, size: int = 7):
    for start in range(0, len(features), size):
        rows = torch.arange(start, min(start + size, len(features)))
        teacher = Taps(logits=torch.zeros(len(rows), 4), pooled=features[rows])
        yield Look(teacher=teacher, labels=labels[rows], index=rows)


def test_loss_equals_the_original_code():
    case = golden("nd_kdpp")
    assert 0 < int((case["e_s"].norm(dim=1) > case["e_t"].norm(dim=1)).sum()) < 8  # both branches
    student = case["e_s"].clone().requires_grad_()
    loss = 2.0 * nd_loss(student, case["e_t"], case["centers"][case["y"]])
    close(loss.detach(), case["out_nd"])
    close(torch.autograd.grad(loss, student)[0], case["out_grad_e_s"])


def test_transform_equals_the_original_code():
    case = golden("nd_embtrans")
    loss = made(own=64, width=128, classes=5, dropout=0.0)
    assert loss.aux is not None
    assert sum(p.numel() for p in loss.aux.parameters()) == 2 * 64 + 64 * 128 + 128
    transform = loss.aux.get_submodule("transform").double()
    state = {k.removeprefix("fc1."): v for k, v in case.items() if k.startswith("fc1.")}
    transform.load_state_dict(state)
    student = case["e_s"].clone().requires_grad_()
    found = transform(student)
    close(found.detach(), case["out_emb"])
    value = 1.5 * nd_loss(found, case["e_t"], case["centers"][case["y"]])
    close(value.detach(), case["out_nd"])
    close(torch.autograd.grad(value, student)[0], case["out_grad_e_s"])
    for name in ("running_mean", "running_var"):
        close(transform.state_dict()[f"0.{name}"], case[f"out_fc1.0.{name}"])


def test_class_means_equal_the_original_code():
    case = golden("nd_centers")
    results = {}
    for decimals in (None, 4):
        sums, counts = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for start in (0, 13, 26):
            part = slice(start, start + 13 if start < 26 else None)
            add_to_classes(sums, counts, case["feat"][part], case["y"][part], decimals)
        assert torch.equal(counts.long(), torch.bincount(case["y"], minlength=4))
        results[decimals] = class_means(sums, counts, decimals)
    close(results[4], case["out_centers"])
    exact = torch.stack([case["feat"][case["y"] == c].mean(dim=0) for c in range(4)])
    close(results[None], exact)
    assert 0 < float((results[None] - case["out_centers"]).abs().max()) < 1e-4  # what the rounding does


def test_values_by_hand():
    c = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 5.0]], dtype=torch.float64)
    for student, expected in (([3.0, 0.0], 1 - 3 / 5), ([10.0, 0.0], 0.0), ([-6.0, 8.0], 1.6), ([0.0, 0.0], 1.0)):
        found = nd_loss(torch.tensor([student], dtype=torch.float64), teacher, c)
        assert float(found) == pytest.approx(expected, rel=1e-12)
    x = torch.zeros(1, 2, requires_grad=True)
    nd_loss(x, torch.zeros(1, 2), c.float()).backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_gradients():
    case = golden("nd_kdpp")
    directions = case["centers"][case["y"]]
    x = case["e_s"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nd_loss(x, case["e_t"], directions, reduction="none"), x)


def test_directions_come_from_the_bank():
    torch.manual_seed(1)
    features, labels = torch.randn(40, 6) + 1, torch.randint(0, 3, (40,))  # class 3 has no image
    before = made().aux
    loss = made(bank=(features, labels))
    assert loss.aux is not None and before is not None
    found = loss.aux.get_buffer("directions")
    for c in range(3):
        mean = features[labels == c].mean(dim=0)
        torch.testing.assert_close(found[c], mean / mean.norm())
    assert torch.equal(found[3], before.get_buffer("directions")[3])
    kept = made(bank=(features, labels), centers="classifier").aux
    assert kept is not None and torch.equal(kept.get_buffer("directions"), before.get_buffer("directions"))
    student, teacher = torch.randn(8, 6, requires_grad=True), torch.randn(8, 6)
    batch = Batch(images=torch.zeros(8, 1, 2, 2), labels=labels[:8])
    logits = torch.zeros(8, 4)
    value = loss(Taps(logits=logits, pooled=student), Taps(logits=logits, pooled=teacher), batch)["nd"]
    torch.testing.assert_close(value, nd_loss(student, teacher, found[labels[:8]], reduction="none"))
    again = made()
    assert again.aux is not None
    again.aux.load_state_dict(loss.aux.state_dict())  # a resumed run does not prepare
    assert torch.equal(again.aux.get_buffer("directions"), found)


def test_widths_may_differ():
    loss = made(own=5)
    student = torch.randn(8, 5, requires_grad=True)
    logits = torch.zeros(8, 4)
    batch = Batch(images=torch.zeros(8, 1, 2, 2), labels=torch.arange(8) % 4)
    value = loss(Taps(logits=logits, pooled=student), Taps(logits=logits, pooled=torch.randn(8, 6)), batch)["nd"]
    assert value.shape == (8,)
    value.mean().backward()
    assert loss.aux is not None and all(p.grad is not None for p in loss.aux.parameters())
    assert student.grad is not None and float(student.grad.abs().sum()) > 0


def test_bad_options_are_refused():
    options: list[dict[str, Any]] = [{"centers": "real"}, {"dropout": 1.0}]
    for bad in options:
        with pytest.raises(ConfigError, match=f"loss.{next(iter(bad))}"):
            ND.Config(**bad)
    setup = Setup(
        student=Shapes(pooled=6),
        teacher=Shapes(pooled=6),
        num_classes=4,
        batch_size=8,
        epochs=1,
        images=40,
        teacher_classifier=nn.Linear(6, 5),
    )
    with pytest.raises(ConfigError, match="nd: the teacher's classifier"):
        ND().setup(setup)
