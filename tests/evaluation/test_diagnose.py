"""The classic mistakes are found with a tiny trained model, and honest models are left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synthkit.data.real import RealData
from synthkit.data.stats import STATS
from synthkit.evaluation.diagnose import paired_sigmas, permuted_classes, wrong_normalisation
from synthkit.evaluation.metrics import evaluate_classifier
from synthkit.models.view import ModelView

NAMES = ["wolf", "ant", "owl", "cat", "bee"]


def shades(n: int, seed: int) -> RealData:
    """Five classes told apart by brightness, so that normalisation matters."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (n,), generator=generator)
    noise = torch.randn(n, 3, 4, 4, generator=generator) * 12
    images = (25 + 50 * labels.view(-1, 1, 1, 1) + noise).clamp(0, 255).to(torch.uint8)
    return RealData(images=images, labels=labels, class_names=NAMES, name="shades", root="-")


def make_view(module: nn.Module, statistics: str) -> ModelView:
    mean, std = STATS[statistics]
    return ModelView(module, mean, std, input_size=(3, 4, 4), num_classes=5, class_names=NAMES)


@pytest.fixture(scope="module")
def trained() -> ModelView:
    data = shades(600, 0)
    generator = torch.Generator().manual_seed(1)
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 5))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    view = make_view(module, "cifar10")
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(view(data.images), data.labels).backward()
        optimizer.step()
    return view


def test_an_honest_model_gets_no_warning(trained):
    test = shades(500, 2)
    found = evaluate_classifier(trained, test)
    assert found["top1"] > 0.95 and found["warnings"] == []
    assert wrong_normalisation(trained, test) is None


@pytest.mark.parametrize("used", ["half", "none"])
def test_wrong_normalisation_is_named(trained, used):
    test = shades(800, 2)
    view = make_view(trained.module, used)
    before = evaluate_classifier(view, test)["top1"]
    warning = wrong_normalisation(view, test)
    assert before < 0.9
    assert warning is not None and "normalisation looks wrong" in warning
    named = warning.split("with '")[1].split("'")[0]
    assert named in ("cifar10", "cifar100", "imagenet", "tiny-imagenet")
    assert evaluate_classifier(make_view(trained.module, named), test)["top1"] > before + 0.03


def test_the_view_is_not_changed_by_the_search(trained):
    mean = list(trained.mean)
    wrong_normalisation(trained, shades(100, 2))
    assert trained.mean == mean


def test_permuted_classes_are_named(trained):
    test = shades(500, 2)
    order = [1, 2, 0, 3, 4]  # the data call class i what the model calls order[i]
    found = evaluate_classifier(trained, test.relabelled(order, NAMES))
    assert found["top1"] < 0.5
    (warning,) = found["warnings"]
    assert "class order looks permuted" in warning
    assert "0 (wolf) is ant, 1 (ant) is owl, 2 (owl) is wolf" in warning and "3 (cat)" not in warning


def test_two_swapped_classes_are_found(trained):
    (warning,) = evaluate_classifier(trained, shades(500, 2).relabelled([0, 1, 2, 4, 3], NAMES))["warnings"]
    assert "3 (cat) is bee, 4 (bee) is cat" in warning


def test_alphabetical_order_is_recognised(trained):
    alphabet = sorted(range(5), key=lambda i: NAMES[i])
    for order in (alphabet, [alphabet.index(i) for i in range(5)]):
        (warning,) = evaluate_classifier(trained, shades(500, 2).relabelled(order, NAMES))["warnings"]
        assert "alphabetical order of the names" in warning


def test_numbers_sorted_as_text_are_recognised():
    names = [str(i) for i in range(12)]
    labels = torch.arange(2400) % 12
    order = torch.tensor(sorted(range(12), key=str))
    assert "sorted as text" in (permuted_classes(order[labels], labels, names) or "")


def test_chance_is_no_permutation():
    generator = torch.Generator().manual_seed(0)
    names = [str(i) for i in range(10)]
    for n in (30, 200, 5000):
        for _ in range(20):
            labels, predictions = (torch.randint(0, 10, (n,), generator=generator) for _ in range(2))
            assert permuted_classes(labels, predictions, names) is None


def test_confusing_two_classes_is_no_permutation():
    # 60 % of class 0 go to 1 and the other way round: an assignment would gain, yet the model is just bad
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (5000,), generator=generator)
    swap = (labels < 2) & (torch.rand(5000, generator=generator) < 0.45)
    predictions = torch.where(swap, 1 - labels, labels)
    assert permuted_classes(labels, predictions, [str(i) for i in range(10)]) is None


def test_collapse_is_no_permutation():
    labels = torch.arange(1000) % 10
    assert permuted_classes(labels, torch.full((1000,), 3), [str(i) for i in range(10)]) is None


def test_paired_sigmas():
    before = torch.tensor([True] * 10 + [False] * 90)
    after = torch.tensor([False] * 4 + [True] * 6 + [True] * 25 + [False] * 65)
    assert paired_sigmas(before, after) == pytest.approx((25 - 4) / 29**0.5)
    assert paired_sigmas(before, before) == 0
