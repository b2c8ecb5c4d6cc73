"""Agreement with the teacher on a synthetic bank."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from synthkit.bank import Bank, BankSpec, BankWriter
from synthkit.bank.make import bank_from_arrays
from synthkit.errors import DataError
from synthkit.evaluation.fidelity import WHAT, evaluate_fidelity
from synthkit.models.view import ModelView

NAMES = ["a", "b", "c"]


def view(seed: int, classes: int = 3, size=(1, 4, 4), names=None) -> ModelView:
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(size), classes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return ModelView(net, [0.5], [0.25], input_size=size, num_classes=classes, class_names=names)


@pytest.fixture
def bank(tmp_path) -> Bank:
    return make_bank(tmp_path / "bank", logits=True)


def make_bank(path, *, logits: bool, shape=(1, 4, 4), classes: int = 3) -> Bank:
    names = NAMES if classes == 3 else None
    spec = BankSpec(
        shape=shape, num_classes=classes, class_names=names, mean=[0.5], std=[0.25], images=40, images_per_shard=25
    )
    writer = BankWriter.create(path, spec)
    rng = np.random.default_rng(0)
    for i, n in ((0, 25), (1, 15)):
        arrays = {
            "images": rng.integers(0, 256, (n, *shape), dtype=np.uint8),
            "labels": rng.integers(0, classes, n).astype(np.int32),
        }
        if logits:
            arrays["logits"] = rng.normal(size=(n, classes)).astype(np.float16)
        writer.write_shard(i, arrays, {})
    return Bank(path)


def naive(ours, theirs) -> tuple[float, float]:
    """(agreement, KL) by plain loops."""
    same = total = 0.0
    for row, other in zip(ours, theirs, strict=True):
        p, q = ([math.exp(v) / sum(math.exp(w) for w in r) for v in r] for r in (row, other))
        same += row.index(max(row)) == other.index(max(other))
        total += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    return same / len(ours), total / len(ours)


def logits_of(model: ModelView, bank: Bank, rows) -> list[list[float]]:
    with torch.no_grad():
        return model(torch.from_numpy(bank.batch(rows).images)).double().tolist()


@pytest.mark.parametrize("rows", [None, np.array([3, 30, 7, 39])])
def test_live_teacher(bank, rows):
    student, teacher = view(0), view(1)
    found = evaluate_fidelity(student, bank, teacher=teacher, indices=rows, batch_size=7)
    used = np.arange(40) if rows is None else rows
    agreement, kl = naive(logits_of(student, bank, used), logits_of(teacher, bank, used))
    assert found["what"] == WHAT == "agreement on synthetic bank (no real labels)"
    assert found["n"] == len(used) and found["teacher_logits"] == "live"
    assert found["agreement"] == pytest.approx(agreement) and found["kl"] == pytest.approx(kl, abs=1e-5)
    assert sum(found["predicted"].values()) == sum(found["teacher_predicted"].values()) == len(used)
    assert "top1" not in found


def test_stored_logits(bank):
    student = view(0)
    found = evaluate_fidelity(student, bank, batch_size=16)
    stored = bank.column("logits").astype(np.float64).tolist()
    agreement, kl = naive(logits_of(student, bank, np.arange(40)), stored)
    assert found["teacher_logits"] == "stored"
    assert found["agreement"] == pytest.approx(agreement) and found["kl"] == pytest.approx(kl, abs=1e-5)
    teacher_classes = [row.index(max(row)) for row in stored]
    assert found["teacher_predicted"] == {name: teacher_classes.count(i) for i, name in enumerate(NAMES)}


def test_a_student_agrees_with_itself(bank):
    found = evaluate_fidelity(view(0), bank, teacher=view(0))
    assert found["agreement"] == 1 and found["kl"] == pytest.approx(0, abs=1e-9)


def test_classes_that_the_teacher_never_names_are_said(bank):
    teacher = view(1)
    with torch.no_grad():
        teacher.module[1].bias[2] = -1e4
    found = evaluate_fidelity(view(0), bank, teacher=teacher)
    assert found["per_class"]["c"] is None and "names no image c" in found["warnings"][0]


def test_refusals(bank, tmp_path):
    bare = make_bank(tmp_path / "bare", logits=False)
    with pytest.raises(DataError, match="no teacher logits; name the teacher"):
        evaluate_fidelity(view(0), bare)
    with pytest.raises(DataError, match="has 3 classes, model model has 4"):
        evaluate_fidelity(view(0, classes=4), bank)
    with pytest.raises(DataError, match=r"images of \(1, 4, 4\)"):
        evaluate_fidelity(view(0, size=(1, 2, 8)), bank)
    with pytest.raises(DataError, match="teacher model has 4 classes"):
        evaluate_fidelity(view(0), bank, teacher=view(0, classes=4))
    with pytest.raises(DataError, match="no image to compare on"):
        evaluate_fidelity(view(0), bank, indices=np.array([], dtype=np.int64))


def test_a_bank_with_real_images_is_not_called_synthetic(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 4, 4), dtype=np.uint8)
    real = bank_from_arrays(tmp_path / "b", images, np.zeros(12, int), num_classes=3, mean=[0.5], std=[0.2],
                            label_kind="argmax", contains_real=True)  # fmt: skip
    found = evaluate_fidelity(view(0), real, teacher=view(1))
    assert "contains real images" in found["what"] and "synthetic" not in found["what"]
