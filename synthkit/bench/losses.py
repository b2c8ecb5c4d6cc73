"""`synthkit bench losses`: every distillation loss on one bank, same teacher, student and epochs, over seeds.

On a bank of labelled real images (`--beside ce`) a method stands beside the cross-entropy, with the weight that it was
published with; on a synthetic bank (`--beside kd`) beside KD, with the teacher's argmax where it needs labels. The
headline is the last epoch on `--eval-data`; the controls are plain cross-entropy, plain KD, and KD from a teacher that
knows nothing. Every difference to KD is over the same seeds. Resumed when `--work` exists.

`pull` of a row is the norm of its method's gradient on the student's weights at the first step, in units of the plain
row's (`ce` or `kd`, as `--beside` says). With `--even` a method that falls below the plain row, and begins more than
three times as hard or as softly, is trained once more with its weight changed so that it begins as hard: what is then
still lost is not lost by the weight.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthkit.bench.losses_plan import METHODLESS, UNEVEN, Row, evened, rows
from synthkit.bench.pipeline import spread
from synthkit.cli.arguments import Arguments
from synthkit.config.parse import parse_config
from synthkit.errors import ConfigError, ModelError, NonFiniteError, RequirementError, UsageError
from synthkit.runtime import RunDir, hardware, versions, write_json

FAILURES = (NonFiniteError, ConfigError, ModelError, RequirementError)


def main(argv: list[str]) -> int:
    """Parse, run, print JSON."""
    parser = Arguments(prog="synthkit bench losses", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bank", required=True, help="the images; labelled real ones with --beside ce")
    parser.add_argument("--teacher", required=True, help="model spec")
    parser.add_argument("--second-teacher", default=None, help="model spec; rows of several teachers need it")
    parser.add_argument("--student", required=True, help="architecture, trained from fresh weights")
    parser.add_argument("--eval-data", required=True, help="data spec; its test split judges the last epoch")
    parser.add_argument("--beside", choices=["ce", "kd"], required=True, help="what stands beside a method")
    parser.add_argument(
        "--control", default=None, help="data spec: KD on as many random real images of its train split, as a row"
    )
    parser.add_argument("--losses", default=None, help="comma-separated rows (none: all)")
    parser.add_argument("--protocol", default="auto", help="named preset (synthkit list protocols)")
    parser.add_argument("--epochs", type=int, required=True, help="passes over the bank")
    parser.add_argument("--lr", type=float, default=None, help="instead of the protocol's rate")
    parser.add_argument("--seeds", type=int, default=3, help="students of every loss (3)")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs (resumed when it exists)")
    parser.add_argument("--even", action="store_true", help="again with the weight under which a method begins even")
    parser.add_argument("--only-runs", action="store_true", help="make the runs, leave the table to a later call")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse(argv)
    result = measure(args)
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The table."""
    plan = rows(args.beside)
    if args.second_teacher is None:
        plan = {name: row for name, row in plan.items() if row.teachers < 2}
    if args.control is not None:  # the same student, loss and steps; only the images differ
        plan |= {
            f"control_{k}": replace(plan["kd"], config={"control": v})
            for k, v in (("real", args.control), ("noise", "noise"))
        }
    names = list(plan) if args.losses is None else [n.strip() for n in args.losses.split(",") if n.strip()]
    for name in names:
        if name not in plan:
            raise ConfigError("bench losses: --losses: no such row", got=name, allowed=plan)
    _check(args)
    norm = max(_pull(args.beside, plan[args.beside], args, ()), 1e-12)
    plain = _mean(_row(args.beside, plan[args.beside], args)) if args.even else 0.0
    made: dict[str, Any] = {}
    for name in names:
        made[name] = _made(name, plan[name], args)
        made[name]["pull"] = ratio = _pull(name, plan[name], args, METHODLESS) / norm
        uneven = ratio > 0 and not 1 / UNEVEN <= ratio <= UNEVEN
        if uneven and _mean(made[name]) < plain and (even := evened(plan[name], 1 / ratio)):
            made[f"{name}_even"] = _made(f"{name}_even", even, args) | {"pull": 1.0}
    if not args.only_runs and "kd" in made and "values" in (made["kd"].get("top1") or {}):
        for row in made.values():
            if row["top1"] is not None:
                row["above_kd"] = _paired(row["top1"]["values"], made["kd"]["top1"]["values"])
    return {
        "what": "every distillation loss on one bank: top-1 of the last epoch, over seeds",
        **{k: str(v) for k, v in vars(args).items() if k in ("bank", "teacher", "student", "eval_data", "beside")},
        "images": _count(args.bank),
        "protocol": args.protocol,
        "epochs": args.epochs,
        "precision": args.precision,
        "teacher_top1": next((r["teacher_top1"] for r in made.values() if r["teacher_top1"] is not None), None),
        "rows": made,
        "versions": versions(),
        "hardware": hardware(),
    }


def _mean(row: dict[str, Any]) -> float:
    """Accuracy, 0 of a row that failed."""
    return 0.0 if row["top1"] is None else float(row["top1"]["mean"])


def _made(name: str, row: Row, args: argparse.Namespace) -> dict[str, Any]:
    made = _row(name, row, args)
    print(f"{name} ({row.loss}): {_text(made)}", file=sys.stderr, flush=True)
    return made


