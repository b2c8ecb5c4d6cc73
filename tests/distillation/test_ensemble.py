"""Several teachers as one: the mean that is meant, members that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from synthkit.distillation.ensemble import TeacherEnsemble, combine_logits
from synthkit.errors import ConfigError, ModelError
from synthkit.models.view import TeacherView


def teacher(seed: int, *, mean: float = 0.5, classes: int = 3, size: int = 4, names=None, norm=False) -> TeacherView:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * (size - 2) ** 2, classes)]
    if norm:
        layers.insert(1, nn.BatchNorm2d(2))
    net = nn.Sequential(*layers)
    shape = (1, size, size)
    return TeacherView(net, [mean], [0.25], input_size=shape, num_classes=classes, class_names=names, name=f"t{seed}")


@pytest.fixture
def images():
    return torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def test_probabilities_are_averaged(images):
    members = [teacher(0), teacher(1, mean=0.1), teacher(2)]
    ensemble = TeacherEnsemble(members)
    expected = torch.stack([m(images).softmax(dim=1) for m in members]).mean(dim=0)
    found = ensemble(images)
    assert found.shape == (5, 3) and found.dtype == torch.float32
    torch.testing.assert_close(found.softmax(dim=1), expected)
    torch.testing.assert_close(found.exp(), expected)  # the logits are the log of the mean
    for a, b in zip(ensemble.all_logits(images), members, strict=True):
        assert torch.equal(a, b(images))
    assert torch.equal(ensemble.combined(ensemble.all_logits(images)), found)


def test_weights_and_mean_logits(images):
    members = [teacher(0), teacher(1)]
    a, b = (m(images) for m in members)
    weighted = TeacherEnsemble(members, weights=[3, 1])
    torch.testing.assert_close(weighted(images).exp(), 0.75 * a.softmax(1) + 0.25 * b.softmax(1))
    by_logits = TeacherEnsemble(members, "logits", [3, 1])
    torch.testing.assert_close(by_logits(images), 0.75 * a + 0.25 * b)
    torch.testing.assert_close(TeacherEnsemble(members, "logits")(images), (a + b) / 2)


def test_far_apart_members_stay_finite():
    members = [torch.tensor([[1e4, 0.0]]), torch.tensor([[-1e4, 0.0]])]
    torch.testing.assert_close(combine_logits(members).softmax(dim=1), torch.tensor([[0.5, 0.5]]))


def test_it_stands_for_a_teacher(images):
    ensemble = TeacherEnsemble([teacher(0, norm=True), teacher(1, names=["a", "b", "c"])])
    assert ensemble.num_classes == 3 and ensemble.input_size == (1, 4, 4) and ensemble.name == "t0+t1"
    assert ensemble.class_names == ["a", "b", "c"] and ensemble.to("cpu") is ensemble
    assert not any(p.requires_grad for p in ensemble.module.parameters())
    assert not any(m.training for m in ensemble.module.modules())
    as_bytes = (images * 255).to(torch.uint8)
    assert torch.equal(ensemble(as_bytes), ensemble(as_bytes.float() / 255))
    pixels = images.clone().requires_grad_()
    ensemble(pixels).sum().backward()
    assert pixels.grad is not None and float(pixels.grad.abs().sum()) > 0
    assert torch.equal(TeacherEnsemble([teacher(0)])(images).softmax(1), teacher(0)(images).log_softmax(1).softmax(1))


def test_what_only_one_teacher_has_is_refused(images):
    ensemble = TeacherEnsemble([teacher(0, norm=True), teacher(1, norm=True)])
    assert not ensemble.has_batchnorm
    for use in (lambda: ensemble.classifier, lambda: ensemble.features(images), lambda: ensemble.normalize(images)):
        with pytest.raises(ModelError, match="name one teacher"):
            use()
    with pytest.raises(ModelError, match="BatchNorm2d"), ensemble.bn_statistics():
        pass


def test_members_that_do_not_fit_are_refused():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"size": 5}, "different size.*one input size"),
        ({"classes": 4}, "numbers of classes"),
        ({"names": ["b", "a", "c"]}, "order or name"),
    ]
    for other, message in cases:
        with pytest.raises(ModelError, match=message):
            TeacherEnsemble([teacher(0, names=["a", "b", "c"]), teacher(1, **other)])
    for bad in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ConfigError, match="weights"):
            TeacherEnsemble([teacher(0), teacher(1)], weights=bad)
    with pytest.raises(ConfigError, match="combine"):
        TeacherEnsemble([teacher(0)], "votes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one"):
        TeacherEnsemble([])
