"""A student for use elsewhere: the same logits from [0, 1] images, whole or not at all, checked before it counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from synthkit.cli.export import STUDENT_FORMATS
from synthkit.cli.main import main
from synthkit.distillation import student_export
from synthkit.distillation.outputs import save_network
from synthkit.distillation.student_export import export_student
from synthkit.errors import ConfigError, ModelError, OutputExistsError, RequirementError, RunError, WeightsError
from synthkit.models.build import build_model, load_model
from synthkit.models.card import ModelCard
from synthkit.models.view import TeacherView
from synthkit.runtime import RunDir

ARCHITECTURES = {"lenet5": (1, 32, 32), "resnet8": (3, 32, 32)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run directories of networks whose BatchNorm and normalisation do something."""
    root = tmp_path_factory.mktemp("students")
    generator = torch.Generator().manual_seed(0)
    for arch, size in ARCHITECTURES.items():
        network = build_model(arch, num_classes=10, in_channels=size[0], image_size=32, seed=1)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
                layer.running_mean.normal_(generator=generator)
                layer.running_var.uniform_(0.5, 2, generator=generator)
        mean, std = [0.4, 0.5, 0.6][: size[0]], [0.2, 0.3, 0.25][: size[0]]
        card = ModelCard(arch=arch, num_classes=10, input_size=size, mean=mean, std=std, class_names=list("abcdefghij"))
        save_network(RunDir(root / arch).create(), network, card, "student.safetensors")
    return root


def logits_of(folder: Path, images: torch.Tensor) -> torch.Tensor:
    """What a user gets who knows only the exported files."""
    file = folder / str(ModelCard.load(folder / "card.yaml").weights)
    if file.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        if file.suffix == ".pt2":
            return torch.export.load(file).module()(images)
        return TeacherView.from_loaded(load_model(str(folder)))(images)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("format", STUDENT_FORMATS)
def test_the_exported_file_gives_the_logits_of_the_network(runs, tmp_path, arch, format):
    """Batch sizes 1 and 7 and one that nothing was checked with; the card says how to use it."""
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    before = torch.random.get_rng_state()
    out = export_student(str(runs / arch), format, tmp_path / "out")
    assert torch.equal(before, torch.random.get_rng_state())
    view = TeacherView.from_loaded(load_model(str(runs / arch)))
    for count in (1, 7, 19):
        images = torch.rand(count, *view.input_size, generator=torch.Generator().manual_seed(100 + count))
        with torch.no_grad():
            expected = view(images)
        assert expected.std() > 0.01
        torch.testing.assert_close(logits_of(out, images), expected, rtol=0, atol=1e-4)
    card = ModelCard.load(out / "card.yaml")
    facts = card.extra["export"]
    assert facts["format"] == format and card.class_names == list("abcdefghij")
    assert sorted(p.name for p in out.iterdir()) == sorted(["card.yaml", str(card.weights)])
    if format == "safetensors":
        assert (out / "student.safetensors").read_bytes() == (runs / arch / "student.safetensors").read_bytes()
        return
    assert "in [0, 1]; the graph normalises them" in facts["input"] and facts["checked_to"] < 1e-5
    with pytest.raises(WeightsError):  # a graph is no weights file, and no student starts from fresh weights instead
        load_model(str(out), weights="optional")
    if format == "onnx":
        opsets = {o.domain: o.version for o in pytest.importorskip("onnx").load(out / "student.onnx").opset_import}
        assert facts["opset"] == opsets[""] == student_export.OPSET


def test_the_command_line(runs, tmp_path, capsys):
    words = ["export", "--student", str(runs / "lenet5"), "--format"]
    assert main([*words, "safetensors", "--out", str(tmp_path / "a")]) == 0
    assert "wrote" in capsys.readouterr().out
    assert main([*words, "safetensors", "--out", str(tmp_path / "b"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["weights"] == "student.safetensors" and facts["of"] == str(runs / "lenet5")
    card = (tmp_path / "a" / "card.yaml").read_bytes()
    assert main([*words, "safetensors", "--out", str(tmp_path / "a")]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert (tmp_path / "a" / "card.yaml").read_bytes() == card
    for more, said in (
        (["parquet", "--out", "x"], "invalid choice"),
        (["onnx", "--out", "x", "--bank", "b"], "give exactly one of --bank and --student; got 'both'"),
        (["onnx", "--out", "x", "--verify"], "unknown option --verify"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["export", "--format", "npz", "--out", "x"]) == 2
    assert "give exactly one of --bank and --student; got 'neither'" in capsys.readouterr().err
    assert not Path("x").exists()
    assert tuple(student_export._WRITERS) == STUDENT_FORMATS


def test_refusals_write_nothing(runs, tmp_path, monkeypatch):
    spec, out = str(runs / "lenet5"), tmp_path / "out"
    with pytest.raises(ConfigError, match="did you mean 'onnx'"):
        export_student(spec, "onxn", out)
    with pytest.raises(WeightsError):
        export_student("resnet8", "torch-export", out)  # a bare name without weights: nothing to export
    for name in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setattr(
                "importlib.util.find_spec", lambda asked, missing=name: None if asked == missing else sys.modules
            )
            with pytest.raises(RequirementError, match=rf"{name} is not installed; pip install 'synthkit\[onnx\]'"):
                export_student(spec, "onnx", out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(OutputExistsError):
        export_student(spec, "torch-export", tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("wrong", [lambda y: y + 2e-3 * y.abs().max(), lambda y: y * torch.nan, lambda y: y[:1]])
def test_a_file_with_other_logits_does_not_count(runs, tmp_path, monkeypatch, wrong):
    """The check that stands before the rename: a shifted, a NaN and a fixed-batch graph."""
    network = load_model(str(runs / "lenet5"))
    view = TeacherView.from_loaded(network)

    def write(module, size, file):
        file.write_bytes(b"x")
        return lambda images: wrong(view(images)), {}

    monkeypatch.setitem(student_export._WRITERS, "torch-export", write)
    with pytest.raises(RunError, match="export: the"):
        export_student(str(runs / "lenet5"), "torch-export", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    wrong = lambda y: y + 2e-5  # noqa: E731  # `write` reads this name; within the tolerance
    export_student(str(runs / "lenet5"), "torch-export", tmp_path / "out")
    assert np.isclose(ModelCard.load(tmp_path / "out" / "card.yaml").extra["export"]["checked_to"], 2e-5, rtol=0.1)


class Sampler(nn.Module):
    """A classifier that draws, as a diffusion sampler does."""

    def forward(self, images):
        return images.flatten(1)[:, :10] + torch.randn(len(images), 10)


class Branching(nn.Module):
    """A classifier whose path depends on the values."""

    def forward(self, images):
        return images.flatten(1)[:, :10] * (2 if images.mean() > 0.3 else 1)


@pytest.mark.parametrize("network, said", [(Sampler(), "draws random numbers"), (Branching(), "cannot be written as")])
def test_networks_that_no_graph_can_stand_for(runs, tmp_path, monkeypatch, network, said):
    loaded = load_model(str(runs / "lenet5"))
    loaded.module = network
    monkeypatch.setattr(student_export, "load_model", lambda spec: loaded)
    with pytest.raises(ModelError, match=said):
        export_student("x", "torch-export", tmp_path / "out")
    assert not list(tmp_path.iterdir())
