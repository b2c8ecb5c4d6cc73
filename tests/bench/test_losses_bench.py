"""`synthkit bench losses`: every loss has a row, one call gives the table, a second makes nothing again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from synthkit import tables
from synthkit.bench import pages
from synthkit.bench.losses import main
from synthkit.bench.losses_plan import Row, evened, rows
from synthkit.distillation.weighted import parse_terms
from synthkit.errors import ConfigError


@pytest.mark.parametrize("beside", ["ce", "kd"])
def test_every_loss_has_a_row(beside):
    plan = rows(beside)
    named = {term.name for row in plan.values() for term in parse_terms(row.loss)}
    assert named == set(tables.LOSSES) and {"ce", "kd", "random_teacher"} <= set(plan)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A bank of 60 grey images of 10 classes, and labelled data."""
    from synthkit.bank.make import bank_from_arrays

    root = tmp_path_factory.mktemp("losses")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 1, 32, 32), dtype=np.uint8)
    labels = np.arange(60) % 10
    bank_from_arrays(root / "bank", images, labels.astype(np.int64), num_classes=10, mean=[0.1], std=[0.3])
    np.savez(root / "data.npz", **{f"{k}_{s}": v for s in ("train", "test") for k, v in
                                   (("images", images), ("labels", labels))})  # fmt: skip
    return root


def words(scene, *more: str) -> list[str]:
    common = ["--teacher", "lenet5_bn", "--student", "lenet5_half_bn", "--epochs", "1", "--seeds", "2"]
    places = ["--bank", str(scene / "bank"), "--eval-data", f"npz:{scene / 'data.npz'}", "--work", str(scene / "work")]
    return [*common, *places, *more]


def test_a_table(scene, capsys):
    """KD, a feature loss, a loss that these networks refuse, and both controls."""
    chosen = ["--beside", "kd", "--control", f"npz:{scene / 'data.npz'}"]
    chosen += ["--losses", "kd,at,simkd,control_real,control_noise"]
    out = scene / "losses_mnist_synthetic.json"
    assert main([*words(scene), *chosen, "--even", "--out", str(out)]) == 0
    table = json.loads(out.read_text())
    assert table["rows"]["kd"]["top1"]["n"] == 2 and table["rows"]["kd"]["above_kd"]["mean"] == 0.0
    gaps = [a - b for a, b in zip(*(table["rows"][n]["top1"]["values"] for n in ("at", "kd")), strict=True)]
    assert table["rows"]["at"]["above_kd"]["mean"] == pytest.approx(sum(gaps) / 2)
    assert table["rows"]["simkd"]["top1"] is None and "classifier" in table["rows"]["simkd"]["failed"]
    assert {"control_real", "control_noise"} <= set(table["rows"])
    pulls = {name: row["pull"] for name, row in table["rows"].items()}
    assert pulls["kd"] == pytest.approx(1.0) and pulls["at"] > 3 and pulls["simkd"] == 0
    even = parse_terms(table["rows"]["at_even"]["loss"])
    assert [t.name for t in even] == ["kd", "at"] and even[1].weight == pytest.approx(1000 / pulls["at"], rel=0.01)
    before = {p: p.stat().st_mtime_ns for p in (scene / "work").rglob("*.safetensors")}
    capsys.readouterr()
    assert main([*words(scene), *chosen, "--even"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == table["rows"]
    assert {p: p.stat().st_mtime_ns for p in (scene / "work").rglob("*.safetensors")} == before
    text = pages.losses(scene)
    assert "| `at` | `kd+1000*at` |" in text and "| `simkd` | `simkd` | – |" in text


@pytest.mark.parametrize(
    ("loss", "even"),
    [
        ("ce+kd@ramp1+2*nd", "ce+kd@ramp1+nd"),
        ("kd@from1+ab@until1", "kd@from1+0.5*ab@until1"),
        ("js", "0.5*js"),
        ("kd", None),
        ("simkd", None),
    ],
)
def test_even_weights(loss, even):
    row = evened(Row(loss), 0.5)
    assert row == (None if even is None else Row(even))


def test_an_unknown_row(scene):
    with pytest.raises(ConfigError, match="no such row.*did you mean 'kd'"):
        main([*words(scene), "--beside", "kd", "--losses", "kdd"])
