"""Kill -9 at random moments of writing: what was committed verifies, and the end result has the same bytes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import synthkit
from synthkit.bank import Bank, BankNotFoundError, BankWriter

from .test_writer import hashes

ROOT = Path(synthkit.__file__).parent.parent
SCRIPT = """
import sys
import numpy as np
from synthkit.bank import BankSpec, BankWriter
spec = BankSpec(shape=(3, 32, 32), num_classes=10, mean=[0.5]*3, std=[0.2]*3, images=4000, images_per_shard=100)
writer = BankWriter.open_or_create(sys.argv[1], spec)
with writer.lock():
    print("go", flush=True)
    found = writer.load_state()
    index, value = (found[0], int(found[1]["value"])) if found else (0, 1)
    while index < writer.shards:
        rng = np.random.default_rng(value)
        shard = {"images": rng.integers(0, 256, (100, 3, 32, 32), dtype=np.uint8), "labels": rng.integers(0, 10, 100)}
        value, index = int(rng.integers(2**60)), index + 1
        writer.save_state(index, {"value": np.array(value)}, {})
        writer.write_shard(index - 1, shard)
        writer.prune_states()
"""


def run(path: Path, seconds: float | None) -> int:
    """Run the writer; kill it `seconds` after it has begun to write."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    if seconds is not None:
        time.sleep(seconds)
        child.kill()
    _, errors = child.communicate(timeout=60)
    if seconds is None:
        assert child.returncode == 0, errors.decode()
    return child.returncode


def test_kill_and_resume_gives_the_same_bytes(tmp_path):
    run(tmp_path / "whole", None)
    chance, killed, seen = random.Random(1), 0, 0
    for _ in range(8):
        killed += run(tmp_path / "b", chance.uniform(0, 0.08)) == -9
        report = Bank(tmp_path / "b").verify(deep=True)
        assert report.ok, report.problems
        assert len(report.committed) >= seen  # nothing that was committed is ever lost
        seen = len(report.committed)
    assert killed >= 3
    run(tmp_path / "b", None)
    assert hashes(tmp_path / "b") == hashes(tmp_path / "whole")
    assert not [p for p in (tmp_path / "b").rglob("*") if ".tmp-" in p.name]
    assert Bank(tmp_path / "b").info()["root"] == Bank(tmp_path / "whole").info()["root"]


def test_reader_never_sees_a_bank_before_its_record(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(BankNotFoundError):
        Bank(tmp_path / "b")
    with pytest.raises(BankNotFoundError):
        BankWriter.open(tmp_path / "b")
