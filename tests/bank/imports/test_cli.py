"""`synthkit bank import` as a user types it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from synthkit.bank import Bank
from synthkit.cli.main import main


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=rng.integers(0, 256, (23, 6, 5, 3), dtype=np.uint8), y=np.arange(23) % 4)
    return tmp_path


def run(data, *words, code=0):
    assert main(["bank", "import", *words, "--out", str(data / "bank")]) == code
    return Bank(data / "bank") if code == 0 else None


def test_import_says_what_it_made(data, capsys):
    bank = run(data, str(data / "a.npz"))
    out = capsys.readouterr().out
    assert "23 images 3 x 6 x 5, 4 classes" in out and "Contains real pixels" in out and "--teacher" in out
    assert bank.spec.contains_real and bank.mean == [0.5] * 3


def test_json_is_one_document(data, capsys):
    run(data, str(data / "a.npz"), "--json", "--synthetic", "--data-free", "--class-names", "a", "b", "c", "d")
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 23 and facts["class_names"] == ["a", "b", "c", "d"]
    assert facts["origin"] == "Made without any real data."


def test_size_mean_and_std(data):
    bank = run(data, str(data / "a.npz"), "--size", "1", "4", "4", "--mean", "0.1", "--std", "0.3")
    assert bank.shape == (1, 4, 4) and bank.mean == [0.1] and bank.std == [0.3]


def test_the_numbers_of_a_teacher(data):
    from synthkit.models.card import ModelCard

    card = ModelCard(arch="lenet5", num_classes=4, input_size=(3, 32, 32), mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6],
                     class_names=["w", "x", "y", "z"], weights="w.safetensors")  # fmt: skip
    card.save(data / "t.yaml")
    (data / "w.safetensors").write_bytes(b"")
    bank = run(data, str(data / "a.npz"), "--teacher", str(data / "t.yaml"))
    assert bank.mean == [0.1, 0.2, 0.3] and bank.std == [0.4, 0.5, 0.6] and bank.class_names == ["w", "x", "y", "z"]


def test_names_from_a_file(data):
    (data / "names.txt").write_text("ü\nb\nc\nd\n", "utf-8")
    assert run(data, str(data / "a.npz"), "--class-names", str(data / "names.txt")).class_names[0] == "ü"


@pytest.mark.parametrize("words, say", [
    (["nothing.npz"], "does not exist"), (["{data}/a.npz", "--format", "parqet"], "parqet"),
    (["{data}/a.npz", "--mean", "0.5"], "go together"),
    (["{data}/a.npz", "--mean", "0.5", "--std", "0.5"], "3 channels"),
    (["{data}/a.npz", "--real", "--synthetic"], "not allowed with"),
    (["{data}/a.npz", "--clas-names", "x"], "class-names"),
    (["{data}/a.npz", "--teacher", "no_such_model"], "no_such_model"), (["{data}"], "bank"),
])  # fmt: skip
def test_wrong_words(data, capsys, words, say):
    if words == ["{data}"]:
        (data / "bank.json").write_text("{}")
    run(data, *(w.format(data=data) for w in words), code=2)
    assert say in capsys.readouterr().err and not (data / "bank").exists()
