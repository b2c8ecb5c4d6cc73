"""The measurements of the matching family, on tiny networks: that they run, and say what they promise."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from synthkit.bench import matching, steps_matching, trajectory_memory
from synthkit.config.schema import RuntimeConfig
from synthkit.errors import ConfigError
from synthkit.runtime import Runtime


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    steps_matching.add_arguments(parser)
    return parser.parse_args(["--arch", "convnet_d2_w4", "--side", "8", "--batch-real", "4", *words])


def test_steps_and_their_floors_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNTHKIT_HOME", str(tmp_path))
    pieces = steps_matching.build(arguments("--ipc", "2"), Runtime.create(RuntimeConfig(device="cpu")))
    assert {"dc_step", "dm_step", "mtt_step_sweep", "mtt_step_unroll"} == set(pieces.floors)
    assert {bare for bares in pieces.floors.values() for bare in bares} < set(pieces.run)
    for piece in pieces.run.values():
        piece()
    assert pieces.facts["ipc"] == 2
    with pytest.raises(ConfigError, match="--inner-steps must be at least 1"):
        steps_matching.build(arguments("--inner-steps", "0"), Runtime.create(RuntimeConfig(device="cpu")))


def test_memory_of_the_engines(tmp_path, capsys):
    words = ["--arch", "convnet_d2_w4", "--side", "8", "--batch", "4", "--repeats", "1", "--threads", "1"]
    rows = {}
    for what in ("sweep:2", "sweep:8", "unroll:8"):
        trajectory_memory.main([*words, "--one", what])
        rows[what] = json.loads(capsys.readouterr().out)
    assert rows["sweep:2"]["saved_bytes"] == rows["sweep:8"]["saved_bytes"] < rows["unroll:8"]["saved_bytes"] / 3
    assert all(row["seconds"] > 0 and row["parameters"] == rows["sweep:2"]["parameters"] for row in rows.values())
    with pytest.raises(ConfigError, match="--steps: whole numbers"):
        trajectory_memory.main(["--steps", "ten"])


def test_a_part_is_measured_once(tmp_path, capsys):
    draw = np.random.default_rng(0)
    names = {"x_train": 60, "x_test": 20}
    arrays = {name: draw.integers(0, 256, (n, 28, 28), dtype=np.uint8) for name, n in names.items()}
    labels = {name.replace("x", "y"): np.arange(n) % 10 for name, n in names.items()}
    np.savez(tmp_path / "real.npz", **arrays, **labels)
    words = ["--data", f"npz:{tmp_path / 'real.npz'}", "--parts", "dc", "--iterations", "1", "--epochs", "1"]
    words += ["--nets", "1", "--threads", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    assert matching.main(words) == 0
    first = json.loads((tmp_path / "out.json").read_text())
    part = first["parts"]["dc"]
    assert part["images"] == 10 and part["arch"] == "convnet_w32" and part["protocol"]["name"] == "dc"
    assert part["gain"] == pytest.approx(part["bank"]["mean"] - part["control"]["mean"])
    assert first["versions"]["torch"] and first["hardware"]["cores"]
    matching.main(words)
    assert json.loads((tmp_path / "out.json").read_text())["parts"] == first["parts"]
    with pytest.raises(ConfigError, match="no such part.*did you mean 'mtt'"):
        matching.main([*words, "--parts", "mt"])
