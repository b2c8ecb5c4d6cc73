"""Real processes: kill -9 and resume, and two ranks against one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synthkit.cli.main import main
from synthkit.models.view import ModelView

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


# --- several runs in one pair of ranks --------------------------------------------------------------------------------

PAIR = """
import json, os, sys
import torch
from synthkit.cli.main import main
from synthkit.distillation import trainer
from synthkit.models.view import ModelView
torch.set_default_dtype(torch.float64)
normalize = ModelView.normalize
ModelView.normalize = lambda view, images: normalize(view, images).double()
jobs, die_at = json.loads(sys.argv[1]), int(sys.argv[2])
if die_at and os.environ["RANK"] == "1":
    average, calls = trainer.average_gradients, []
    def dying(parameters):
        calls.append(1)
        if len(calls) > die_at:
            os.kill(os.getpid(), 9)
        average(parameters)
    trainer.average_gradients = dying
codes = [main(words) for words in jobs]
sys.exit(max(codes))
"""

CASES = {
    "kd": [],
    "relational": ["--loss", "sp"],
    "relational accumulated": ["--loss", "kd+rkd", "--accumulate", "2"],
    "modules of the loss": ["--loss", "fitnet", "--accumulate", "2"],
}


@pytest.fixture
def double(monkeypatch):
    """Networks in float64, as in `PAIR`: in float32 the channels-last BatchNorm of torch on CPU has gradients that are
    off by a part in ten thousand, which 20 steps with BatchNorm blow up to percents and so hide what is tested."""
    normalize = ModelView.normalize
    monkeypatch.setattr(ModelView, "normalize", lambda view, images: normalize(view, images).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def bn_words(workshop, case: str) -> list[str]:
    """20 steps of a network with BatchNorm."""
    words = ["distill", "--bank", str(workshop.bank), "--device", "cpu", "--student", "resnet8", "--steps", "20"]
    words += ["--batch_size", "16", "--augment", "crop_flip", "--optimizer", "sgd", "--lr", "0.02"]
    return [*words, *CASES[case]]


def run_pair(jobs: list[list[str]], *, die_at: int = 0) -> list[tuple[int, str]]:
    """(exit code, standard error) of both ranks, started without a launcher that would end the other one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(2):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = [sys.executable, "-c", PAIR, json.dumps([[*job, "--world", "2"] for job in jobs]), str(die_at)]
        processes.append(
            subprocess.Popen(
                words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment() | where
            )
        )
    try:
        return [(p.returncode, said) for p in processes for said in [p.communicate(timeout=250)[1]]]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def pair(workshop, tmp_path_factory) -> tuple[Path, str]:
    """The runs of all cases by two ranks, and what the first said."""
    root = tmp_path_factory.mktemp("pair")
    found = run_pair([[*bn_words(workshop, case), "--out", str(root / case)] for case in CASES])
    assert [code for code, _ in found] == [0, 0], found
    assert not [line for line in found[1][1].splitlines() if line.startswith("distill:")]  # the first speaks for all
    return root, found[0][1]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_batchnorm_train_the_same_student_as_one(workshop, pair, double, tmp_path, case):
    """The same global batch: equal to 1e-5 after 20 steps, weights and running statistics."""
    root, said = pair
    assert "2 process(es)" in said
    assert main([*bn_words(workshop, case), "--out", str(tmp_path / "one")]) == 0
    one, two = (load_file(str(p / "student.safetensors")) for p in (tmp_path / "one", root / case))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    results = [json.loads((p / "result.json").read_text()) for p in (tmp_path / "one", root / case)]
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)


def test_a_killed_rank_ends_the_run_and_resume_goes_on(workshop, pair, tmp_path):
    """kill -9 of rank 1 in step 13: rank 0 ends with a typed error; resumed, the bytes of an uninterrupted pair."""
    words = [*bn_words(workshop, "kd"), "--out", str(tmp_path / "run"), "--resume"]
    began = time.monotonic()
    (code, said), (killed, _) = run_pair([words], die_at=12)
    assert killed == -signal.SIGKILL and code == 1
    assert "another process of this run is gone or does not answer" in said and "--resume" in said
    assert "Traceback" not in said
    assert time.monotonic() - began < 120  # far below the half hour of the backend's own patience
    assert not (tmp_path / "run" / "student.safetensors").exists()
    assert list((tmp_path / "run" / "state").glob("*.json"))  # of the end of the first epoch
    assert [code for code, _ in run_pair([words])] == [0, 0]
    expected = (pair[0] / "kd" / "student.safetensors").read_bytes()
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == expected


def test_the_wrong_number_of_processes_is_refused(workshop, tmp_path, capsys):
    """Two were asked for, this is one: nothing is trained."""
    words = distill_words(workshop, "--student", "lenet5_half", "--world", "2", "--out", str(tmp_path / "o"))
    assert main(words) == 1
    assert "2 processes were asked for (--world); got 1" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
