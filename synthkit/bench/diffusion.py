"""`synthkit bench diffusion`: banks of a diffusion model with and without teacher guidance, and students of them.

Everything is trained here: the diffusion model, and a judge of another architecture that takes no part. Two banks of
the same recipe, noise and intended classes differ in the guidance alone; the judge says how often it sees the intended
class. Students are trained from the guided bank alone, beside equally many random real images and beside noise.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from synthkit.bench.inversion import judged
from synthkit.bench.pipeline import spread
from synthkit.cli.arguments import Arguments
from synthkit.config.parse import config_to_dict, load_recipe
from synthkit.config.schema import SynthesizeConfig, TeachConfig
from synthkit.errors import ConfigError
from synthkit.runtime import RunDir, hardware, peak_memory, versions, write_json

SCALES = [(0.0, False), (0.03, False), (0.1, False), (0.3, False), (0.05, True), (0.15, True)]
"""(guidance, through) of the sweep."""


def main(argv: list[str]) -> int:
    """Parse, run, print JSON."""
    parser = Arguments(prog="synthkit bench diffusion", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="data spec: trains model and judge; its test split is measured")
    parser.add_argument("--teacher", default="lenet5_bn", help="model spec of the teacher that guides")
    parser.add_argument("--model", default="mnist/teach-unet", help="recipe of the diffusion model")
    parser.add_argument("--recipe", default="mnist/diffusion-lenet5_bn", help="recipe of the bank")
    parser.add_argument("--images", type=int, default=None, help="images of each bank instead of the recipe's")
    parser.add_argument("--judge", default="convnet_d3_w32_bn", help="architecture of the judge")
    parser.add_argument("--judge-epochs", type=int, default=2, help="passes of the judge over the real data")
    parser.add_argument("--judge-batch", type=int, default=128, help="batch of the judge")
    parser.add_argument("--distill", default="mnist/distill-lenet5_half_bn", help="recipe of the student")
    parser.add_argument("--steps", type=int, default=None, help="steps of the student instead of the recipe's")
    parser.add_argument("--distill-batch", type=int, default=None, help="batch of the student instead of the recipe's")
    parser.add_argument("--seeds", type=int, default=2, help="students of the guided bank")
    parser.add_argument("--seed", type=int, default=0, help="seed of banks and first student")
    parser.add_argument("--sweep-images", type=int, default=0, help="also judge guidance scales on so many images each")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--work", type=Path, required=True, help="folder for models, banks, runs (resumed)")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse(argv)
    if args.seeds < 1:
        raise ConfigError("bench diffusion: --seeds must be at least 1", got=args.seeds)
    print(json.dumps(measure(args), indent=1))
    return 0


def measure(args: Any) -> dict[str, Any]:
    """Model, judge, the two banks, students of the guided one; `--out` holds what is there after every stage."""
    runtime = {"runtime": {"threads": args.threads}} if args.threads else {}
    painter, painter_facts = model(args, runtime)
    judge, judge_facts = trained_judge(args, painter_facts["image_size"])
    overrides = {"teacher": args.teacher, "seed": args.seed, "resume": True, "method.model": str(painter), **runtime}
    overrides |= {"images": args.images} if args.images else {}
    guided: SynthesizeConfig = load_recipe(args.recipe, {**overrides, "out": str(args.work / "guided")})
    plain = replace(guided, method=replace(guided.method, guidance=0.0), out=str(args.work / "unguided"))
    result: dict[str, Any] = {
        "what": "banks of a diffusion model: agreement of a judge with the intended class; students of the guided bank",
        "diffusion_model": painter_facts,
        "judge": judge_facts,
        "teacher": args.teacher,
        "synthesize": config_to_dict(guided),
        "versions": versions() | {"diffusers": version("diffusers")},
        "hardware": hardware(),
        "banks": {},
    }

    def keep(**found: Any) -> None:
        result.update(found, peak_memory_bytes=peak_memory())
        if args.out:
            write_json(args.out, result)

    for name, config in (("guided", guided), ("unguided", plain)):
        keep(banks={**result["banks"], name: judged_bank(config, judge)})
        print(f"{name}: judge {100 * result['banks'][name]['judge_top1']:.2f} %", file=sys.stderr, flush=True)
    keep(students=students(args, str(args.work / "guided"), runtime))
    if args.sweep_images:
        keep(guidance_scales=[judged_scale(args, guided, judge, *setting) for setting in SCALES])
    return result


def judged_bank(config: SynthesizeConfig, judge: str) -> dict[str, Any]:
    """Make a bank (or finish it): what judge and teacher see in it, and its cost."""
    from synthkit.synthesis.engine import synthesize

    bank = synthesize(config)
    run = RunDir(bank.path).read_json("run.json") or {}
    cost = {"minutes": run["seconds"] / 60, "cpu_minutes": run["cpu_seconds"] / 60}
    return {**judged(f"bank:{bank.path}", judge, config), **cost, "peak_memory_bytes": run["peak_memory_bytes"]}


def judged_scale(args: Any, config: SynthesizeConfig, judge: str, guidance: float, through: bool) -> dict[str, Any]:
    """What judge and teacher see in a small bank at one scale of the guidance, the same for every image."""
    from synthkit.synthesis.engine import synthesize

    method = replace(config.method, guidance=guidance, through=through)
    out = args.work / f"scale-{guidance:g}{'-through' if through else ''}"
    small = replace(config, method=method, curriculum="none", images=args.sweep_images, out=str(out))
    small = replace(small, images_per_shard=config.method.batch_size)
    return {"guidance": guidance, "through": through, **judged(f"bank:{synthesize(small).path}", judge, small)}


def model(args: Any, runtime: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The diffusion model, trained on the real data (or found in the work folder), and its cost."""
    from synthkit.distillation.teach import teach

    config = load_recipe(args.model, {"data": args.data, "out": str(args.work / "unet"), "resume": True, **runtime})
    found = teach(config).metrics
    size = (RunDir(args.work / "unet").read_json("diffusion.json") or {})["image_size"]
    cpu = found.get("cpu_seconds")
    return args.work / "unet", {
        "recipe": args.model, "steps": found["steps"], "batch_size": config.batch_size, "image_size": size,
        "loss": found["loss"], "test_loss": found.get("test_loss"), "minutes": found["seconds"] / 60,
        "cpu_minutes": None if cpu is None else cpu / 60,
    }  # fmt: skip


