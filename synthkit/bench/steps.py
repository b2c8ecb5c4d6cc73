"""`synthkit bench steps`: what a method's steps cost against the bare networks that they cannot avoid.

The steps of a family are timed interleaved with the bare forward and backward of the same networks: no loss terms, no
normalisation, no statistics, no optimiser. The floor is the fastest bare form (both memory layouts are tried).
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthkit.config.schema import RuntimeConfig
from synthkit.errors import ConfigError
from synthkit.runtime import Runtime, hardware, peak_memory, versions, write_json

FAMILIES = ("generator", "inversion", "matching", "diffusion")
LAYOUTS = ("channels_last", "contiguous")


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What a family has timed."""

    run: Mapping[str, Callable[[], object]]
    """The steps and the bare networks, by name."""
    floors: Mapping[str, list[str]]
    """Step -> the bare pieces of which the fastest is its floor."""
    facts: dict[str, Any]
    """Networks, batch and settings, for the record."""
    before: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    """What is done before every run of a piece, untimed."""


def main(argv: list[str]) -> int:
    """Parse, measure, print JSON."""
    family = argparse.ArgumentParser(add_help=False)
    family.add_argument("--family", default="generator")
    name = family.parse_known_args(argv)[0].family
    if name not in FAMILIES:
        raise ConfigError("bench steps: --family: no such family", got=name, allowed=FAMILIES)
    module = importlib.import_module(f"synthkit.bench.steps_{name}")
    parser = argparse.ArgumentParser(prog="synthkit bench steps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", default="generator", choices=FAMILIES, help="whose steps (each has own options)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="precision of the steps")
    parser.add_argument("--repeats", type=int, default=7, help="timed repetitions; the median counts")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    module.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise ConfigError("bench steps: --repeats must be at least 1", got=args.repeats)
    result = module.measure(args) if hasattr(module, "measure") else measure(args, module.build)
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def measure(args: argparse.Namespace, build: Callable[[argparse.Namespace, Runtime], Pieces]) -> dict[str, Any]:
    """Medians of all pieces that `build` gives, interleaved in one run."""
    runtime = Runtime.create(RuntimeConfig(device=args.device, precision=args.precision, threads=args.threads))
    pieces = build(args, runtime)
    seconds = timed(pieces.run, args.repeats, cuda=runtime.device.type == "cuda", before=pieces.before)
    floor = {step: min(seconds[bare] for bare in bares) for step, bares in pieces.floors.items()}
    return {
        "what": "CPU seconds (process time)" if runtime.device.type == "cpu" else "wall seconds, synchronised",
        "family": args.family,
        **pieces.facts,
        "repeats": args.repeats,
        "seconds": {name: round(value, 5) for name, value in seconds.items()},
        "floor": {name: round(value, 5) for name, value in floor.items()},
        "ratio": {name: round(seconds[name] / floor[name], 4) for name in floor},
        "runtime": runtime.describe(),
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "hardware": hardware(),
    }


def timed(
    pieces: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    cuda: bool,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """Median seconds of every piece over interleaved repetitions, after two warm-up rounds."""
    found: dict[str, list[float]] = {name: [] for name in pieces}
    for round_ in range(repeats + 2):
        for name, piece in pieces.items():
            if before and name in before:
                before[name]()
            if cuda:
                import torch

                torch.cuda.synchronize()
                start = time.perf_counter()
                piece()
                torch.cuda.synchronize()
                spent = time.perf_counter() - start
            else:
                start = time.process_time()
                piece()
                spent = time.process_time() - start
            if round_ >= 2:
                found[name].append(spent)
    return {name: statistics.median(values) for name, values in found.items()}
