"""bench steps --family inversion and bench inversion: whole JSON, honest arithmetic, resumable."""

from __future__ import annotations

import json

import pytest
import yaml
from workshop import save_teacher

from synthesis.test_contract_random_real import save_npz
from synthkit.cli.main import main


@pytest.mark.parametrize("extra", [[], ["--crop", "0.5", "--per-image"]])
def test_steps(capsys, extra):
    words = ["--teacher", "resnet8", "--batch", "4", "--threads", "1", "--repeats", "3", *extra]
    assert main(["bench", "steps", "--family", "inversion", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    bare = [v for k, v in found["seconds"].items() if k.startswith("bare_")]
    assert len(bare) == 2 and found["floor"]["iteration"] == min(bare)
    assert found["ratio"]["iteration"] == pytest.approx(found["seconds"]["iteration"] / min(bare), rel=1e-2)
    assert found["per_image"] == bool(extra)


def test_inversion(capsys, tmp_path):
    teacher, judge = (save_teacher(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    data = save_npz(tmp_path)
    method = {"name": "deepinversion", "iterations": 5, "batch_size": 10}
    shared = {"teacher": str(teacher), "images": 30, "images_per_shard": 10}
    (tmp_path / "bank.yaml").write_text(yaml.safe_dump({"command": "synthesize", **shared, "method": method}))
    student = {"command": "distill", "bank": "X", "student": "lenet5_half_bn", "steps": 3, "protocol": "bank-fast"}
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(student))
    out = tmp_path / "result.json"
    words = ["bench", "inversion", "--recipe", str(tmp_path / "bank.yaml"), "--judge", str(judge), "--images", "20"]
    words += ["--distill", str(tmp_path / "student.yaml"), "--eval-data", data, "--threads", "1"]
    words += ["--work", str(tmp_path / "work"), "--out", str(out)]
    assert main(words) == 0
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert set(found["table"]) == {"deepinversion", "cross_entropy", "initial_noise"}
    assert all(row["n"] == 20 and 0 <= row["judge_top1"] <= 1 for row in found["table"].values())
    assert found["table"]["deepinversion"]["iterations"] == 5 and found["table"]["deepinversion"]["minutes"] > 0
    assert 0 <= found["student"]["top1"] <= 1 and 0 <= found["student"]["control"]["top1"] <= 1
    assert found["versions"]["torch"] and found["hardware"]["threads"] == 1
    assert main(words) == 0
    again = json.loads(out.read_text())
    assert again["table"] == found["table"] and again["student"] == found["student"]