def trained_judge(args: Any, size: list[int]) -> tuple[str, dict[str, Any]]:
    """A classifier of another architecture and seed on the same real data, which neither guides nor teaches."""
    from synthkit.config.schema import RuntimeConfig
    from synthkit.distillation.teach import teach

    out = args.work / "judge"
    found = teach(
        TeachConfig(
            arch=args.judge, data=args.data, epochs=args.judge_epochs, batch_size=args.judge_batch, lr=0.05,
            image_size=size[1], seed=args.seed + 1, out=str(out), resume=True,
            runtime=RuntimeConfig(threads=args.threads),
        )
    )  # fmt: skip
    return str(found.card), {"arch": args.judge, "epochs": args.judge_epochs, "test_top1": found.metrics.get("top1")}


def students(args: Any, bank: str, runtime: dict[str, Any]) -> dict[str, Any]:
    """Fresh students from the bank alone, last epoch on the test split; the first has a control of equally many random
    real images beside it, the second one of noise."""
    from synthkit.distillation.distill import distill

    runs, controls, config = [], {}, None
    for number in range(args.seeds):
        control = (args.data, "noise")[number] if number < 2 else "none"
        overrides = {
            "bank": bank, "seed": args.seed + number, "control": control, "eval_data": args.data,
            "out": str(args.work / f"student-{number}"), "resume": True, **runtime,
        }  # fmt: skip
        given = {"steps": args.steps, "batch_size": args.distill_batch}
        config = load_recipe(
            args.distill, overrides | {key: value for key, value in given.items() if value is not None}
        )
        found = distill(config)
        runs.append(found.metrics)
        if found.control:
            controls[found.control["trained_on"]] = found.control["top1"]
        print(f"student {number}: {100 * found.metrics['top1']:.2f} %", file=sys.stderr, flush=True)
    return {
        "student": config.student if config else None,
        "steps": config.steps if config else None,
        "top1": spread([run["top1"] for run in runs]),
        "teacher_top1": runs[0].get("teacher_top1"),
        "control_top1": controls,
    }
