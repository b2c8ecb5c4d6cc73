"""Real processes: kill -9 and resume, and two ranks against one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synthkit.cli.main import main

SCRIPT = """
import sys
from synthkit.distillation import trainer
trainer.SAVE_SECONDS = 0.01
from synthkit.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """One thread, and the package of this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def one_thread():
    """Bits depend on the number of threads: this process computes as the others do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def distill_words(workshop, *more: str) -> list[str]:
    return ["distill", "--bank", str(workshop.bank), "--device", "cpu", "--batch_size", "32", *more]


def test_killed_and_resumed_is_bit_identical(workshop, tmp_path):
    """kill -9 of a real process at two moments, then --resume: the bytes of an uninterrupted run."""
    words = distill_words(workshop, "--student", "lenet5_half_bn", "--steps", "40", "--augment", "shift", "--resume")
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert main([*words, "--out", str(whole)]) == 0
    for wanted in (7, 21):
        command = [sys.executable, "-c", SCRIPT, *words, "--out", str(out)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment())
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if any(int(p.stem) >= wanted for p in (out / "state").glob("*.json")):
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.001)
        assert process.wait(60) == -signal.SIGKILL
    assert not (out / "student.safetensors").exists()
    assert main([*words, "--out", str(out)]) == 0
    assert (out / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
    records = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (p / "metrics.jsonl").open()]
        for p in (out, whole)
    ]
    assert records[0] == records[1]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())  # nothing is left behind


def test_two_processes_train_the_same_student_as_one(workshop, tmp_path):
    """20 steps of a network without BatchNorm, the same global batch: equal to 1e-5."""
    words = distill_words(workshop, "--student", "lenet5_half", "--steps", "20", "--augment", "shift")
    words += ["--optimizer", "sgd", "--lr", "0.02"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "synthkit.cli.main", *words, "--world", "2", "--out", str(tmp_path / "two")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        _, errors = process.communicate(timeout=250)
    except subprocess.TimeoutExpired:
        process.terminate()  # on this signal, and only on it, the launcher ends its ranks
        process.wait(30)
        raise
    assert process.returncode == 0, errors
    one, two = (load_file(str(tmp_path / n / "student.safetensors")) for n in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two")]
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["world"] == 2
