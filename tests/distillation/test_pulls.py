"""The first gradients of a loss's terms: right, said where they are uneven, and without a trace in the run."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from distillation.trainer_case import Relation, assert_same, distillation, records, student_view, trainer
from synthkit.distillation.pulls import first_pulls, gradient_norms, in_words
from synthkit.distillation.weighted import weighted_sum
from synthkit.logits import ce_per_sample


def test_norms_are_those_of_each_term(tmp_path):
    view = student_view()
    objective = distillation(weighted_sum("ce+3*mse@from2+kd@until2")(), view, labels="stored")
    made = trainer(tmp_path / "run", objective, view)
    norms = first_pulls(made, objective)
    assert set(norms) == {"ce", "mse", "kd"}  # whenever they count
    batch = made.batch()
    weights = list(view.module.parameters())
    assert batch.labels is not None and objective.teacher is not None

    def norm(value: torch.Tensor) -> float:
        return float(torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)]).norm())

    out, taught = view(batch.images), objective.teacher(batch.images).logits
    assert norms["ce"] == pytest.approx(norm(ce_per_sample(out, batch.labels).mean()), rel=1e-5)
    out = view(batch.images)
    assert norms["mse"] == pytest.approx(norm(3 * F.mse_loss(out, taught)), rel=1e-5)


@pytest.mark.parametrize("loss", [Relation, lambda: weighted_sum("ce+dist@ramp2")()])
def test_looking_leaves_no_trace(tmp_path, loss):
    """Dropout draws, running statistics, the order: everything goes on as if nobody had looked."""
    runs = []
    for look in (False, True):
        view = student_view(norm=True, dropout=0.5)
        objective = distillation(loss(), view, labels="stored")
        made = trainer(tmp_path / str(look), objective, view, seed=5)
        before, drawn = copy.deepcopy(made.parts.state_dict()), torch.random.get_rng_state()
        if look:
            assert all(norm > 0 for norm in first_pulls(made, objective).values())
            assert torch.equal(drawn, torch.random.get_rng_state())
            assert all(torch.equal(v, before[k]) for k, v in made.parts.state_dict().items())
            assert all(p.grad is None for p in made.parameters)
        made.fit()
        runs.append(made)
    assert_same(runs[0].parts, runs[1].parts)
    assert records(tmp_path / "False") == records(tmp_path / "True")


def test_a_norm_that_is_not_finite_is_left_out():
    view = student_view()
    objective = distillation(weighted_sum("ce+kd")(), view, labels="stored")
    with torch.no_grad():
        next(view.module.parameters()).fill_(float("nan"))
    from distillation.trainer_case import data
    from synthkit.distillation.contract import Batch

    images, labels = data()
    assert gradient_norms(objective, view.module, Batch(images=images.float() / 255, labels=labels)) == {}


def test_what_is_said():
    assert in_words({"kd": 1.0}) == [] and in_words({}) == []
    (line,) = in_words({"kd": 0.5, "at": 2.0})
    assert line == "  first batch: gradients of the terms on the student's weights kd 0.5, at 2"
    _, note = in_words({"kd": 0.5, "ce": 0.5, "at": 40.0})
    assert "at pulls 40 times as hard as all the rest" in note and "0.025 times its weight" in note
