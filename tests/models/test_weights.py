"""Reading weights: what is understood, what is refused and what the refusal says."""

from __future__ import annotations

import hashlib
import os
import pickle
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from synthkit.errors import StorageError, WeightsError
from synthkit.models import weights
from synthkit.models.build import build_model, load_model


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return build_model("resnet8", num_classes=10, seed=5)


def _same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


def test_safetensors_round_trip(net, tmp_path):
    digest = weights.save_weights(net, tmp_path / "new" / "w.safetensors")
    assert os.listdir(tmp_path / "new") == ["w.safetensors"]
    assert digest == hashlib.sha256((tmp_path / "new" / "w.safetensors").read_bytes()).hexdigest()
    loaded = load_model(f"resnet8@{tmp_path}/new/w.safetensors")
    assert _same(loaded.module, net) and loaded.sha256 == digest and not loaded.module.training


def test_save_reports_a_path_that_cannot_be_written(net, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        weights.save_weights(net, tmp_path / "file" / "w.safetensors")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "net.backbone."])
@pytest.mark.parametrize("nest", [None, "state_dict", "model", "net"])
def test_prefixes_and_nesting(net, tmp_path, prefix, nest):
    state = {prefix + k: v for k, v in net.state_dict().items()}
    torch.save({"epoch": 3, nest: state, "best": 0.9} if nest else state, tmp_path / "w.pth")
    other = build_model("resnet8", num_classes=10, seed=6)
    weights.fit_state_dict(other, weights.read_state_dict(tmp_path / "w.pth"), "w.pth")
    assert _same(other, net)


def test_old_torch_format_and_missing_batch_counters(net, tmp_path):
    state = {k: v for k, v in net.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "w.th", _use_new_zipfile_serialization=False)
    other = build_model("resnet8", num_classes=10, seed=6)
    weights.fit_state_dict(other, weights.read_state_dict(tmp_path / "w.th"), "w.th")
    assert torch.equal(other.layer3[0].bn2.running_var, net.layer3[0].bn2.running_var)


def test_names_of_other_code_bases_are_translated(tmp_path):
    """kuangliu's shortcut/linear as torchvision would call them: downsample/fc."""
    net = build_model("resnet18", num_classes=4, seed=0)
    state = {k.replace("shortcut", "downsample").replace("linear", "fc"): v for k, v in net.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    assert _same(load_model(f"r18@{tmp_path}/w.safetensors").module, net)


def test_half_precision_weights_become_float32(net, tmp_path):
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}, tmp_path / "w.pt")
    other = load_model(f"resnet8@{tmp_path}/w.pt").module
    assert other.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(other.conv1.weight, net.conv1.weight, atol=1e-3, rtol=1e-3)


class _Trap:
    """Pickles to a call of os.mkdir: shows whether loading a file runs its code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_never_runs(net, tmp_path, new_format):
    torch.save(
        {"state_dict": net.state_dict(), "x": _Trap(tmp_path / "ran")},
        tmp_path / "w.pth",
        _use_new_zipfile_serialization=new_format,
    )
    with pytest.raises(WeightsError, match="could run any code"):
        weights.read_state_dict(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["whole", "nested"])
def test_pickled_model_is_refused_and_the_conversion_line_works(net, tmp_path, kind):
    path = tmp_path / "it's a model.pth"
    torch.save(net if kind == "whole" else {"epoch": 1, "model": net}, path)
    with pytest.raises(WeightsError) as error:
        weights.read_state_dict(path)
    assert "SmallResNet" in str(error.value)
    line = str(error.value).splitlines()[-1].strip()
    command = shlex.split(line)
    assert command[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *command[1:]], check=True)
    other = build_model("resnet8", num_classes=10, seed=6)
    weights.fit_state_dict(other, weights.read_state_dict(tmp_path / "it's a model-weights.pt"), "converted")
    assert _same(other, net)


def test_damaged_files(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "whole.pth")
    torch.save(net.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(net.state_dict(), tmp_path / "whole.safetensors")
    contents = {
        "empty.pth": b"",
        "cut.pth": (tmp_path / "whole.pth").read_bytes()[:5000],
        "cut_old.pth": (tmp_path / "old.pth").read_bytes()[:9000],
        "cut.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:9000],
        "noise.pth": bytes(range(256)) * 8,
        "noise.safetensors": bytes(range(256)) * 8,
        "words.pt": b"these are not the weights you are looking for",
        "lfs.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n",
        "page.pth": b"\n<!DOCTYPE html><html></html>",
        "pickle.pth": b"\x80\x02" + pickle.dumps({"a": 1}, protocol=2)[2:],
        "words.txt": b"hello",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError) as error:
            weights.read_state_dict(tmp_path / name)
        assert name in str(error.value), name
        assert "convert" not in str(error.value), name


@pytest.mark.parametrize("content", [[1, 2], {"a": 1, "b": 2}, {}, 3, {"state_dict": {"x": "y"}}])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="no state dict inside"):
        weights.read_state_dict(tmp_path / "w.pt")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        weights.read_state_dict(tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="not a file"):
        weights.read_state_dict(tmp_path)


def test_mismatch_report_is_short_and_complete(net):
    state = net.state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("layer3")}
    state["conv1.weight"] = state["conv1.weight"][:, :1]
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(WeightsError) as error:
        weights.fit_state_dict(build_model("resnet8", num_classes=10, seed=0), state, "w.pt")
    lines = str(error.value).splitlines()
    assert sum(line.startswith("  missing") for line in lines) == 9 and "more" in next(
        ln for ln in lines if "..." in ln
    )
    assert "  unexpected extra.weight" in lines
    assert "  shape      conv1.weight: the file has (16, 1, 3, 3), the network (16, 3, 3, 3)" in lines


def test_a_failed_fit_changes_nothing(net):
    other = build_model("resnet8", num_classes=10, seed=6)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    broken = {k: v for k, v in net.state_dict().items() if k != "fc.bias"}
    with pytest.raises(WeightsError, match="fc.bias"):
        weights.fit_state_dict(other, broken, "w.pt")
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_weights_that_are_not_numbers(net):
    state = {k: v.clone() for k, v in net.state_dict().items()}
    state["fc.weight"][0, 0] = float("nan")
    with pytest.raises(WeightsError, match="NaN or infinity in fc.weight"):
        weights.fit_state_dict(build_model("resnet8", num_classes=10, seed=0), state, "w.pt")


def test_count_parameters_by_hand():
    assert weights.count_parameters(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))) == 3 * 4 + 4 + 8