def _check(args: argparse.Namespace) -> None:
    """What all rows share is refused at once; what one loss cannot do is a result of its row."""
    from synthkit.data.specs import load_data
    from synthkit.models.build import load_model

    _count(args.bank)
    load_data(args.eval_data, "test")
    for spec in (args.teacher, args.second_teacher):
        if spec is not None:
            load_model(spec)
    load_model(args.student, weights="optional", seed=0)


def _row(name: str, row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """One loss over the seeds."""
    found: dict[str, Any] = {"loss": row.loss, "options": row.options, "config": row.config}
    results = []
    for seed in range(args.seeds):
        try:
            results.append(_run(name, row, seed, args))
        except FAILURES as error:  # that is its result
            return found | {"top1": None, "teacher_top1": None, "failed": f"seed {seed}: {error}"}
    extra = {k: results[0][k] for k in ("deployed_params", "plain_params", "deployed_flops", "plain_flops")
             if k in results[0]}  # fmt: skip
    if "plain_top1" in results[0]:
        extra["plain_top1"] = spread([r["plain_top1"] for r in results])
    return found | {
        "top1": spread([r["top1"] for r in results]),
        "teacher_top1": results[0].get("teacher_top1") if row.teachers == 1 else None,
        "agreement": spread([r["eval_agreement"] for r in results]) if row.teachers == 1 else None,
        "images_per_second": statistics.median(r["images_per_second"] for r in results),
        "cpu_seconds": statistics.median(r["cpu_seconds"] for r in results),
        **extra,
    }


def _pull(name: str, row: Row, args: argparse.Namespace, beside: tuple[str, ...]) -> float:
    """First gradient norm of the row's method: of all terms but those of `beside`, where it has others (seed 0)."""
    from synthkit.distillation.distill import distill

    norms = (_kept(args, name, 0) or {}).get("first_gradient_norms")
    folder = RunDir(args.work / "pulls")
    if norms is None:
        norms = folder.read_json(f"{name}.json")
    if norms is None:
        with tempfile.TemporaryDirectory(prefix="synthkit-bench-") as out:
            values = _values(row, 0, args) | {
                "out": out,
                "resume": False,
                "eval_data": None,
                "epochs": None,
                "steps": 1,
            }
            try:
                norms = distill(parse_config("distill", values)).metrics["first_gradient_norms"]
            except FAILURES:
                norms = {}
        folder.create().write_json(f"{name}.json", norms)
    own = [norm for term, norm in norms.items() if term not in beside] or list(norms.values())
    return math.hypot(*own)


def _kept(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any] | None:
    """The result of a run that is done."""
    folder = args.work / f"{name}-seed{seed}" / "bench"
    return RunDir(folder).read_json("result.json") if folder.is_dir() else None


def _run(name: str, row: Row, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    from synthkit.distillation.distill import distill

    kept = _kept(args, name, seed)
    if kept is not None:
        return kept
    path = args.work / f"{name}-seed{seed}"
    began = time.process_time()
    result = distill(parse_config("distill", _values(row, seed, args) | {"out": str(path)})).metrics
    result = result.get("control", result)  # of a control row only the control counts
    record = {**result, "cpu_seconds": time.process_time() - began}
    RunDir(path / "bench").create().write_json("result.json", record)
    return record


def _values(row: Row, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The distill config of one run, but for its place."""
    teacher = {0: f"random:{_arch(args.teacher)}", 2: f"{args.teacher},{args.second_teacher}"}
    values: dict[str, Any] = {
        "bank": args.bank, "student": args.student, "teacher": teacher.get(row.teachers, args.teacher),
        "loss": {"name": row.loss, **row.options}, "labels": _labels(row, args.beside), "holdout": 0.0,
        "eval_data": args.eval_data, "protocol": args.protocol, "epochs": args.epochs, "seed": seed, "fresh": 0.0,
        "resume": True, "runtime": {"precision": args.precision, "device": "cpu"}, **row.config,
    }  # fmt: skip
    if args.lr is not None:
        values["lr"] = args.lr
    return values


def _labels(row: Row, beside: str) -> str:
    """The label policy: real labels on real images, else the teacher's argmax, where the loss needs any."""
    from synthkit.tables import lookup

    kind = lookup("loss", row.loss)
    config = kind.Config(**row.options) if row.options else kind.Config()
    if not kind(config).requires.labels:
        return "none"
    return "stored" if beside == "ce" else "argmax"


def _count(bank: str) -> int:
    from synthkit.bank import Bank

    return len(Bank(bank))


def _arch(teacher: str) -> str:
    from synthkit.models.build import load_model

    return load_model(teacher).card.arch


def _paired(values: list[float], control: list[float]) -> dict[str, float] | None:
    """Mean difference over the same seeds and its standard error."""
    if len(values) != len(control):
        raise UsageError("bench losses: rows of different seeds", got=(len(values), len(control)))
    gaps = [a - b for a, b in zip(values, control, strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    return {"mean": statistics.fmean(gaps), "stderr": error, "n": len(gaps)}


def _text(row: dict[str, Any]) -> str:
    top1 = row["top1"]
    if top1 is None:
        return row["failed"]
    return f"{100 * top1['mean']:.2f} ± {100 * top1['std']:.2f} % (n {top1['n']}), {row['cpu_seconds']:.0f} CPU s"
