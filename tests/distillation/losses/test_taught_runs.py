"""OFA, KD++, MEAL V2, DistillWeighted, DeiT-LT, LELP, ensembles and DOT in whole runs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from synthkit import tables
from synthkit.config.schema import DistillConfig, RuntimeConfig
from synthkit.distillation import trainer as trainer_module
from synthkit.distillation.distill import distill
from synthkit.errors import RequirementError
from synthkit.models.build import load_model
from synthkit.models.view import TeacherView


@pytest.fixture
def config(workshop, tmp_path):
    """A short run under the loss `expression`, with the options of its terms."""

    def make(expression: str, options: dict | None = None, **changes) -> DistillConfig:
        kind = tables.lookup("loss", expression)
        parts = {name: tables.lookup("loss", name).Config(**values) for name, values in (options or {}).items()}
        loss = kind.Config(**parts) if "+" in expression else parts.get(expression, kind.Config())
        values = {
            "bank": str(workshop.bank), "student": "lenet5_half_bn", "epochs": 6, "batch_size": 32,
            "optimizer": "adamw", "lr": 4e-3, "augment": "none", "labels": "argmax", "loss_name": expression,
            "loss": loss, "out": str(tmp_path / "run"), "runtime": RuntimeConfig(device="cpu"),
        }  # fmt: skip
        return DistillConfig(**{**values, **changes})

    return make


@pytest.mark.parametrize(
    ("expression", "options", "teachers"),
    [
        ("ofa", {"ofa": {"gamma": (1.0, 1.2, 1.5)}}, 1),
        ("ce+kd@ramp2+2*nd", {}, 1),
        ("mealv2", {}, 2),
        ("distill_weighted", {}, 2),
        ("deit_lt", {"deit_lt": {"defer": 0.5}}, 1),
        ("lelp", {"lelp": {"directions": 1}}, 1),
    ],
)
def test_a_student_learns(config, workshop, expression, options, teachers):
    teacher = ",".join([str(workshop.teacher)] * teachers)
    needs = tables.lookup("loss", expression).requires if "+" not in expression else None
    labels = "argmax" if needs is None or needs.labels else "none"
    result = distill(config(expression, options, teacher=teacher, labels=labels))
    assert result.metrics["holdout_agreement"] >= 0.9


def test_lelp_deploys_its_classifier(config, workshop):
    result = distill(config("lelp", {"lelp": {"directions": 1}}))
    loaded = load_model(str(result.path))
    names = set(loaded.module.state_dict())
    assert any(name.endswith("linear.weight") for name in names)
    view = TeacherView.from_loaded(loaded)
    teacher = TeacherView.from_loaded(load_model(str(workshop.teacher)))
    images = torch.from_numpy(workshop.images).float() / 255
    with torch.no_grad():
        agreement = (view(images).argmax(dim=1) == teacher(images).argmax(dim=1)).float().mean()
    assert float(agreement) >= 0.9


@pytest.mark.parametrize(
    ("expression", "optimizer"),
    [("kd+nd", {}), ("ce+kd", {"optimizer": "dot", "lr": 0.02})],
    ids=["class directions", "momenta of dot"],
)
def test_what_was_found_survives_a_kill(config, tmp_path, monkeypatch, expression, optimizer):
    def run(name: str, **changes):
        return config(expression, epochs=3, out=str(tmp_path / name), **optimizer, **changes)

    whole = distill(run("whole"))
    step, calls = trainer_module.Trainer._train_step, []

    def dies(self):
        calls.append(1)
        if len(calls) == 9:
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


def test_several_teachers_are_needed(config):
    with pytest.raises(RequirementError, match="teachers"):
        distill(config("distill_weighted"))


def test_dot_in_a_run(config, tmp_path, monkeypatch):
    """Other momenta, another student; without a difference the student of SGD."""

    def student(name: str, **changes) -> dict[str, torch.Tensor]:
        values = {"optimizer": "sgd", "lr": 0.02, "epochs": 2, "student": "lenet5_half", "protocol": "crd"}
        path = distill(config("ce+kd", out=str(tmp_path / name), **{**values, **changes})).path
        return load_file(str(path / "student.safetensors"))

    plain, dot = student("sgd"), student("dot", optimizer="dot")
    assert any(not torch.allclose(plain[key], dot[key], atol=1e-4) for key in plain)
    with monkeypatch.context() as patch:
        from synthkit.distillation.dot import DOT

        made = DOT.__init__

        def same_momenta(self, *args, **kwargs):
            made(self, *args, **{**kwargs, "delta": 0.0})

        patch.setattr(DOT, "__init__", same_momenta)
        same = student("same", optimizer="dot")
    for key, value in plain.items():
        torch.testing.assert_close(same[key], value, rtol=1e-4, atol=1e-5)
