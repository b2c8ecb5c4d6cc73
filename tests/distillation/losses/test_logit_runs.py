"""The losses of logits in whole runs: students learn by them, and what they remember survives a stop."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from synthkit import tables
from synthkit.config.schema import DistillConfig, RuntimeConfig
from synthkit.distillation import trainer as trainer_module
from synthkit.distillation.distill import distill
from synthkit.errors import RequirementError


@pytest.fixture
def config(workshop, tmp_path):
    """A short run under the loss `expression`, with the options of its terms."""

    def make(expression: str, options: dict, **changes) -> DistillConfig:
        kind = tables.lookup("loss", expression)
        parts = {name: tables.lookup("loss", name).Config(**values) for name, values in options.items()}
        loss = kind.Config(**parts) if "+" in expression else parts.get(expression, kind.Config())
        values = {
            "bank": str(workshop.bank), "student": "lenet5_half_bn", "epochs": 6, "batch_size": 32,
            "optimizer": "adamw", "lr": 4e-3, "augment": "none", "loss_name": expression, "loss": loss,
            "out": str(tmp_path / "run"), "runtime": RuntimeConfig(device="cpu"),
        }  # fmt: skip
        return DistillConfig(**{**values, **changes})

    return make


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


def test_class_priors_survive_a_kill(config, tmp_path, monkeypatch):
    options = {"ikl": {"class_prior": True, "weight_temperature": 1.0}}

    def run(name: str, **changes):
        return config("ikl", options, labels="argmax", epochs=4, out=str(tmp_path / name), **changes)

    whole = distill(run("whole"))
    step, calls = trainer_module.Trainer._train_step, []

    def dies(self):
        calls.append(1)
        if len(calls) == 13:  # in the third epoch: the table in use is the second's
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(trainer_module.Trainer, "_train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        distill(run("killed"))
    monkeypatch.undo()
    resumed = distill(run("killed", resume=True))
    first, second = (load_file(str(result.path / "student.safetensors")) for result in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


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
