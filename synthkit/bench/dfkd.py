"""`synthkit bench dfkd`: all data-free methods on one table, for the same compute.

Every method runs its shipped MNIST recipe with the pair's teacher and student; its schedule is stretched or shrunk so
that the whole run takes the budget of CPU seconds (one thread, measured on a short pilot that is thrown away). The
headline is the co-trained student at its last epoch, over seeds. Beside it stand a fresh student trained from the
first seed's bank, the number published for the method, and the two ends: a student of noise and students of the real
training images, for the same CPU seconds. Then the data-free selection (`synthkit select`) chooses a stopping point
of every run and a run, and is compared with the oracle; the methods that it ranks first, without data, may run again
with a larger budget (`--finalists`). Everything is resumed when it exists.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthkit.bench.dfkd_plan import ENDS, METHODS, PAIRS, RECIPES, Pair, scaled, smallest
from synthkit.bench.pipeline import co_trained, spread
from synthkit.bench.published import PUBLISHED, Published
from synthkit.cli.arguments import Arguments
from synthkit.config.parse import config_to_dict, load_recipe, parse_config
from synthkit.config.schema import SynthesizeConfig
from synthkit.errors import ConfigError
from synthkit.runtime import RunDir, format_seconds, hardware, versions, write_json

PILOT = 0.06  # share of the budget that a pilot should take, so that its start does not matter
TEMPERATURE = 4.0


def main(argv: list[str]) -> int:
    """Parse, run, print JSON."""
    parser = Arguments(prog="synthkit bench dfkd", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", default=",".join(PAIRS), help=f"comma-separated, of {', '.join(PAIRS)}")
    parser.add_argument(
        "--methods", default=",".join((*METHODS, *ENDS)), help="comma-separated; NAME+CURRICULUM switches one on"
    )
    parser.add_argument("--mnist", default=None, help="data spec of MNIST; test split judges, train split is an end")
    parser.add_argument("--cifar10", default=None, help="data spec of CIFAR-10, the same")
    parser.add_argument("--teacher", default=None, help="model spec instead of the pair's teacher (one pair)")
    parser.add_argument("--budget", type=float, default=None, help="CPU seconds of every run (none: those of the pair)")
    parser.add_argument("--seeds", type=int, default=None, help="runs of every method (none: those of the pair)")
    parser.add_argument("--fresh", type=float, default=None, help="budget share of a fresh student")
    parser.add_argument("--finalists", type=int, default=0, help="methods ranked first that run again, for longer (0)")
    parser.add_argument("--final-budget", type=float, default=150.0, help="CPU seconds of their runs (150)")
    parser.add_argument("--images", type=int, default=2000, help="images of an online method's bank (2,000)")
    parser.add_argument("--work", type=Path, required=True, help="folder for banks and runs (resumed when it exists)")
    parser.add_argument("--only-runs", action="store_true", help="make the runs, leave the table to a later call")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse(argv)
    result = measure(args)
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All tables."""
    pairs, methods = _names("pairs", args.pairs, PAIRS), _names("methods", args.methods, (*METHODS, *ENDS))
    for name in ("budget", "seeds", "images", "final_budget"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ConfigError(f"bench dfkd: --{name.replace('_', '-')} must be positive", got=getattr(args, name))
    tables = {}
    for name in pairs:
        data = getattr(args, PAIRS[name].dataset)
        if data is None:
            raise ConfigError(f"bench dfkd: pair {name} needs --{PAIRS[name].dataset} DATA")
        pair = replace(PAIRS[name], teacher=args.teacher) if args.teacher else PAIRS[name]
        tables[name] = Table(name, pair, data, args).run(methods)
    return {
        "what": "data-free methods for the same CPU seconds: co-trained student, last epoch; controls; published",
        "pairs": tables,
        "published": [vars(entry) for entry in PUBLISHED],
        "versions": versions(),
        "hardware": hardware(),
    }


def _names(what: str, text: str, known: Any) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"bench dfkd: --{what}: not known", got=name, allowed=known)
    return names


