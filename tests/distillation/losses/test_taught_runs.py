"""OFA, KD++, MEAL V2, DistillWeighted, DeiT-LT, LELP, ensembles and DOT in whole runs."""

from __future__ import annotations

import functools

import pytest
import torch
from safetensors.torch import load_file

from synthkit import tables
from synthkit.distillation.distill import distill
from synthkit.errors import RequirementError
from synthkit.models.build import load_model
from synthkit.models.view import TeacherView


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
    result = distill(config("lelp", {"lelp": {"directions": 1}}, labels="argmax"))
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
def test_what_was_found_survives_a_kill(config, killed_equals_whole, expression, optimizer):
    killed_equals_whole(functools.partial(config, expression, epochs=3, labels="argmax", **optimizer))


def test_several_teachers_are_needed(config):
    with pytest.raises(RequirementError, match="teachers"):
        distill(config("distill_weighted", labels="argmax"))


def test_dot_in_a_run(config, tmp_path, monkeypatch):
    """Other momenta, another student; without a difference the student of SGD."""

    def student(name: str, **changes) -> dict[str, torch.Tensor]:
        values = {"optimizer": "sgd", "lr": 0.02, "epochs": 2, "student": "lenet5_half", "protocol": "crd"}
        path = distill(config("ce+kd", labels="argmax", out=str(tmp_path / name), **{**values, **changes})).path
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
