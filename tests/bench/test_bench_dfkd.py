"""`bench dfkd`: schedules meet the budget, rows are what the runs left, a second call makes nothing again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from synthkit.bench import dfkd
from synthkit.bench.published import PUBLISHED
from synthkit.cli.main import main
from synthkit.config.parse import load_recipe
from synthkit.errors import ConfigError
from synthkit.synthesis.generator.config import PoolConfig


@pytest.fixture
def digits(tmp_path) -> str:
    rng = np.random.default_rng(0)
    parts = {}
    for split, count in (("train", 60), ("test", 40)):
        labels = np.arange(count) % 10
        noise = rng.integers(0, 90, (count, 32, 32), dtype=np.uint8)
        parts[f"images_{split}"] = (noise + (labels * 16)[:, None, None]).astype(np.uint8)
        parts[f"labels_{split}"] = labels
    np.savez(tmp_path / "digits.npz", **parts)
    return f"npz:{tmp_path / 'digits.npz'}"


def call(tmp_path, digits, *more: str) -> dict:
    out = tmp_path / "table.json"
    words = ["--pairs", "mnist_bn", "--mnist", digits, "--budget", "0.6", "--seeds", "2", "--images", "30"]
    assert main(["bench", "dfkd", *words, "--work", str(tmp_path / "work"), "--out", str(out), *more]) == 0
    return json.loads(out.read_text())


def test_rows_ends_and_resume(tmp_path, digits, monkeypatch, capsys):
    found = call(tmp_path, digits, "--methods", "cudfkd,noise", "--only-runs")
    table = found["pairs"]["mnist_bn"]
    (row,) = table["rows"]
    assert row["method"] == "cudfkd" and row["curriculum"] == "easy2hard" and row["images"] == 30
    assert row["top1"]["n"] == 2 and row["retention"] == pytest.approx(row["top1"]["mean"] / table["teacher"]["top1"])
    assert 0 < row["cpu_seconds"]["mean"] < 10 and row["fresh_student"]["steps"] >= 50
    assert not row["published"] and table["ends"]["noise"]["published"][0]["top1"] == 88.01
    assert table["ends"]["noise"]["top1"]["n"] == 2

    def never(*args, **kwargs):
        raise AssertionError("made again")

    monkeypatch.setattr("synthkit.synthesis.engine.synthesize", never)
    monkeypatch.setattr("synthkit.distillation.distill.distill", never)
    monkeypatch.setattr("synthkit.synthesis.run.Run.run", never)
    again = call(tmp_path, digits, "--methods", "cudfkd", "--only-runs")
    assert again["pairs"]["mnist_bn"]["rows"] == [row]


@pytest.mark.parametrize("method", [m for m in dfkd.METHODS if "+" not in m])
def test_every_method_has_a_recipe_that_stretches(method):
    name = dfkd.RECIPES.get(method, f"mnist/{method}-lenet5_bn")
    config = load_recipe(name)
    assert config.teacher == "lenet5_bn" and config.method.student == "lenet5_half_bn"
    double = dfkd.scaled(config, 2.0, 1000)
    if hasattr(config.method, "epochs"):
        assert double.method.epochs == 2 * config.method.epochs
        assert double.method.grad_adv * double.method.epochs == pytest.approx(
            config.method.grad_adv * config.method.epochs
        )
    pool = isinstance(config.method, PoolConfig) or method == "adi"
    assert double.images == (2 * config.images if pool else 1000)
    least = dfkd.scaled(config, dfkd.smallest(config), 1000)
    assert getattr(least.method, "epochs", 2) >= 2 and (least.images or 0) > 0


def test_published_numbers_name_their_source():
    for entry in PUBLISHED:
        assert entry.method in (*dfkd.METHODS, *dfkd.ENDS) and entry.source and 0 < entry.top1 < 100
        assert entry.dataset in {pair.dataset for pair in dfkd.PAIRS.values()}


def test_wrong_words(tmp_path, digits):
    with pytest.raises(ConfigError, match="did you mean 'cudfkd'"):
        dfkd.main(["--methods", "cudfd", "--mnist", digits, "--work", str(tmp_path)])
    with pytest.raises(ConfigError, match="needs --mnist"):
        dfkd.main(["--pairs", "mnist", "--work", str(tmp_path)])
    with pytest.raises(ConfigError, match="budget must be positive"):
        dfkd.main(["--pairs", "mnist", "--mnist", digits, "--budget", "0", "--work", str(tmp_path)])
