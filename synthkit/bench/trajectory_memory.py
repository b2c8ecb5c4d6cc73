"""`synthkit bench trajectory_memory`: memory and time of the trajectory-matching engines at several numbers of steps.

Every (engine, N) runs in a process of its own: one outer iteration of MTT on fresh weights and random pixels. Reported
are the bytes that autograd held at once (counted), the growth of the peak resident memory, and the seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from synthkit.errors import ConfigError, RunError
from synthkit.runtime import Runtime, hardware, peak_memory, versions, write_json

ENGINES = ("sweep", "unroll", "tesla")


def main(argv: list[str]) -> int:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(
        prog="synthkit bench trajectory_memory", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--arch", default="convnet", help="network")
    parser.add_argument("--side", type=int, default=32, help="height and width of the images (three channels)")
    parser.add_argument("--classes", type=int, default=10, help="number of classes")
    parser.add_argument("--batch", type=int, default=10, help="synthetic images per step")
    parser.add_argument("--steps", default="10,30,50", help="comma-separated numbers of student steps")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions; the fastest counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)  # "ENGINE:N" in a process of its own
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(one(args, *args.one.split(":"))))
        return 0
    try:
        steps = [int(n) for n in args.steps.split(",")]
    except ValueError as error:
        raise ConfigError("bench trajectory_memory: --steps: whole numbers", got=args.steps) from error
    rows = [_child(argv, f"{engine}:{n}") for n in steps for engine in ENGINES]
    result = {
        "what": "one outer iteration of trajectory matching: bytes held for backward, growth of peak memory, seconds",
        "arch": args.arch,
        "image": [3, args.side, args.side],
        "batch": args.batch,
        "parameters": rows[0].pop("parameters"),
        "repeats": args.repeats,
        "rows": [{key: value for key, value in row.items() if key != "parameters"} for row in rows],
        "versions": versions(),
        "hardware": hardware(),
    }
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def _child(argv: list[str], what: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "synthkit", "bench", "trajectory_memory", *argv, "--one", what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"bench trajectory_memory: {what} failed", got=done.stderr[-500:])
    return json.loads(done.stdout)


def one(args: Any, engine: str, steps: str) -> dict[str, Any]:
    """Measure `engine` at `steps` student steps in this process."""
    from synthkit.config.schema import RuntimeConfig
    from synthkit.synthesis.memory import SavedBytes

    Runtime.create(RuntimeConfig(device="cpu", threads=args.threads))
    run, size = problem(args, int(steps))
    warm, _ = problem(args, 1)
    step(warm, "sweep", args)  # libraries and their workspaces are loaded
    before, seconds, cpu = peak_memory(), [], []
    for _ in range(args.repeats):
        begun, used = time.perf_counter(), time.process_time()
        step(run, engine, args)
        seconds.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - used)
    grown = peak_memory() - before
    with SavedBytes() as saved:
        step(run, engine, args)
    return {
        "engine": engine,
        "steps": int(steps),
        "saved_bytes": saved.bytes,
        "resident_growth_bytes": grown,
        "seconds": round(min(seconds), 4),
        "cpu_seconds": round(min(cpu), 4),
        "parameters": size,
    }


def problem(args: Any, steps: int) -> tuple[Any, int]:
    """An inner run of `steps` steps on fresh weights, all images in every step, and the number of weights."""
    import torch
    import torch.nn.functional as F

    from synthkit.models.build import build_model
    from synthkit.synthesis.matching.engines import InnerRun
    from synthkit.synthesis.matching.flat import FlatNetwork, flattened

    module = build_model(args.arch, num_classes=args.classes, image_size=args.side, seed=0)
    start, network = flattened(module), FlatNetwork(module)
    run = InnerRun(
        loss=lambda theta, images, labels: F.cross_entropy(network(theta, images), labels),
        start=start,
        target=start + 0.01,
        batches=[torch.arange(args.batch)] * steps,
        augment=[lambda images: images] * steps,
    )
    return run, network.size


def step(run: Any, engine: str, args: Any) -> None:
    """One outer iteration on random pixels."""
    import torch

    from synthkit.synthesis.matching.engines import ENGINES as FUNCTIONS

    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(args.batch, 3, args.side, args.side, generator=draw)
    FUNCTIONS[engine](run, pixels, torch.arange(args.batch) % args.classes, torch.tensor(0.01))
