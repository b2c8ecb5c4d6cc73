"""`bench engines`: rows are what the commands wrote, controls stand beside, and a second call makes nothing again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from synthkit.bench import engines
from synthkit.cli.main import main
from synthkit.errors import ConfigError


@pytest.fixture
def digits(tmp_path) -> str:
    rng = np.random.default_rng(0)
    parts = {}
    for split, count in (("train", 60), ("test", 40)):
        labels = np.arange(count) % 10
        parts[f"images_{split}"] = rng.integers(0, 90, (count, 32, 32), dtype=np.uint8) + (labels * 16)[:, None, None]
        parts[f"images_{split}"] = parts[f"images_{split}"].astype(np.uint8)
        parts[f"labels_{split}"] = labels
    np.savez(tmp_path / "digits.npz", **parts)
    return f"npz:{tmp_path / 'digits.npz'}"


@pytest.fixture
def commands(monkeypatch) -> list[str]:
    """The commands that are run, in this process."""
    seen: list[str] = []

    def run(args, *words: str) -> None:
        seen.append(" ".join(words[:3]))
        assert main([*words, "--threads", str(args.threads), "--device", "cpu"]) == 0

    monkeypatch.setattr(engines, "_run", run)
    return seen


def call(tmp_path, digits, *more: str) -> dict:
    out = tmp_path / "table.json"
    words = ["--data", digits, "--images", "20", "--steps", "3", "--seeds", "2", "--work", str(tmp_path / "work")]
    assert main(["bench", "engines", *words, "--out", str(out), *more]) == 0
    return json.loads(out.read_text())


def test_rows_and_pictures(tmp_path, digits, commands, capsys):
    found = call(tmp_path, digits, "--only", "random_real,noise", "--picture", str(tmp_path / "all.png"))
    real, noise = found["rows"]
    assert [row["method"] for row in found["rows"]] == ["random_real", "noise"]
    assert real["data_needed"] == ["teacher", "real images"] and real["contains_real"]
    assert noise["data_needed"] == ["teacher"] and not noise["contains_real"]
    for row in found["rows"]:
        assert row["images"] == 20 and row["student_top1"]["n"] == 2 and 0 <= row["student_top1"]["mean"] <= 1
        assert row["seconds"] > 0 and row["cpu_seconds"] > 0 and row["peak_memory_bytes"] > 1 << 20
    with Image.open(tmp_path / "all.png") as picture:
        panel, own = picture.size[0] / 2, np.asarray(picture.convert("L"))
        assert own[60:, : int(panel)].std() > 20 and own[60:, int(panel) :].std() > 20, "an empty panel"
    assert found["versions"]["torch"] and found["hardware"]["threads"] >= 1
    assert len(commands) == 4
    again = call(tmp_path, digits, "--only", "random_real,noise")
    assert [r["student_top1"] for r in again["rows"]] == [r["student_top1"] for r in found["rows"]]
    assert [r["seconds"] for r in again["rows"]] == [r["seconds"] for r in found["rows"]], "a bank was made again"


def test_every_row_names_a_method_and_a_recipe_of_it():
    from synthkit.config import recipes
    from synthkit.tables import methods

    for engine in engines.ENGINES:
        assert engine.method in methods()
        if engine.recipe:
            method = recipes.load(engine.recipe)["method"]
            assert (method if isinstance(method, str) else method["name"]) == engine.method


def test_wrong_use(tmp_path, digits):
    with pytest.raises(ConfigError, match="did you mean 'noise'"):
        engines.main(["--data", digits, "--work", str(tmp_path), "--only", "noize"])
    with pytest.raises(ConfigError, match="--images must be at least 1"):
        engines.main(["--data", digits, "--work", str(tmp_path), "--images", "0"])
