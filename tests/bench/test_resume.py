"""`synthkit bench resume`, small: two kills of a run of a few steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from workshop import save_teacher

from synthkit.bank.make import bank_from_arrays
from synthkit.bench import resume
from synthkit.errors import UsageError

TINY = (
    *("--images", "60", "--images_per_shard", "10", "--method.epochs", "3", "--method.ep_steps", "10"),
    *("--method.student", "lenet5_half", "--method.batch_size", "16", "--method.nz", "8", "--method.width", "4"),
)


def test_two_kills(tmp_path, capsys):
    card = save_teacher(tmp_path / "teacher")
    out, work = tmp_path / "found.json", tmp_path / "work"
    words = ["--teacher", str(card), "--kills", "2", "--kill-seed", "3", *TINY, "--out", str(out), "--work", str(work)]
    assert resume.main(words) == 0
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["equal"] and found["all_verified"] and found["byproducts_equal"] and found["leftovers"] == []
    assert found["kills"] == len(found["moments"]) == 2 and found["shards"] == len(found["shard_sha256"]) == 6
    assert {moment["kind"] for moment in found["moments"]} <= set(resume.KINDS)
    assert found["config"]["images"] == 60 and found["config"]["runtime"]["threads"] == 1


def campaign(tmp_path: Path, reference: dict[int, str]) -> resume._Campaign:
    whole = resume._Leg.__new__(resume._Leg)
    return resume._Campaign([], tmp_path, whole, reference, np.random.default_rng(0))


def test_other_bytes_and_damage_are_seen(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4), dtype=np.uint8)
    bank = bank_from_arrays(
        tmp_path / "killed0", images, num_classes=2, mean=[0.5], std=[0.5], images_per_shard=5
    )  # fmt: skip
    reference = {s.index: s.sha256 for s in bank.sidecars}
    assert campaign(tmp_path, reference)._check() == []
    assert campaign(tmp_path, {**reference, 2: "0" * 64})._check() == ["shard 2: other bytes than in the unbroken run"]
    shard = tmp_path / "killed0" / "shards" / "00001.h5"
    shard.write_bytes(shard.read_bytes()[:-1])
    problems = campaign(tmp_path, reference)._check()
    assert len(problems) == 1 and problems[0].startswith("shard 1: ")


def test_defaults_give_way_to_flags():
    words = resume._with_defaults(["--images=7", "--method.ep-steps", "3"])
    assert words.count("--images") == 0 and words.count("--method.ep_steps") == 0
    assert words[-3:] == ["--images=7", "--method.ep-steps", "3"] and "--method.epochs" in words


@pytest.mark.parametrize(
    "words", [["--kills", "0"], ["--resume"], ["--method.lrg", "1"], ["--method", "cudfdk"], ["--help"]]
)
def test_wrong_flags(words, tmp_path):
    if words == ["--help"]:
        with pytest.raises(SystemExit) as left:
            resume.main(words)
        assert left.value.code == 0
        return
    with pytest.raises(UsageError):
        resume.main(["--teacher", "lenet5_bn", "--work", str(tmp_path / "work"), *words])
    assert not (tmp_path / "work").exists()


def test_a_work_folder_in_use(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        resume.kill_and_resume(["--teacher", "lenet5_bn"], kills=1, work=tmp_path)


def test_sigterm_leaves_no_run_behind(tmp_path):
    """The run that is being measured ends with the campaign."""
    card = save_teacher(tmp_path / "teacher")
    words = ["--teacher", str(card), "--kills", "1", *TINY, "--images", "60000", "--work", str(tmp_path / "work")]
    code = f"from synthkit.bench import resume\nresume.main({words!r})"
    environment = {**os.environ, "PYTHONPATH": str(Path(resume.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    campaign = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (runs := psutil.Process(campaign.pid).children()) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(runs) == 1 and "synthesize" in runs[0].cmdline()
    campaign.terminate()
    assert campaign.wait(30) == 128 + signal.SIGTERM
    assert psutil.wait_procs(runs, timeout=10)[1] == []
