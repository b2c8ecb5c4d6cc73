"""Networks of the user: Python files on the command line, modules in Python; code is run only where it was typed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from synthkit.errors import ModelError, WeightsError
from synthkit.models import own
from synthkit.models.build import load_model
from synthkit.models.card import ModelCard
from synthkit.models.view import ModelView
from synthkit.models.weights import save_weights

CODE = """
from torch import nn
from pathlib import Path
Path(__file__).with_suffix(".ran").touch()

class Small(nn.Sequential):
    def __init__(self, num_classes, in_channels=3):
        super().__init__(nn.Conv2d(in_channels, 4, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))

def broken(num_classes):
    raise ValueError("no such day")

def number():
    return 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "_trusted", set())
    path = tmp_path / "nets.py"
    path.write_text(CODE)
    return path


def test_a_typed_network(file):
    spec = f"py:{file}:Small"
    own.trust_words(["--student", spec])
    loaded = load_model(spec, num_classes=6, in_channels=1, image_size=16, weights="optional", seed=4)
    assert loaded.module(torch.zeros(2, 1, 16, 16)).shape == (2, 6)
    again = load_model(spec, num_classes=6, in_channels=1, image_size=16, weights="optional", seed=4)
    state = again.module.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in loaded.module.state_dict().items())
    with pytest.raises(WeightsError, match="no weights of its own.*@FILE"):
        load_model(spec)
    save_weights(loaded.module, file.with_name("w.safetensors"))
    weighted = load_model(f"{spec}@{file.with_name('w.safetensors')}", image_size=16)
    assert weighted.card.num_classes == 6 and torch.equal(weighted.module[0].weight, loaded.module[0].weight)


def test_code_that_was_not_typed_is_not_run(file, monkeypatch):
    ModelCard(
        arch=f"py:{file}:Small", num_classes=6, input_size=(3, 16, 16), mean=[0.5] * 3, std=[0.5] * 3,
        weights="w.safetensors",
    ).save(file.with_name("card.yaml"))  # fmt: skip
    save_weights(nn.Linear(1, 1), file.with_name("w.safetensors"))
    for asked in (str(file.with_name("card.yaml")), f"py:{file}:Small@{file.with_name('w.safetensors')}"):
        with pytest.raises(ModelError, match="only where you type it"):
            load_model(asked)
    assert not file.with_suffix(".ran").exists()
    monkeypatch.setenv(own.ENVIRONMENT, f"py:{file}:Small")
    with pytest.raises(WeightsError):  # followed now; the weights are another network's
        load_model(str(file.with_name("card.yaml")))
    assert file.with_suffix(".ran").exists()


@pytest.mark.parametrize(
    "name, said",
    [
        ("Smal", "no class or function of that name.*did you mean 'Small'"),
        ("broken", "ValueError: no such day"),
        ("number", "no torch.nn.Module; got 'int'"),
    ],
)
def test_what_is_wrong_is_said(file, name, said):
    own.trust_words([f"--student=py:{file}:{name}"])
    with pytest.raises(ModelError, match=said):
        load_model(f"py:{file}:{name}", num_classes=6, weights="optional")
    own.trust_words(["py:nowhere.py:Net"])
    with pytest.raises(ModelError, match="no such Python file"):
        load_model("py:nowhere.py:Net", num_classes=6, weights="optional")


def test_modules_of_this_process():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    spec = own.hold(network)
    assert own.hold(copy.deepcopy(network)) == spec
    loaded = load_model(spec, num_classes=5, in_channels=3, image_size=2, weights="optional")
    assert loaded.module is not network and torch.equal(loaded.module[1].weight, network[1].weight)
    with torch.no_grad():
        network[1].weight.add_(1)
    assert own.hold(network) != spec
    with pytest.raises(ModelError, match="of another process"):
        load_model("object:Net-0123", num_classes=5, weights="optional")


def test_a_view_keeps_its_constants(tmp_path):
    from synthkit.api import distill
    from synthkit.bank.make import bank_from_arrays
    from synthkit.config.parse import parse_config
    from synthkit.distillation.task import check_task

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 8, 8), generator=generator, dtype=torch.uint8).numpy()
    bank_from_arrays(tmp_path / "bank", images, num_classes=3, mean=[0.5] * 3, std=[0.5] * 3)
    networks = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)) for _ in range(2)]
    view = ModelView(networks[0], [0.1] * 3, [0.3] * 3, input_size=(3, 8, 8), num_classes=3)
    before = copy.deepcopy(networks[1].state_dict())
    result = distill(
        tmp_path / "bank", networks[1], teacher=view, loss="kd+10*at", steps=3, batch_size=8, device="cpu",
        student_taps="0", teacher_taps="0", out=tmp_path / "run",
    )  # fmt: skip
    assert result.metrics["steps"] == 3 and result.metrics["teacher"].startswith("object:Sequential-")
    assert all(torch.equal(v, networks[1].state_dict()[k]) for k, v in before.items())
    config = parse_config("distill", {"bank": str(tmp_path / "bank"), "student": "resnet8", "teacher": own.hold(view)})
    task = check_task(config)
    assert task.teacher is not None and task.teacher.mean == [0.1] * 3 and task.teacher.std == [0.3] * 3
