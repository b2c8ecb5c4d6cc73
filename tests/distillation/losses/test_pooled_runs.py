"""Losses on pooled features, and SimKD, in whole runs: students learn, memories survive a stop, heads are deployed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from synthkit import tables
from synthkit.config.schema import DistillConfig, RuntimeConfig, TeachConfig
from synthkit.distillation import trainer as trainer_module
from synthkit.distillation.distill import distill
from synthkit.distillation.heads.simkd import SimKDNetwork
from synthkit.distillation.teach import teach
from synthkit.errors import ModelError, RequirementError
from synthkit.models.build import load_model

CRD = {"crd": {"negatives": 40, "width": 16}}


@pytest.fixture
def config(workshop, tmp_path):
    """A short run under the loss `expression`, with the options of its terms."""

    def make(expression: str, options: dict | None = None, **changes) -> DistillConfig:
        kind = tables.lookup("loss", expression)
        parts = {name: tables.lookup("loss", name).Config(**values) for name, values in (options or {}).items()}
        loss = kind.Config(**parts) if "+" in expression else parts.get(expression, kind.Config())
        values = {
            "bank": str(workshop.bank), "student": "lenet5_half_bn", "epochs": 4, "batch_size": 32,
            "optimizer": "adamw", "lr": 4e-3, "augment": "none", "loss_name": expression, "loss": loss,
            "out": str(tmp_path / "run"), "runtime": RuntimeConfig(device="cpu"),
        }  # fmt: skip
        return DistillConfig(**{**values, **changes})

    return make


@pytest.mark.parametrize(
    ("expression", "options", "labels"),
    [
        ("kd+srrl", {}, "none"),
        ("kd+semckd", {}, "none"),
        ("kd+0.05*rkd", {}, "none"),
        ("kd+1000*pkt", {}, "none"),
        ("kd+0.02*cc", {}, "none"),
        ("kd+0.05*crd", CRD, "argmax"),
    ],
)
def test_a_student_learns(config, expression, options, labels):
    result = distill(config(expression, options, labels=labels))
    assert result.metrics["holdout_agreement"] >= 0.8


def test_crd_needs_labels_and_rows(config):
    with pytest.raises(RequirementError, match="needs hard labels"):
        distill(config("kd+crd", CRD))


def test_memories_survive_a_kill(config, tmp_path, monkeypatch):
    def run(name: str, **changes):
        return config("kd+0.05*crd", CRD, labels="argmax", epochs=3, out=str(tmp_path / name), **changes)

    whole = distill(run("whole"))
    step, calls = trainer_module.Trainer._train_step, []

    def dies(self):
        calls.append(1)
        if len(calls) == 9:  # in the second epoch
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


def test_simkd_refuses_a_teacher_whose_classifier_reads_something_else(config):
    with pytest.raises(ModelError, match="loss simkd"):
        distill(config("simkd"))


def test_simkd_deploys_its_projector_and_the_classifier(config, workshop, tmp_path):
    cpu = RuntimeConfig(device="cpu")
    teach(
        TeachConfig(
            arch="resnet8", data=workshop.data, epochs=2, batch_size=16, lr=0.05, augment="none",
            out=str(tmp_path / "teacher"), runtime=cpu,
        )
    )  # fmt: skip
    result = distill(config("simkd", teacher=str(tmp_path / "teacher"), epochs=6, batch_size=16, lr=1e-2))
    loaded = load_model(str(result.student))
    assert isinstance(loaded.module, SimKDNetwork)
    teacher = load_model(str(tmp_path / "teacher")).module
    state = loaded.module.state_dict()
    assert torch.equal(state["classifier.weight"], teacher.state_dict()["fc.weight"])
    metrics = result.metrics
    assert metrics["deployed_params"] - metrics["plain_params"] == sum(
        value.numel() for key, value in loaded.module.named_parameters() if not key.startswith("student.")
    )
    assert metrics["holdout_agreement"] >= 0.8 > metrics["plain_holdout_agreement"]  # its own classifier is untrained
    plain = load_file(str(result.path / "plain" / "student.safetensors"))
    assert all(torch.equal(value, state[f"student.{key}"]) for key, value in plain.items())
