"""The commands as a user runs them, and the Python face, on a teacher of a few thousand weights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import synthkit
from synthkit.cli.main import main
from synthkit.errors import ConfigError
from synthkit.models.build import build_model
from synthkit.models.card import ModelCard
from synthkit.models.weights import save_weights

SMALL = {"epochs": 2, "ep_steps": 10, "batch_size": 16, "width": 4, "nz": 8}
FLAGS = [word for name, value in SMALL.items() for word in (f"--method.{name}", str(value))]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """The card of an untrained LeNet: enough to run, nothing to learn."""
    folder = tmp_path_factory.mktemp("teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model("lenet5_half_bn", num_classes=10, in_channels=1, image_size=32)
    save_weights(network, folder / "t.safetensors")
    ModelCard(
        arch="lenet5_half_bn", num_classes=10, input_size=(1, 32, 32), mean=[0.13], std=[0.31], weights="t.safetensors"
    ).save(folder / "t.yaml")
    return folder / "t.yaml"


def test_synthesize_prints_the_bank_and_the_next_step(teacher, tmp_path, capsys):
    out = tmp_path / "bank"
    words = ["synthesize", "--teacher", str(teacher), "--images", "40", "--device", "cpu", *FLAGS, "--out", str(out)]
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["path"], facts["images"], facts["status"]) == (str(out), 40, "complete")
    assert main(words) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0  # a finished bank: nothing to do
    assert f"next: synthkit distill --bank {out}" in capsys.readouterr().out


def test_python_face(teacher, tmp_path):
    bank = synthkit.synthesize("cudfkd", teacher=teacher, images=40, out=tmp_path / "b", device="cpu", **SMALL)
    assert len(bank) == 40
    assert synthkit.Bank(tmp_path / "b")[:4].images.shape == (4, 1, 32, 32)
    run = synthkit.distill(
        bank, student="lenet5_half_bn", epochs=1, batch_size=16, temperature=5, out=tmp_path / "s", device="cpu"
    )
    assert run.student.is_file()
    record = json.loads((tmp_path / "s" / "run.json").read_text())
    assert record["config"]["loss"]["temperature"] == 5
    found = synthkit.evaluate(run.student, data=f"bank:{tmp_path / 'b'}", device="cpu")
    assert 0 <= found["metrics"]["agreement"] <= 1


def test_python_face_refuses_like_the_command_line(teacher):
    with pytest.raises(ConfigError, match="did you mean images"):
        synthkit.synthesize(teacher=teacher, imags=3)
    with pytest.raises(ConfigError, match="did you mean 'cudfkd'"):
        synthkit.synthesize("cudfdk", teacher=teacher)
    with pytest.raises(ConfigError, match="a whole number"):
        synthkit.synthesize(teacher=teacher, images="many")
    with pytest.raises(AttributeError, match="no attribute 'synthesise'"):
        synthkit.synthesise  # noqa: B018 - the look-up is the test


def test_control_c_says_how_to_go_on(teacher, tmp_path):
    out = tmp_path / "bank"
    words = ["synthesize", "--teacher", str(teacher), "--images", "2000", "--device", "cpu", *FLAGS]
    words += ["--method.epochs", "100000", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "synthkit", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("synthkit synthesize: interrupted") and last.endswith(f"--out {out} --resume")
    assert "Traceback" not in err
