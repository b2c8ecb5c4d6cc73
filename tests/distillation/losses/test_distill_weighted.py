"""DistillWeighted: the loss and the similarity against naive loops, the weights it finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from synthkit.distillation.contract import Batch, Look, Setup, Shapes, Taps
from synthkit.distillation.losses.distill_weighted import (
    DistillWeighted,
    task_similarity,
    teacher_weights,
    weighted_kd_loss,
)
from synthkit.distillation.losses.kd import kd_loss
from synthkit.errors import ConfigError, RequirementError


def randn(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive_ranks(values: list[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def test_loss_is_the_weighted_sum():
    s, a, b = randn(5, 4), randn(5, 4, seed=1), randn(5, 4, seed=2)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    expected = 0.3 * kd_loss(s, a, temperature=2.0) + 0.7 * kd_loss(s, b, temperature=2.0)
    torch.testing.assert_close(weighted_kd_loss(s, [a, b], weights, temperature=2.0), expected)
    x = s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: weighted_kd_loss(x, [a, b], weights, reduction="none"), x)


def test_similarity_equals_a_naive_loop():
    features, labels = randn(9, 5), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 1])
    features[4] = features[0]  # an exact tie of distances
    distances, other = [], []
    for i in range(9):
        for j in range(i):
            distances.append(round(1 - float(torch.corrcoef(features[[i, j]])[0, 1]), 9))
            other.append(float(labels[i] != labels[j]))
    pairs = torch.tensor([naive_ranks(distances), naive_ranks(other)], dtype=torch.float64)
    assert float(task_similarity(features, labels)) == pytest.approx(float(torch.corrcoef(pairs)[0, 1]), abs=1e-12)
    without = randn(9, 5)
    distances = [1 - float(torch.corrcoef(without[[i, j]])[0, 1]) for i in range(9) for j in range(i)]
    pairs = torch.tensor([naive_ranks(distances), naive_ranks(other)], dtype=torch.float64)
    assert float(task_similarity(without, labels)) == pytest.approx(float(torch.corrcoef(pairs)[0, 1]), abs=1e-12)


def test_similarity_knows_good_features():
    labels = torch.arange(40) % 4
    good = torch.eye(4)[labels] + 0.05 * randn(40, 4).float()
    assert float(task_similarity(good, labels)) > 0.6 > abs(float(task_similarity(randn(40, 4), labels)))
    assert float(task_similarity(good, torch.zeros(40))) == 0
    assert float(task_similarity(torch.ones(40, 4), labels)) == 0


def test_weights():
    scores = torch.tensor([0.6, 0.2, -0.3])
    torch.testing.assert_close(teacher_weights(scores, 1.0), torch.tensor([0.75, 0.25, 0.0]))
    torch.testing.assert_close(teacher_weights(scores, 2.0), torch.tensor([0.9, 0.1, 0.0]))
    torch.testing.assert_close(teacher_weights(scores, 0.0), torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(teacher_weights(-scores.abs(), 1.0), torch.full((3,), 1 / 3))


def test_teachers_are_scored_on_the_bank():
    labels = torch.arange(60) % 4
    good, bad = torch.eye(4)[labels] + 0.1 * randn(60, 4).float(), randn(60, 4, seed=5).float()
    loss = DistillWeighted(DistillWeighted.Config(images=30))
    loss.setup(Setup(student=Shapes(), teacher=Shapes(), num_classes=4, batch_size=8, epochs=1, images=60))

    def looks():
        for start in range(0, 60, 16):
            rows = torch.arange(start, min(start + 16, 60))
            teacher = Taps(logits=good[rows], members=[good[rows], bad[rows]])
            yield Look(teacher=teacher, labels=labels[rows], index=rows)

    loss.prepare(looks)
    assert loss.aux is not None
    found = loss.aux.get_buffer("weights")
    scores = torch.stack([task_similarity(x[::2], labels[::2]) for x in (good, bad)])
    torch.testing.assert_close(found[:2], teacher_weights(scores, 1.0).float())
    assert float(found[0]) > 0.8 and float(found[2:].abs().sum()) == 0
    s = randn(8, 4).float()
    members = [good[:8], bad[:8]]
    batch = Batch(images=torch.zeros(8, 1, 2, 2), labels=labels[:8])
    value = loss(Taps(logits=s), Taps(logits=good[:8], members=members), batch)["distill_weighted"]
    torch.testing.assert_close(value, weighted_kd_loss(s, members, found[:2], reduction="none"))
    with pytest.raises(RequirementError, match="2 to 16 teachers.*loss kd"):
        loss(Taps(logits=s), Taps(logits=good[:8]), batch)


def test_bad_options_are_refused():
    options: list[dict[str, Any]] = [{"temperature": 0.0}, {"power": -1.0}, {"images": 1}]
    for bad in options:
        with pytest.raises(ConfigError, match=f"loss.{next(iter(bad))}"):
            DistillWeighted.Config(**bad)
