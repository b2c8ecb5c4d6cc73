"""`synthkit bench engines`: the four engines side by side, one table.

Every engine makes a bank of the same number of images for the same teacher; the same student is trained from each bank
alone, for the same steps and over the same seeds; the controls are banks of noise and of random real images. Each
command runs in a process of its own, so that time and peak memory are the engine's; all of it can be resumed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkit.cli.arguments import Arguments
from synthkit.errors import ConfigError, RunError
from synthkit.runtime import RunDir, format_seconds, hardware, versions, write_json


@dataclass(frozen=True)
class Engine:
    """One row of the table."""

    method: str
    family: str
    recipe: str | None = None
    """Recipe of the bank; none is the method's defaults."""
    data: bool = False
    """Whether it is given the real training data."""
    model: bool = False
    """Whether it samples the diffusion model."""


ENGINES = (
    Engine("cudfkd", "generator", "mnist/cudfkd-lenet5_bn-demo"),
    Engine("deepinversion", "inversion", "mnist/deepinversion-lenet5_bn"),
    Engine("mtt", "matching", "mnist/mtt-lenet5_bn", data=True),
    Engine("diffusion", "diffusion", "mnist/diffusion-lenet5_bn", model=True),
    Engine("random_real", "control", data=True),
    Engine("noise", "control"),
)


def main(argv: list[str]) -> int:
    """Parse, run, print JSON."""
    parser = Arguments(prog="synthkit bench engines", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="real data spec (mnist:DIR); its test split judges")
    parser.add_argument("--teacher", default="lenet5_bn", help="model spec of the teacher")
    parser.add_argument("--images", type=int, default=1000, help="images of every bank (1000)")
    parser.add_argument("--distill", default="mnist/distill-lenet5_half_bn-demo", help="recipe of the student")
    parser.add_argument("--steps", type=int, default=2000, help="steps of every student (2000)")
    parser.add_argument("--seeds", type=int, default=3, help="students of every bank (3)")
    parser.add_argument("--unet", type=Path, default=None, help="diffusion model (none trains mnist/teach-unet first)")
    parser.add_argument("--only", default=None, help="comma-separated methods instead of all")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every process (1)")
    parser.add_argument("--work", type=Path, required=True, help="folder for banks and runs (resumed when it exists)")
    parser.add_argument("--picture", type=Path, default=None, help="also write a PNG with a panel of every bank")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse(argv)
    for name in ("images", "steps", "seeds", "threads"):
        if getattr(args, name) < 1:
            raise ConfigError(f"bench engines: --{name} must be at least 1", got=getattr(args, name))
    result = measure(args)
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rows, one after the other."""
    known = {engine.method: engine for engine in ENGINES}
    names = [n.strip() for n in args.only.split(",")] if args.only else list(known)
    for name in names:
        if name not in known:
            raise ConfigError("bench engines: --only: not a row of the table", got=name, allowed=known)
    rows = []
    for name in names:
        engine = known[name]
        unet = _unet(args) if engine.model else None
        bank = _bank(args, engine, unet)
        rows.append(row_of(engine, bank, _students(args, engine, bank), unet))
        top1 = rows[-1]["student_top1"]
        print(f"{name}: student {100 * top1['mean']:.2f} %", file=sys.stderr, flush=True)
    if args.picture:
        picture({name: args.work / f"bank-{name}" for name in names}, args.picture)
    return {
        "what": "the same student from banks of four engines: same teacher, images, steps and seeds; last epoch",
        "teacher": args.teacher,
        "data": args.data,
        "images": args.images,
        "student": {"recipe": args.distill, "steps": args.steps, "seeds": args.seeds},
        "threads": args.threads,
        "rows": rows,
        "versions": versions(),
        "hardware": hardware(),
    }


def row_of(engine: Engine, bank: Path, students: dict[str, Any], unet: Path | None) -> dict[str, Any]:
    """One row from what the commands wrote."""
    from synthkit.bank import Bank

    run, record = RunDir(bank).read_json("run.json"), Bank(bank)
    spec = record.spec
    needs = ["teacher"] if spec.teacher else []
    needs += ["real images" if engine.data else "a model trained on real images"] if spec.real_data_used else []
    before = (RunDir(unet).read_json("run.json") or {}) if unet else {}
    return {
        "method": engine.method,
        "family": engine.family,
        "data_needed": needs,
        "contains_real": spec.contains_real,
        "images": len(record),
        "student_top1": students["top1"],
        "student_agreement": students.get("eval_agreement"),
        "seconds": run["seconds"],
        "cpu_seconds": run["cpu_seconds"],
        "preparation_seconds": before.get("seconds", run.get("preparation_seconds", 0.0)),
        "peak_memory_bytes": run["peak_memory_bytes"],
        "bytes": record.info()["bytes"],
        "recipe": spec.recipe,
    }


def _unet(args: argparse.Namespace) -> Path:
    out = args.unet or args.work / "unet"
    if args.unet is None:
        words = ["teach", "--config", "mnist/teach-unet", "--data", args.data, "--out", str(out), "--resume"]
        _run(args, *words)
    return out


def _bank(args: argparse.Namespace, engine: Engine, unet: Path | None) -> Path:
    out = args.work / f"bank-{engine.method}"
    words = ["--config", engine.recipe] if engine.recipe else ["--method", engine.method]
    words += ["--teacher", args.teacher, "--images", str(args.images), "--out", str(out), "--resume"]
    words += ["--data", args.data] if engine.data else []
    words += ["--method.model", str(unet)] if unet else []
    _run(args, "synthesize", *words)
    return out


def _students(args: argparse.Namespace, engine: Engine, bank: Path) -> dict[str, Any]:
    """The headline of the students of `bank`: stored images alone, so that no engine has its generator at hand."""
    out = args.work / f"students-{engine.method}"
    _run(
        args, "distill", "--config", args.distill, "--bank", str(bank), "--teacher", args.teacher, "--fresh", "0",
        "--holdout", "0", "--steps", str(args.steps), "--seeds", str(args.seeds), "--eval_data", args.data,
        "--out", str(out), "--resume",
    )  # fmt: skip
    found = RunDir(out).read_json("summary.json" if args.seeds > 1 else "result.json")
    if args.seeds == 1:
        return {name: {"mean": value, "std": 0.0, "n": 1} for name, value in found.items() if isinstance(value, float)}
    return found


def _run(args: argparse.Namespace, *words: str) -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", "synthkit", *words, "--threads", str(args.threads)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise RunError(f"bench engines: {' '.join(words[:3])} ended with {done.returncode}", hint=" ".join(command))
    print(f"{words[0]} {words[2]}: {format_seconds(time.monotonic() - began)}", file=sys.stderr, flush=True)


def picture(banks: dict[str, Path], out: Path) -> None:
    """A panel of every bank as one PNG."""
    from synthkit.bank import Bank
    from synthkit.report.panels import panels

    out.parent.mkdir(parents=True, exist_ok=True)
    panels({name: Bank(path) for name, path in banks.items()}).save(out, optimize=True)
