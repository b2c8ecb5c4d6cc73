"""`synthkit bench inversion`: a DeepInversion bank judged by a network that took no part, beside its controls.

Three sets of images of the same intended classes: the bank of the recipe, the bank of the same recipe without the
BatchNorm term (cross-entropy alone), and the noise that both start from. A second network says how often it sees the
intended class. Then a fresh student is trained on the first bank alone, with the noise control of `distill` beside it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthkit.cli.arguments import Arguments
from synthkit.config.parse import config_to_dict, load_recipe
from synthkit.config.schema import SynthesizeConfig
from synthkit.runtime import RunDir, Runtime, hardware, peak_memory, versions, write_json


def main(argv: list[str]) -> int:
    """Parse, run, print JSON."""
    parser = Arguments(prog="synthkit bench inversion", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="cifar10/deepinversion-resnet20-cpu", help="recipe of the bank")
    parser.add_argument("--teacher", default=None, help="model spec instead of the recipe's teacher")
    parser.add_argument("--judge", required=True, help="model spec of the network that judges; it takes no part")
    parser.add_argument("--images", type=int, default=None, help="images of each bank instead of the recipe's")
    parser.add_argument("--control-images", type=int, default=None, help="images of the control bank, where fewer do")
    parser.add_argument("--distill", default=None, help="recipe of the student (its bank is replaced)")
    parser.add_argument("--control", default="noise", help="control of the student: noise, none or a data spec")
    parser.add_argument("--eval-data", default=None, help="labelled data spec, for the student alone; last epoch")
    parser.add_argument("--seed", type=int, default=0, help="seed of banks and student")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--work", type=Path, required=True, help="folder for banks and runs (resumed when it exists)")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse(argv)
    result = measure(args)
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def measure(args: Any) -> dict[str, Any]:
    """The table of the three sets of images, and the student's accuracy."""
    from synthkit.synthesis.engine import synthesize

    given = {"teacher": args.teacher, "images": args.images}
    overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    overrides |= {"seed": args.seed, "resume": True} | ({"runtime": {"threads": args.threads}} if args.threads else {})
    config: SynthesizeConfig = load_recipe(args.recipe, {**overrides, "out": str(args.work / "deepinversion")})
    without = replace(
        config,
        method=replace(config.method, bn=0.0),
        images=args.control_images or config.images,
        out=str(args.work / "cross_entropy"),
    )
    table, student = {}, None
    for name, own in (("deepinversion", config), ("cross_entropy", without)):
        bank = synthesize(own)
        run = RunDir(bank.path).read_json("run.json") or {}
        table[name] = {
            **judged(f"bank:{bank.path}", args.judge, own),
            "iterations": own.method.coarse_iterations + own.method.iterations,
            "minutes": run["seconds"] / 60,
            "cpu_minutes": run["cpu_seconds"] / 60,
            "peak_memory_bytes": run["peak_memory_bytes"],
        }
        print(f"{name}: judge {100 * table[name]['judge_top1']:.1f} %", file=sys.stderr, flush=True)
        if name == "deepinversion" and args.distill:
            student = train(args, str(bank.path))
    table["initial_noise"] = {**judged(initial_noise(config), args.judge, config), "iterations": 0}
    return {
        "what": "share of images in which a network that took no part sees the intended class (judge_top1)",
        "judge": args.judge,
        "table": table,
        "student": student,
        "synthesize": config_to_dict(config),
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "hardware": hardware(),
    }


def judged(data: Any, judge: str, config: SynthesizeConfig) -> dict[str, Any]:
    """Accuracy of the judge and of the teacher on the intended classes of `data` (a spec or `RealData`)."""
    from synthkit.data.specs import load_data
    from synthkit.evaluation.metrics import evaluate_classifier
    from synthkit.models.build import load_model
    from synthkit.models.view import TeacherView

    teacher = TeacherView.from_loaded(load_model(config.teacher or ""))
    view = TeacherView.from_loaded(load_model(judge))
    data = load_data(data, "train", size=view.input_size) if isinstance(data, str) else data
    found = evaluate_classifier(view, data, teacher=teacher)
    return {
        "n": found["n"],
        "judge_top1": found["top1"],
        "judge_top1_stderr": found["top1_stderr"],
        "teacher_top1": found["teacher_top1"],
    }


def initial_noise(config: SynthesizeConfig) -> Any:
    """The images at iteration 0, as a bank would store them, with their intended classes."""
    from synthkit.data.real import RealData
    from synthkit.models.build import load_model
    from synthkit.models.view import TeacherView
    from synthkit.synthesis.base import Task
    from synthkit.synthesis.curriculum import Curriculum
    from synthkit.synthesis.inversion.loop import Inverter

    teacher = TeacherView.from_loaded(load_model(config.teacher or ""))
    runtime = Runtime.create(config.runtime)
    task = Task(teachers=[teacher], images=config.images or 1000, curriculum=Curriculum.named("none"),
                seed=config.seed, runtime=runtime)  # fmt: skip
    inverter = Inverter(config.method, task)
    labels = inverter.labels(0, task.images)
    names = teacher.class_names or [str(i) for i in range(teacher.num_classes)]
    return RealData(
        images=inverter.images(inverter.start(0, labels)).cpu(), labels=labels.cpu(), class_names=names,
        name="initial noise", root="", label_source="target",
    )  # fmt: skip


def train(args: Any, bank: str) -> dict[str, Any]:
    """A fresh student from the bank alone, and the noise control; last epoch."""
    from synthkit.distillation.distill import distill

    overrides = {
        "bank": bank,
        "seed": args.seed,
        "control": args.control,
        "resume": True,
        "out": str(args.work / "student"),
    }
    overrides |= {"eval_data": args.eval_data} if args.eval_data else {}
    overrides |= {"runtime": {"threads": args.threads}} if args.threads else {}
    config = load_recipe(args.distill, overrides)
    found = distill(config)
    control = found.control or {}
    run = RunDir(found.path).read_json("run.json") or {}
    return {
        "student": config.student,
        "steps": config.steps,
        "eval_data": args.eval_data,
        "top1": found.metrics.get("top1"),
        "teacher_top1": found.metrics.get("teacher_top1"),
        "retention": found.metrics.get("retention"),
        "control": {name: control.get(name) for name in ("trained_on", "top1")} if control else None,
        "seconds": run.get("seconds"),
        "distill": config_to_dict(config),
    }
