"""`synthkit bench losses`: every loss has a row, one call gives the table, a second makes nothing again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from synthkit import tables
from synthkit.bench import losses, pages
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
    assert main([*words(scene), *chosen, "--out", str(out)]) == 0
    table = json.loads(out.read_text())
    assert table["rows"]["kd"]["top1"]["n"] == 2 and table["rows"]["kd"]["above_kd"]["mean"] == 0.0
    gaps = [a - b for a, b in zip(*(table["rows"][n]["top1"]["values"] for n in ("at", "kd")), strict=True)]
    assert table["rows"]["at"]["above_kd"]["mean"] == pytest.approx(sum(gaps) / 2)
    assert table["rows"]["simkd"]["top1"] is None and "classifier" in table["rows"]["simkd"]["failed"]
    assert {"control_real", "control_noise"} <= set(table["rows"])
    pulls = {name: row["pull"] for name, row in table["rows"].items()}
    assert pulls["kd"] == pytest.approx(1.0) and pulls["at"] > 3 and pulls["simkd"] == 0
    before = {p: p.stat().st_mtime_ns for p in (scene / "work").rglob("*.safetensors")}
    capsys.readouterr()
    assert main([*words(scene), *chosen]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == table["rows"]
    assert {p: p.stat().st_mtime_ns for p in (scene / "work").rglob("*.safetensors")} == before
    text = pages.losses(scene)
    assert "| `at` | `kd+1000*at` |" in text and "| `simkd` | `simkd` | – |" in text


def test_what_falls_below_is_trained_with_even_weights(scene, monkeypatch, capsys):
    accuracy = {"kd": 0.5, "at": 0.3, "sp": 0.6, "cc": 0.4, "semckd": None}
    pull = {"kd": 1.0, "at": 50.0, "sp": 50.0, "cc": 2.0, "semckd": 0.1}

    def row(name, row, args):
        value = accuracy.get(name, 0.7)
        top1 = None if value is None else {"mean": value, "std": 0.0, "n": 2, "values": [value, value]}
        return {"loss": row.loss, "top1": top1, "teacher_top1": None, "failed": "not finite", "cpu_seconds": 0.0}

    monkeypatch.setattr(losses, "_row", row)
    monkeypatch.setattr(losses, "_pull", lambda name, *_: pull[name])
    assert main([*words(scene), "--beside", "kd", "--even", "--losses", ",".join(accuracy)]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    assert {k: v["loss"] for k, v in found.items() if k.endswith("_even")} == {
        "at_even": "kd+20*at", "semckd_even": "kd+4000*semckd",
    }  # fmt: skip
    said = pages.shortfalls({"beside": "kd", "rows": found})
    assert set(said) == {"at", "cc", "semckd"} and "`kd+20*at`" in said["at"] and "it has 70.00" in said["at"]


@pytest.mark.parametrize(
    ("loss", "even"),
    [
        ("ce+kd@ramp1+2*nd", "ce+kd@ramp1+nd"),
        ("kd@from1+ab@until1", "kd@from1+0.5*ab@until1"),
        ("js", "0.5*js"),
        ("ce+30000*pkt", "ce+15000*pkt"),
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
