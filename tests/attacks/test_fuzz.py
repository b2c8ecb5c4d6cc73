"""The fuzzer: finds nothing in the readers, and does find what is planted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from synthkit.bench import fuzz_parent
from synthkit.bench.fuzz_parent import fuzz
from synthkit.cli.main import main
from synthkit.errors import UsageError


def test_a_small_run_finds_nothing(tmp_path):
    out = tmp_path / "fuzz.json"
    assert (
        main(["bench", "fuzz", "--inputs", "1500", "--out", str(out), "--work", str(tmp_path / "w"), "--seed", "7"])
        == 0
    )
    result = json.loads(out.read_text())
    assert result["findings"] == [] and 1500 <= result["inputs"] < 1520
    for name, row in result["targets"].items():
        assert row["accepted"] + row["refused"] == row["inputs"] > 0, name
        assert row["accepted"] and (row["refused"] or name == "claim"), name  # both ways are really taken
    assert not list((tmp_path / "w" / "findings").iterdir())


@pytest.mark.parametrize("fault, kind", [
    ("untyped", "untyped"), ("crash", "crash (SIGSEGV)"), ("hang", "hang"), ("memory", "untyped"),
    ("broken", "accepted but not harmless"), ("leak", "memory growth"),
])  # fmt: skip
def test_planted_faults_are_found(tmp_path, monkeypatch, fault, kind):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(fuzz_parent, "HANG", 2.0)
    monkeypatch.setattr(fuzz_parent, "MAX_FINDINGS", 2)
    count = 600 if fault == "leak" else 60
    result = fuzz(count, 0, tmp_path, only=[fault], stage_class="planted:Stage")
    assert {f["kind"] for f in result["findings"]} == {kind}
    if fault == "leak":
        return
    found = result["findings"][0]
    data = (tmp_path / "findings" / found["file"]).read_bytes()
    assert any(byte & 0x20 for byte in data)  # the very input
    assert {"untyped": "KeyError", "memory": "MemoryError"}.get(fault, "") in found["error"]


def test_the_child_goes_on_after_a_crash(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    result = fuzz(30, 0, tmp_path, only=["crash"], stage_class="planted:Stage")
    row = result["targets"]["crash"]
    assert result["restarts"] == row["findings"] > 1 and row["inputs"] == 30
    assert row["accepted"] + row["refused"] + row["findings"] == 30


def test_inputs_are_a_pure_function_of_the_seed(tmp_path):
    one = fuzz(60, 3, tmp_path / "a", only=["safetensors"])["targets"]["safetensors"]
    two = fuzz(60, 3, tmp_path / "b", only=["safetensors"])["targets"]["safetensors"]
    assert (one["accepted"], one["refused"]) == (two["accepted"], two["refused"])


def test_wrong_words(tmp_path):
    assert main(["bench", "fuzz", "--inputs", "0"]) == 2
    with pytest.raises(UsageError, match="sidecar"):
        fuzz(10, 0, tmp_path, only=["sidecars"])


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_atheris_runs(tmp_path):
    out = tmp_path / "fuzz.json"
    words = [
        "bench",
        "fuzz",
        "--engine",
        "atheris",
        "--inputs",
        "300",
        "--out",
        str(out),
        "--work",
        str(tmp_path / "w"),
    ]
    assert main(words) == 0
    result = json.loads(out.read_text())
    assert result["inputs"] >= 300 and result["coverage_points"] > 100
