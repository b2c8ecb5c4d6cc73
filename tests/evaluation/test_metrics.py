"""Metrics against naive loops; the refusals; what the model looks like afterwards."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from synthkit.data.real import RealData
from synthkit.errors import DataError
from synthkit.evaluation.assignment import best_assignment
from synthkit.evaluation.metrics import evaluate_classifier, expected_calibration_error, matched
from synthkit.models.view import ModelView, TeacherView

NAMES = ["a", "b", "c", "d", "e", "f", "g"]


def data(n: int = 103, classes: int = 7, seed: int = 0, shape=(1, 4, 4), names=None) -> RealData:
    generator = torch.Generator().manual_seed(seed)
    return RealData(
        images=torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8),
        labels=torch.randint(0, classes, (n,), generator=generator),
        class_names=list(names or NAMES[:classes]),
        name="made",
        root="-",
    )


def network(classes: int = 7, seed: int = 0) -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, classes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        net[2].weight.copy_(torch.randn(classes, 16, generator=generator))
        net[2].bias.zero_()
    return net


def view(classes: int = 7, seed: int = 0, names=None, kind=ModelView, size=(1, 4, 4)) -> ModelView:
    return kind(network(classes, seed), [0.4], [0.3], input_size=size, num_classes=classes, class_names=names)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    exps = [math.exp(v - top) for v in row]
    return [v / sum(exps) for v in exps]


def test_everything_against_a_naive_loop():
    labelled, student, teacher = data(), view(names=NAMES), view(seed=1, kind=TeacherView)
    found = evaluate_classifier(student, labelled, teacher=teacher, batch_size=10)
    x = ((labelled.images.double() / 255 - 0.4) / 0.3).flatten(1)
    ours, theirs = ((x @ v.module[2].weight.double().T).tolist() for v in (student, teacher))
    top1 = top5 = nll = kl = agree = teacher_top1 = 0.0
    per_class: dict[str, list[int]] = {name: [] for name in NAMES}
    predicted = dict.fromkeys(NAMES, 0)
    bins: list[list[tuple[float, int]]] = [[] for _ in range(15)]
    for row, other, label in zip(ours, theirs, labelled.labels.tolist(), strict=True):
        p, q = softmax(row), softmax(other)
        best, ranked = row.index(max(row)), sorted(range(7), key=lambda k: -row[k])
        top1 += best == label
        top5 += label in ranked[:5]
        nll -= math.log(p[label])
        kl += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        agree += best == other.index(max(other))
        teacher_top1 += label == other.index(max(other))
        per_class[NAMES[label]].append(best == label)
        predicted[NAMES[best]] += 1
        bins[min(14, math.ceil(p[best] * 15) - 1)].append((p[best], best == label))
    ece = sum(abs(sum(c for c, _ in b) - sum(r for _, r in b)) for b in bins) / 103
    expected = {
        "top1": top1, "top5": top5, "nll": nll, "kl": kl, "agreement": agree, "teacher_top1": teacher_top1,
    }  # fmt: skip
    for key, total in expected.items():
        assert found[key] == pytest.approx(total / 103, abs=2e-5), key
    assert found["ece"] == pytest.approx(ece, abs=1e-5)
    assert found["top1_stderr"] == pytest.approx(math.sqrt(top1 / 103 * (1 - top1 / 103) / 103))
    assert found["per_class"] == {n: pytest.approx(sum(v) / len(v)) for n, v in per_class.items()}
    assert found["predicted"] == predicted and found["n"] == 103 and found["labels"] == "real"
    json.dumps(found)


def test_batch_size_changes_nothing():
    labelled, student = data(), view()
    one, other = (evaluate_classifier(student, labelled, batch_size=size) for size in (7, 103))
    assert one["top1"] == other["top1"] and one["nll"] == pytest.approx(other["nll"], abs=1e-6)


def test_a_class_without_images_is_none_and_few_classes_have_no_top5():
    labelled = data(classes=3)
    labelled.labels[labelled.labels == 1] = 0
    found = evaluate_classifier(view(3), labelled)
    assert found["per_class"]["b"] is None and "top5" not in found and "kl" not in found


def test_perfect_and_hopeless_calibration():
    right = torch.ones(10, dtype=torch.bool)
    assert expected_calibration_error(torch.ones(10), right) == 0
    assert expected_calibration_error(torch.ones(10), ~right) == 1
    # two bins: (0.5, right) and (0.9, wrong): (|1 - .5| + |0 - .9|) / 2
    assert expected_calibration_error(torch.tensor([0.5, 0.9]), torch.tensor([True, False])) == pytest.approx(0.7)
    # the edge 0.2 = 3/15 belongs to the lower bin, with 0.19; their gaps add up there
    edge = expected_calibration_error(torch.tensor([0.2, 0.19], dtype=torch.float64), torch.tensor([True, False]))
    assert edge == pytest.approx(abs(1 - 0.39) / 2)


def test_the_model_is_as_before():
    student = view()
    student.module.train()
    student.module[2].eval()
    weight = student.module[2].weight.clone()
    once, again = (evaluate_classifier(student, data()) for _ in range(2))
    assert once == again  # dropout was off
    assert student.module.training and student.module[1].training and not student.module[2].training
    assert torch.equal(weight, student.module[2].weight) and student.module[2].weight.requires_grad
    assert not student.module._forward_hooks and not student.module[2]._forward_pre_hooks


def test_a_model_that_gives_nan_is_said():
    student = view()
    with torch.no_grad():
        student.module[2].bias.fill_(float("nan"))
    assert any("not finite" in text for text in evaluate_classifier(student, data())["warnings"])


@pytest.mark.parametrize(
    ("student", "labelled", "words"),
    [
        (view(), data(classes=5), "7 classes, the data have 5"),
        (view(), data(shape=(1, 5, 5)), r"images are \(1, 5, 5\), model takes \(1, 4, 4\)"),
        (view(names=NAMES), data(names=NAMES[::-1]), "not in the order of the model's outputs"),
    ],
)
def test_data_that_does_not_fit(student, labelled, words):
    with pytest.raises(DataError, match=words):
        evaluate_classifier(student, labelled)


def test_no_images():
    empty = data()
    empty.images, empty.labels = empty.images[:0], empty.labels[:0]
    with pytest.raises(DataError, match="no images"):
        evaluate_classifier(view(), empty)


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (view(5), "has 5 classes, model model has 7"),
        (view(size=(1, 2, 8)), "same input size"),
        (view(names=NAMES[::-1]), "orders its classes otherwise"),
    ],
)
def test_a_teacher_that_does_not_fit(teacher, words):
    with pytest.raises(DataError, match=words):
        evaluate_classifier(view(names=NAMES), data(), teacher=teacher)


def test_matched_puts_order_and_size_right():
    student, straight = view(names=NAMES), data()
    turned = data(names=NAMES[::-1])
    turned.labels = 6 - straight.labels
    fixed, said = matched(student, turned)
    assert fixed.labels.tolist() == straight.labels.tolist() and "mapped by name" in said[0]
    assert evaluate_classifier(student, fixed)["top1"] == evaluate_classifier(student, straight)["top1"]
    resized, said = matched(student, data(shape=(3, 8, 8)))
    assert resized.shape == (1, 4, 4) and "resized from (3, 8, 8) to (1, 4, 4)" in said[0]
    same, said = matched(student, straight)
    assert same is straight and said == []


def test_data_with_some_of_the_classes():
    some = data(classes=2, names=["g", "c"])
    fixed, _ = matched(view(names=NAMES), some)
    assert set(fixed.labels.tolist()) == {6, 2} and fixed.class_names == NAMES
    assert evaluate_classifier(view(names=NAMES), fixed)["per_class"]["a"] is None


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_assignment_against_all_permutations(size):
    import itertools

    generator = torch.Generator().manual_seed(size)
    for trial in range(30):
        gain = torch.rand(size, size, generator=generator).numpy()
        if trial % 2:
            gain = (gain * 3).round()
        found = best_assignment(gain)
        assert sorted(found) == list(range(size))
        best = max(sum(gain[i, p] for i, p in enumerate(order)) for order in itertools.permutations(range(size)))
        assert sum(gain[i, p] for i, p in enumerate(found)) == pytest.approx(best)
