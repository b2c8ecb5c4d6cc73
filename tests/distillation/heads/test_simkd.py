"""The network that SimKD deploys: follows the training, is rebuilt from plain settings, can be exported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from synthkit.distillation.contract import Batch, Setup, Shapes, Taps
from synthkit.distillation.heads.simkd import SimKDNetwork, as_map, projector, rebuild, shrink
from synthkit.distillation.losses.simkd import SimKD
from synthkit.errors import ModelError


class TinyStudent(nn.Module):
    """Two stages; the in-place ReLU behind the last map overwrites it."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.relu(self.layer2(self.layer1(x))).mean((2, 3)))


@pytest.fixture
def trained():
    """(loss, student, teacher classifier, images) after a step."""
    torch.manual_seed(0)
    classifier, student, loss = nn.Linear(8, 4), TinyStudent(), SimKD()
    loss.setup(
        Setup(
            student=Shapes(maps=[(5, 8, 8), (6, 8, 8)]),
            teacher=Shapes(maps=[(8, 4, 4)]),
            num_classes=4,
            batch_size=6,
            epochs=1,
            images=40,
            student_points=["layer1", "layer2"],
            teacher_classifier=classifier.requires_grad_(False),
        )
    )
    return loss, student, classifier, torch.randn(6, 3, 16, 16)


def step(loss, student, images):
    feature = student.layer2(student.layer1(images))
    teacher = Taps(logits=torch.zeros(6, 4), maps=[torch.rand(6, 8, 4, 4)])
    found = loss(Taps(logits=torch.zeros(6, 4), maps=[feature]), teacher, Batch(images=images))
    parameters = [p for p in [*student.parameters(), *loss.aux.parameters()]]
    gradients = torch.autograd.grad(found["simkd"].mean(), parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter -= 0.1 * gradient


def by_hand(loss, student, classifier, images):
    """What the deployed network should give, from its parts."""
    with torch.no_grad():
        feature = student.eval().layer2(student.layer1(images))
        logits = classifier(loss.aux.eval()(nn.functional.avg_pool2d(feature, 2)).mean((2, 3)))
    student.train()
    loss.aux.train()
    return logits


def test_it_follows_the_training_without_disturbing_it(trained):
    loss, student, classifier, images = trained
    network = loss.deploy(student)
    assert not network.training and student.training and loss.aux.training and student.layer1[1].training
    step(loss, student, images)
    with torch.no_grad():
        found = network(images)
    torch.testing.assert_close(found, by_hand(loss, student, classifier, images))
    mine = [*student.parameters(), *student.buffers(), *loss.aux.parameters(), *loss.aux.buffers()]
    assert {t.data_ptr() for t in mine} < {t.data_ptr() for t in network.state_dict().values()}
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in [*network.modules(), *student.modules()])


def test_rebuilt_from_plain_settings(trained):
    loss, student, _, images = trained
    step(loss, student, images)
    network = loss.deploy(student)
    settings = json.loads(json.dumps(loss.deployed_settings()))
    again = SimKD.rebuild(TinyStudent(), settings)
    state = network.state_dict()
    assert {key.split(".")[0] for key in state} == {"student", "projector", "classifier"}
    again.load_state_dict(state)
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(images), network(images))
        plain = TinyStudent()
        plain.load_state_dict({k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")})
        assert not torch.allclose(plain.eval()(images), network(images))  # the student's own classifier is not it


def test_settings_that_do_not_fit_are_refused(trained):
    settings = trained[0].deployed_settings()
    with pytest.raises(ModelError, match="settings are missing; got \\['factor'\\]"):
        rebuild(TinyStudent(), {k: v for k, v in settings.items() if k != "factor"})
    with pytest.raises(ModelError, match="did you mean 'layer2'"):
        rebuild(TinyStudent(), {**settings, "point": "layer3"})


def test_the_hook_is_removed_when_the_student_fails(trained):
    network = trained[0].deploy(trained[1])
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 4, 16, 16))
    assert all(not m._forward_hooks for m in network.modules())


def test_maps_of_any_layout():
    feature = torch.randn(2, 5, 3, 3)
    tokens = feature.flatten(2).transpose(1, 2)
    for given in (feature, feature.permute(0, 2, 3, 1), tokens, torch.cat([torch.zeros(2, 1, 5), tokens], dim=1)):
        assert torch.equal(as_map(given, 5), feature)
    assert shrink(feature, (3, 4)) is feature
    torch.testing.assert_close(shrink(feature, (1, 1))[..., 0, 0], feature.mean((2, 3)))
    assert shrink(feature, (1, 9)).shape == (2, 5, 1, 3)


def test_export(trained, tmp_path):
    """Through torch.export, and through ONNX into another runtime; both for any batch size."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    loss, student, _, images = trained
    step(loss, student, images)
    network = loss.deploy(student)
    with torch.no_grad():
        expected = network(images).numpy()
    program = torch.export.export(network, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    np.testing.assert_allclose(program.module()(images).detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    path = tmp_path / "network.onnx"
    torch.onnx.export(network, (images[:2],), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    weights = [entry.name for entry in onnx.load(path).graph.initializer]
    assert "classifier.weight" in weights and not any(name.startswith("student.fc") for name in weights)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": images.numpy()})[0], expected, rtol=1e-5, atol=1e-6)


def test_parts_by_name():
    network = SimKDNetwork(
        TinyStudent(), projector(6, 8), nn.Linear(8, 4), point="layer2", channels=6, size=(8, 8)
    ).eval()
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 4)
