"""`synthkit bench ranks`: two processes (gloo) against one with the same global batch, and a killed rank.

Every case trains the same student for a few steps of a bank in one process and in two; `difference` is the largest
absolute one of any weight or running statistic, `largest` the largest of their values, `control` the difference of two
runs of one process, with one and with two threads: what the order of sums alone does to that student. float64 shows the
arithmetic; in float32, torch's channels-last BatchNorm on CPU is off by a part in ten thousand, which the steps
amplify. Then rank 1 of a pair is killed with kill -9 in the middle: how long the other takes to end, what it says, and
whether the resumed pair gives the bytes of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from synthkit.cli.arguments import Arguments
from synthkit.errors import RunError
from synthkit.runtime import hardware, versions, write_json

CASES = {
    "kd": ["--loss", "kd"],
    "kd+10*sp": ["--loss", "kd+10*sp"],
    "kd+rkd+fitnet, 2 micro-batches": ["--loss", "kd+rkd+fitnet", "--accumulate", "2"],
}
TIMEOUT = 900  # seconds for one run
RANK = """
import os, sys
import torch
from synthkit.distillation import trainer
from synthkit.models.view import ModelView
dtype, die_at, *words = sys.argv[1:]
torch.set_default_dtype(getattr(torch, dtype))
normalize = ModelView.normalize
ModelView.normalize = lambda view, images: normalize(view, images).to(getattr(torch, dtype))
if int(die_at) and os.environ.get("RANK") == "1":
    average, calls = trainer.average_gradients, []
    def dying(parameters):
        calls.append(1)
        if len(calls) > int(die_at):
            os.kill(os.getpid(), 9)
        average(parameters)
    trainer.average_gradients = dying
trainer.SAVE_SECONDS = 0.0
from synthkit.cli.main import main
sys.exit(main(words))
"""


def main(argv: list[str]) -> int:
    """Parse, run, print JSON."""
    parser = Arguments(prog="synthkit bench ranks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bank", default="assets/banks/mnist-eval", help="any bank (the embedded one)")
    parser.add_argument("--teacher", default="lenet5_bn", help="model spec (lenet5_bn)")
    parser.add_argument("--students", default="lenet5_half,resnet8", help="comma-separated architectures")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps (20)")
    parser.add_argument("--batch-size", type=int, default=32, help="global batch (32)")
    parser.add_argument("--dtypes", default="float64,float32", help="comma-separated")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse(argv)
    words = ["distill", "--bank", str(args.bank), "--teacher", args.teacher, "--augment", "shift", "--lr", "0.005",
             "--device", "cpu", "--steps", str(args.steps), "--batch_size", str(args.batch_size)]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="synthkit-ranks-") as folder:
        root = Path(folder)
        rows = []
        for student, dtype, case in itertools.product(args.students.split(","), args.dtypes.split(","), CASES):
            place, own = root / f"row{len(rows)}", [*words, "--student", student, *CASES[case]]
            rows.append({"student": student, "dtype": dtype, "case": case, **_case(place, dtype, own)})
            print(
                f"{student} {dtype} {case}: {rows[-1]['difference']:.2g} ({rows[-1]['control']:.2g})",
                file=sys.stderr,
                flush=True,
            )
        last = args.students.split(",")[-1]
        killed = _killed(root / "killed", [*words, "--student", last, "--loss", "kd"], at=max(2, args.steps * 2 // 3))
    result = {
        "what": "two processes (gloo) against one, same global batch; kill -9 of rank 1, then resume",
        "steps": args.steps, "batch_size": args.batch_size, "rows": rows, "killed": killed,
        "versions": versions(), "hardware": hardware(),
    }  # fmt: skip
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def _case(root: Path, dtype: str, words: list[str]) -> dict[str, Any]:
    _expect(_run([*words, "--out", str(root / "one")], dtype, world=1))
    _expect(_run([*words, "--out", str(root / "two")], dtype, world=2))
    _expect(_run([*words, "--out", str(root / "control")], dtype, world=1, threads=2))
    one, two, control = (_weights(root / name) for name in ("one", "two", "control"))
    moved = [k for k in one if one[k].is_floating_point()]
    losses = [json.loads((root / n / "result.json").read_text())["loss"] for n in ("one", "two")]
    return {
        "difference": max(float((one[k].double() - two[k].double()).abs().max()) for k in moved),
        "control": max(float((one[k].double() - control[k].double()).abs().max()) for k in moved),
        "largest": max(float(one[k].double().abs().max()) for k in moved),
        "loss_one": losses[0],
        "loss_two": losses[1],
    }


def _killed(root: Path, words: list[str], *, at: int) -> dict[str, Any]:
    """Rank 1 dies in step `at` + 1; the pair is started again with --resume."""
    _expect(_run([*words, "--out", str(root / "whole")], "float32", world=2))
    again = [*words, "--out", str(root / "run"), "--resume"]
    found = _run(again, "float32", world=2, die_at=at)
    codes = [code for code, _, _ in found]
    if codes[1] != -signal.SIGKILL:
        raise RunError("bench ranks: rank 1 was not killed", got=codes)
    said = [line for line in found[0][1].splitlines() if "error:" in line]
    _expect(_run(again, "float32", world=2))
    same = _bytes(root / "whole") == _bytes(root / "run")
    return {
        "step": at + 1,
        "exit_code_of_the_other": codes[0],
        "seconds_until_it_ended": found[0][2] - found[1][2],
        "it_said": said[-1] if said else None,
        "resumed_is_byte_identical": same,
    }


def _run(
    words: list[str], dtype: str, *, world: int, die_at: int = 0, threads: int = 1
) -> list[tuple[int, str, float]]:
    """(exit code, standard error, moment of its end) of every rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", RANK, dtype, str(die_at), *words, *(["--world", "2"] if world == 2 else [])]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world)]
        ranks, ended = _start(command, files, port, threads), {}
        deadline = time.monotonic() + TIMEOUT
        try:
            while len(ended) < world:
                ended |= {i: time.monotonic() for i, p in enumerate(ranks) if i not in ended and p.poll() is not None}
                if time.monotonic() > deadline:
                    raise RunError("bench ranks: a run did not end", got=f"{TIMEOUT} s", hint="use fewer --steps")
                time.sleep(0.02)
        finally:
            for process in ranks:
                process.kill()
        found = []
        for index, file in enumerate(files):
            file.seek(0)
            found.append((ranks[index].returncode, file.read(), ended[index]))
    return found


def _start(command: list[str], files: list[Any], port: str, threads: int) -> list[subprocess.Popen[bytes]]:
    ranks, world = [], len(files)
    for rank, file in enumerate(files):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world > 1 else {}  # fmt: skip
        own = {**os.environ, "OMP_NUM_THREADS": str(threads), **where}
        ranks.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=own))
    return ranks


def _expect(found: list[tuple[int, str, float]]) -> None:
    for code, said, _ in found:
        if code:
            raise RunError("bench ranks: a run failed", got=said[-800:])


def _weights(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(str(run / "student.safetensors"))


def _bytes(run: Path) -> bytes:
    return (run / "student.safetensors").read_bytes()
