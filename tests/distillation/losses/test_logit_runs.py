"""The losses of logits in whole runs: students learn by them, and what they remember survives a stop."""

from __future__ import annotations

import functools

import pytest
import torch
from safetensors.torch import load_file

from synthkit import tables
from synthkit.distillation.distill import distill
from synthkit.errors import RequirementError


@pytest.mark.parametrize(
    "expression, options",
    [
        ("mse", {}),
        ("logit_std", {}),
        ("ce+dkd@ramp2", {"dkd": {"beta": 2.0}, "ce": {"label_smoothing": 0.1}}),
        ("ce+2*dist", {}),
        ("pld", {}),
        ("pld", {"pld": {"first": "teacher"}}),
        ("ikl", {}),
        ("gkl", {}),
        ("gkl", {"gkl": {"class_prior": True}}),
    ],
)
def test_a_student_learns(config, workshop, expression, options):
    cfg = config(expression, options)
    needs = tables.lookup("loss", expression)(cfg.loss).requires.labels
    if needs:
        with pytest.raises(RequirementError, match="needs hard labels"):
            distill(cfg)
        cfg = config(expression, options, labels="argmax")
    assert distill(cfg).metrics["holdout_agreement"] >= 0.9


def test_class_priors_survive_a_kill(config, killed_equals_whole):
    """Killed in the third epoch: the table in use is the second's."""
    options = {"ikl": {"class_prior": True, "weight_temperature": 1.0}}
    killed_equals_whole(functools.partial(config, "ikl", options, labels="argmax", epochs=4), at=13)


@pytest.mark.parametrize(
    "expression, options", [("dist", {"dist": {"temperature": 1.0}}), ("gkl", {"gkl": {"gamma": 0.5}})]
)
def test_micro_batches_change_nothing(config, tmp_path, expression, options):
    """What these losses compare is the batch, however it was computed (the student has no BatchNorm)."""
    found = []
    for parts in (1, 4):
        changes = {"student": "lenet5_half", "optimizer": "sgd", "epochs": 2}
        cfg = config(expression, options, accumulate=parts, out=str(tmp_path / f"run{parts}"), **changes)
        found.append(load_file(str(distill(cfg).path / "student.safetensors")))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-5)