class Table:
    """The table of one pair."""

    pilots = 0
    """0 until a first pilot is thrown away, which also pays for what a process loads once."""

    def __init__(self, name: str, pair: Pair, data: str, args: argparse.Namespace):
        self.name, self.pair, self.data, self.args = name, pair, data, args
        self.work, self.budget = args.work / name, args.budget or pair.budget
        self.seeds = range(args.seeds or pair.seeds)
        self.fresh = pair.fresh if args.fresh is None else args.fresh
        self.runtime = {"threads": 1, "device": "cpu"}

    def run(self, methods: list[str]) -> dict[str, Any]:
        """Make every run, then read the table from what they left."""
        rows = self.rows([m for m in methods if m not in ENDS])
        ends = {}
        for end in (m for m in methods if m in ENDS):
            ends[end] = self.end(end)
            print(f"{self.name} {end}: {percent(ends[end]['top1'])}", file=sys.stderr, flush=True)
        teacher = self.teacher_top1()
        for row in [*rows, *ends.values()]:
            row["retention"] = row["top1"]["mean"] / teacher
        found = {
            "teacher": {"spec": self.pair.teacher, "top1": teacher},
            "student": self.pair.student,
            "data": self.data,
            "budget_cpu_seconds": self.budget,
            "rows": rows,
            "ends": ends,
        }
        if self.args.only_runs:
            return found
        found["selection"] = self.selection(rows)
        if self.args.finalists and self.pair.finals:
            found["final"] = self.final(found["selection"], teacher)
        return found

    def rows(self, methods: list[str]) -> list[dict[str, Any]]:
        """The rows of some methods."""
        found = []
        for method in methods:
            found.append(self.row(method))
            print(f"{self.name} {method}: {percent(found[-1]['top1'])}", file=sys.stderr, flush=True)
        return found

    def final(self, selection: dict[str, Any], teacher: float) -> dict[str, Any]:
        """The methods that were ranked first without data, with the larger budget."""
        longer = copy.copy(self)
        longer.work, longer.budget = self.work / "final", self.args.final_budget
        names = [entry["name"] for entry in selection["methods"][: self.args.finalists]]
        rows = longer.rows(names)
        for row in rows:
            row["retention"] = row["top1"]["mean"] / teacher
        return {"budget_cpu_seconds": longer.budget, "rows": rows, "selection": longer.selection(rows)}

    # ---- methods ---------------------------------------------------------------------------------------------

    def row(self, method: str) -> dict[str, Any]:
        """One method over the seeds."""
        from synthkit.bank import Bank

        config = self.stretched(method)
        banks = [self.bank(method, seed, config) for seed in self.seeds]
        records = [RunDir(bank).read_json("run.json") or {} for bank in banks]
        top1 = [co_trained(bank, self.data) for bank in banks]
        plan = config_to_dict(config.method)
        queries = [r["queries"] for r in (_last_record(bank) for bank in banks) if "queries" in r]
        return {
            "method": method,
            "curriculum": Bank(banks[0]).spec.recipe.get("curriculum"),
            "top1": spread(top1),
            "fresh_student": self.fresh_student(method, banks[0]) if self.fresh else None,
            "cpu_seconds": spread([r["cpu_seconds"] for r in records]),
            "peak_memory_bytes": max(r["peak_memory_bytes"] for r in records),
            "images": len(Bank(banks[0])),
            "queries": spread(queries) if queries else None,
            "published": [vars(p) for p in published(self.name, method)],
            "settings": plan,
        }

    def config(self, method: str) -> SynthesizeConfig:
        """The recipe of a method with the teacher and student of the pair."""
        name, _, curriculum = method.partition("+")
        own: dict[str, Any] = {"teacher": self.pair.teacher, "runtime": self.runtime}
        if curriculum:
            own["curriculum"] = curriculum
        found = load_recipe(RECIPES.get(name, f"mnist/{name}-lenet5_bn"), own)
        changed = replace(found.method, student=self.pair.student)
        changed = replace(changed, **{k: v for k, v in self.pair.rates.items() if hasattr(changed, k)})
        if not self.pair.batchnorm and hasattr(changed, "bn"):
            changed = replace(changed, bn=0.0)
        if self.pair.ep_steps and hasattr(changed, "ep_steps"):
            epochs = max(2, changed.epochs * changed.ep_steps // self.pair.ep_steps)
            growth = changed.grad_adv * changed.epochs / epochs
            changed = replace(changed, epochs=epochs, ep_steps=self.pair.ep_steps, grad_adv=growth)
        return replace(found, method=changed)

    def stretched(self, method: str) -> SynthesizeConfig:
        """The recipe, its schedule as long as the budget allows; found once and kept in the work folder."""
        folder = RunDir(self.args.work / self.name / "plans" / method)
        plan = folder.read_json("plan.json")
        recipe = self.config(method)
        if plan is None:
            plan = self._pilot(method, recipe)
            folder.create().write_json("plan.json", plan)
        return scaled(recipe, plan["factor_per_cpu_second"] * self.budget, self.args.images)

    def _pilot(self, method: str, recipe: SynthesizeConfig) -> dict[str, float]:
        """How much of the recipe's schedule a CPU second pays for, from runs that are thrown away."""
        goal, factor, seconds = PILOT * self.budget, smallest(recipe), 0.0
        for attempt in range(Table.pilots, 5):
            out = self.work / "pilots" / f"{method}-{attempt}"
            shutil.rmtree(out, ignore_errors=True)
            seconds = self._made(scaled(recipe, factor, self.args.images), out, 0)["cpu_seconds"]
            shutil.rmtree(out, ignore_errors=True)
            if attempt and seconds > 0.6 * goal:
                break
            if attempt:
                factor *= min(8.0, 1.2 * goal / max(seconds, 1e-3))
            Table.pilots = 1
        return {"factor_per_cpu_second": factor / seconds, "pilot_factor": factor, "pilot_cpu_seconds": seconds}

    def _made(self, config: SynthesizeConfig, out: Path, seed: int) -> dict[str, Any]:
        from synthkit.synthesis.engine import synthesize

        synthesize(replace(config, out=str(out), seed=seed, resume=True))
        return RunDir(out).read_json("run.json") or {}

    def bank(self, method: str, seed: int, config: SynthesizeConfig) -> Path:
        """The bank of one run, with the states of its student."""
        out = self.work / f"{method}-seed{seed}"
        began = time.monotonic()
        own = replace(config.method, checkpoints=self.pair.checkpoints)
        if (RunDir(out).read_json("run.json") or {}).get("status") != "complete":
            self._made(replace(config, method=own), out, seed)
            print(f"{out.name}: {format_seconds(time.monotonic() - began)}", file=sys.stderr, flush=True)
        return out

    # ---- students of banks: fresh ones, and the two ends -----------------------------------------------------

    def teacher_top1(self) -> float:
        """Accuracy of the teacher on the test split."""
        from synthkit.data.specs import load_data
        from synthkit.evaluation.metrics import evaluate_classifier
        from synthkit.models.build import load_model
        from synthkit.models.view import TeacherView

        view = TeacherView.from_loaded(load_model(self.pair.teacher))
        return evaluate_classifier(view, load_data(self.data, "test", size=view.input_size))["top1"]

    def fresh_student(self, method: str, bank: Path) -> dict[str, Any]:
        """A student that never met the generator, from the stored images of the first seed alone."""
        return self._trained(f"fresh-{method}", bank, 0, self.fresh * self.budget)

    def end(self, name: str) -> dict[str, Any]:
        """Noise, or the real training images (with the teacher's logits, or with labels alone)."""
        if name == "real_labels":
            runs = [self._taught(seed) for seed in self.seeds]
        else:
            source = {"noise": "noise", "real": "random_real"}[name]
            values = {"method": source, "teacher": self.pair.teacher, "runtime": self.runtime}
            values |= {"data": self.data, "images": _train_images(self.data)} if name == "real" else {"images": 10_000}
            bank = self.work / f"bank-{name}"
            self._made(parse_config("synthesize", values), bank, 0)
            runs = [self._trained(f"{name}-seed{s}", bank, s, self.budget) for s in self.seeds]
        return {
            "top1": spread([run["top1"] for run in runs]),
            "cpu_seconds": spread([run["cpu_seconds"] for run in runs]),
            "steps": runs[0]["steps"],
            "published": [vars(p) for p in published(self.name, name)],
        }

    def _trained(self, name: str, bank: Path, seed: int, seconds: float) -> dict[str, Any]:
        from synthkit.distillation.distill import distill

        def train(steps: int, out: Path) -> float:
            values = {
                "bank": str(bank), "student": self.pair.student, "teacher": self.pair.teacher, "steps": steps,
                "loss": {"name": "kd", "temperature": TEMPERATURE}, "protocol": self.pair.protocol, "seed": seed,
                "fresh": 0.0, "holdout": 0.0, "eval_data": self.data, "out": str(out), "runtime": self.runtime,
                **self._rates(),
            }  # fmt: skip
            return distill(parse_config("distill", values)).metrics["top1"]

        return self._for_seconds(name, seconds, train)

    def _taught(self, seed: int) -> dict[str, Any]:
        from synthkit.distillation.teach import teach

        def train(steps: int, out: Path) -> float:
            values = {"arch": self.pair.student, "data": self.data, "steps": steps, "seed": seed, "out": str(out),
                      "runtime": self.runtime, **self._rates()}  # fmt: skip
            return teach(parse_config("teach", values)).metrics["top1"]

        return self._for_seconds(f"real_labels-seed{seed}", self.budget, train)

    def _rates(self) -> dict[str, Any]:
        return {k: v for k, v in self.pair.rates.items() if k != "student_lr"}

    def _for_seconds(self, name: str, seconds: float, train: Callable[[int, Path], float]) -> dict[str, Any]:
        """`train(steps, out)` with as many steps as take `seconds` on the CPU: measured on two short runs first."""
        folder = RunDir(self.work / name)
        found = folder.read_json("row.json")
        if found is None:
            shutil.rmtree(folder.path, ignore_errors=True)
            costs = []
            for steps in (50, 50, 250):  # the first one also pays for what is loaded once
                began = time.process_time()
                train(steps, folder.path / f"pilot{len(costs)}")
                costs.append(time.process_time() - began)
            per_step = max((costs[2] - costs[1]) / 200, 1e-6)
            steps = max(50, round((seconds - max(0.0, costs[1] - 50 * per_step)) / per_step))
            began = time.process_time()
            top1 = train(steps, folder.path / "student")
            found = {"top1": top1, "steps": steps, "cpu_seconds": time.process_time() - began}
            folder.write_json("row.json", found)
        return found

    # ---- selection -------------------------------------------------------------------------------------------

    def selection(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What the data-free rule chooses, and what that costs."""
        names = [row["method"] for row in rows]
        runs = [(m, s, self.work / f"{m}-seed{s}") for m in names for s in self.seeds]
        kept = RunDir(self.work / "selection").create()
        found = kept.read_json("selection.json")
        if found is None or {(r["name"], r["seed"]) for r in found["runs"]} != {(m, s) for m, s, _ in runs}:
            found = self.select(runs, eval_data=self.data)
            kept.write_json("selection.json", found)
        for row in rows:
            points = [c for c in found["candidates"] if c["name"] == row["method"]]
            best = [max(c["top1"] for c in points if c["seed"] == s) for s in self.seeds]
            row["best_top1"] = spread(best)
        runs = [{key: run[key] for key in ("name", "seed", "stop", "last", "score")} for run in found["runs"]]
        kept_back = ("candidates", "runs", "probes")  # long; the work folder has them
        return {name: value for name, value in found.items() if name not in kept_back} | {"runs": runs}

    def select(self, runs: list[tuple[str, int, Path]], eval_data: str | None) -> dict[str, Any]:
        """The data-free choice among runs, every method judged on the banks of all others."""
        from synthkit.evaluation.selection import select

        return select(runs, "others", eval_data=eval_data, device="cpu", total=self.pair.probes)


def published(pair: str, method: str) -> list[Published]:
    """What was published for a method on (or near) a pair."""
    return [p for p in PUBLISHED if p.method == method and p.dataset == PAIRS[pair].dataset]


def percent(found: dict[str, Any]) -> str:
    """`98.71 ± 0.05 % (n 3)`."""
    return f"{100 * found['mean']:.2f} ± {100 * found['std']:.2f} % (n {found['n']})"


def _last_record(bank: Path) -> dict[str, Any]:
    records = RunDir(bank).metrics()
    return records[-1] if records else {}


def _train_images(data: str) -> int:
    """As many real images as there are with equally many of every class, which is what a bank of them holds."""
    import numpy as np

    from synthkit.data.specs import load_data

    found = load_data(data, "train")
    return int(np.bincount(np.asarray(found.labels), minlength=found.num_classes).min()) * found.num_classes
