"""Losses on pooled features, and SimKD, in whole runs: students learn, memories survive a stop, heads are deployed."""

from __future__ import annotations

import functools

import pytest
import torch
from safetensors.torch import load_file

from synthkit.config.schema import RuntimeConfig, TeachConfig
from synthkit.distillation.distill import distill
from synthkit.distillation.heads.simkd import SimKDNetwork
from synthkit.distillation.teach import teach
from synthkit.errors import ModelError, RequirementError
from synthkit.models.build import load_model

CRD = {"crd": {"negatives": 40, "width": 16}}


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
    result = distill(config(expression, options, labels=labels, epochs=4))
    assert result.metrics["holdout_agreement"] >= 0.8


def test_crd_needs_labels_and_rows(config):
    with pytest.raises(RequirementError, match="needs hard labels"):
        distill(config("kd+crd", CRD))


def test_memories_survive_a_kill(config, killed_equals_whole):
    killed_equals_whole(functools.partial(config, "kd+0.05*crd", CRD, labels="argmax", epochs=3))


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
