"""`synthkit bench fresh_nets`: whole JSON, arithmetic as it says."""

from __future__ import annotations

import json

import pytest

from synthkit.cli.main import main
from synthkit.errors import ConfigError


def test_small_run(tmp_path, capsys):
    out = tmp_path / "nets.json"
    words = ["bench", "fresh_nets", "--arch", "mlp,convnet_d1_w4", "--batch", "4", "--nets", "2", "--repeats", "1"]
    assert main([*words, "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert [(row["arch"], row["chosen"]) for row in found["rows"]] == [("mlp", False), ("convnet_d1_w4", False)]
    for row in found["rows"]:
        assert row["stacked_speed"] == pytest.approx(row["seconds"]["one_by_one"] / row["seconds"]["stacked"])
    assert found["versions"]["torch"] and found["hardware"]["cores"]


def test_one_network_cannot_be_stacked(capsys):
    from synthkit.bench.fresh_nets import main as bench

    with pytest.raises(ConfigError, match="at least 2"):
        bench(["--nets", "1"])
