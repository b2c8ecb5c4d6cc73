"""`synthkit bench pipeline`: the main job over seeds as one measured result.

For every seed: `synthesize` a bank from the teacher without data, `distill` a fresh student from that bank alone, and
measure both (last epoch) on labelled data that took part in nothing. A noise control runs once beside them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from synthkit.cli.arguments import Arguments
from synthkit.config.parse import config_to_dict, load_recipe
from synthkit.config.schema import SynthesizeConfig
from synthkit.errors import ConfigError
from synthkit.runtime import RunDir, hardware, peak_memory, versions, write_json


def main(argv: list[str]) -> int:
    """Parse, run, print JSON."""
    parser = Arguments(prog="synthkit bench pipeline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--synthesize", required=True, help="recipe of the bank")
    parser.add_argument("--distill", required=True, help="recipe of the student (its `bank` is replaced)")
    parser.add_argument("--eval-data", required=True, help="labelled data spec; measured at the end only")
    parser.add_argument("--teacher", default=None, help="model spec instead of the recipe's teacher")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated seeds")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--work", type=Path, required=True, help="folder for banks and runs (resumed when it exists)")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse(argv)
    try:
        seeds = [int(s) for s in args.seeds.split(",")]
    except ValueError as error:
        raise ConfigError("--seeds: whole numbers separated by commas", got=args.seeds) from error
    overrides: dict[str, Any] = {"teacher": args.teacher} if args.teacher else {}
    result = pipeline(
        args.synthesize,
        args.distill,
        seeds=seeds,
        eval_data=args.eval_data,
        work=args.work,
        threads=args.threads,
        overrides=overrides,
        curve=True,
    )
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def pipeline(
    synthesize_recipe: str,
    distill_recipe: str,
    *,
    seeds: list[int],
    eval_data: str,
    work: Path,
    threads: int | None = None,
    overrides: dict[str, Any] | None = None,
    distill_overrides: dict[str, Any] | None = None,
    curve: bool = False,
) -> dict[str, Any]:
    """Run the main job for every seed under `work` (resuming what is there) and summarise it.

    Args:
        overrides, distill_overrides: fields on top of the recipes.
        curve: also measure the co-trained student along the run (diagnostic).

    Returns:
        JSON-ready dict: teacher, per-seed runs, mean and std (sample) of the last-epoch accuracies, control, seconds.
    """
    from synthkit.distillation.distill import distill
    from synthkit.synthesis.engine import synthesize

    runs, control, teacher_top1 = [], None, None
    for seed in seeds:
        runtime = {"runtime": {"threads": threads}} if threads else {}
        config: SynthesizeConfig = load_recipe(
            synthesize_recipe,
            {
                **(overrides or {}),
                **runtime,
                "seed": seed,
                "out": str(work / f"bank-seed{seed}"),
                "resume": True,
                **({"eval_data": eval_data} if curve else {}),
            },
        )
        started = time.monotonic()
        bank = synthesize(config)
        synthesized = time.monotonic()
        distill_config = load_recipe(
            distill_recipe,
            {
                **(distill_overrides or {}),
                **runtime,
                "bank": str(bank.path),
                "seed": seed,
                "eval_data": eval_data,
                "control": "noise" if seed == seeds[0] else "none",
                "out": str(work / f"student-seed{seed}"),
                "resume": True,
            },
        )
        student = distill(distill_config)
        distilled = time.monotonic()
        found = student.metrics
        teacher_top1 = found.get("teacher_top1", teacher_top1)
        if student.control:
            control = student.control
        made = RunDir(bank.path)
        runs.append(
            {
                "seed": seed,
                "student_top1": found["top1"],
                "agreement": found.get("eval_agreement"),
                "holdout_agreement": found.get("holdout_agreement"),
                "retention": found.get("retention"),
                "co_trained_top1": co_trained(bank.path, eval_data),
                "seconds": {
                    # a bank that was complete already tells its own time
                    "synthesize": max(synthesized - started, (made.read_json("run.json") or {}).get("seconds", 0.0)),
                    "distill_and_control": distilled - synthesized,
                },
                "co_trained_curve": [[r["step"], r["test_top1"]] for r in made.metrics() if "test_top1" in r],
                "bank": {k: bank.info()[k] for k in ("images", "balance", "mean_difficulty", "root", "bytes")},
            }
        )
        print(f"seed {seed}: student {100 * found['top1']:.2f} %", file=sys.stderr, flush=True)
    return {
        "what": "bank from the teacher alone, fresh student from the bank alone, last epoch",
        "teacher": {"spec": config.teacher, "top1": teacher_top1},
        "eval_data": eval_data,
        "eval_images": control and control.get("eval_images"),
        "student_top1": spread([r["student_top1"] for r in runs]),
        "co_trained_top1": spread([r["co_trained_top1"] for r in runs]),
        "control": control and {k: control.get(k) for k in ("trained_on", "top1", "eval_agreement")},
        "runs": runs,
        "synthesize": config_to_dict(config),
        "distill": config_to_dict(distill_config),
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "hardware": hardware(),
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 for a single value) and n."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "n": len(values), "values": values}


def co_trained(bank: Path, eval_data: str) -> float:
    """Accuracy of the student that was trained along with the generator, as it stood at the end."""
    kept = RunDir(bank / "student").read_json("result.json") or {}
    if eval_data not in kept:
        from synthkit.data.specs import load_data
        from synthkit.evaluation.metrics import evaluate_classifier
        from synthkit.models.build import load_model
        from synthkit.models.view import TeacherView

        view = TeacherView.from_loaded(load_model(str(bank / "student")))
        kept[eval_data] = evaluate_classifier(view, load_data(eval_data, "test", size=view.input_size))["top1"]
        RunDir(bank / "student").write_json("result.json", kept)
    return kept[eval_data]
