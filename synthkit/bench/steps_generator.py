"""The steps of the generator family: of every method what it repeats, against the bare calls of its own networks.

Online methods whose cycle is the usual one: a generator step and a student step, each on its own; those with an order
of their own: a whole cycle. Methods with a memory bank: one synthesis call of few iterations, and a student step. The
floor are exactly the network calls that the piece makes (`bench/floor.py`). Every repetition starts from one and the
same state, so that what is timed is what was recorded.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from synthkit import tables
from synthkit.bench import steps
from synthkit.bench.steps import LAYOUTS, Pieces
from synthkit.errors import ConfigError
from synthkit.runtime import Runtime

FAMILY = "synthkit.synthesis.generator."
ADVERSARY = 0.5
"""Weight of an adversary that the method's curriculum starts at 0: it must not be left out of the measurement."""


def names() -> list[str]:
    """Every method of the family."""
    return sorted(name for name, path in tables.METHODS.items() if path.startswith(FAMILY))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Methods, networks and batch."""
    parser.add_argument("--method", default="cudfkd", help="a method of the family, several (A,B), or all")
    parser.add_argument("--teacher", default="wrn40_2", help="architecture (fresh weights serve as well)")
    parser.add_argument("--student", default="wrn16_1", help="architecture")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--classes", type=int, default=10, help="number of classes")
    parser.add_argument("--kd-steps", type=int, default=2, help="student steps of a cycle that is timed whole")
    parser.add_argument("--iterations", type=int, default=5, help="iterations of a synthesis call")
    parser.add_argument("--compile", action="store_true", help="compile teacher, student and generator")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One method as the other families are measured; several in one table."""
    family = names()
    chosen = family if args.method == "all" else args.method.split(",")
    for name in chosen:
        if name not in family:
            raise ConfigError("bench steps: --method: not a method of the generator family", got=name, allowed=family)
    for name in ("batch", "kd_steps", "iterations", "classes"):
        if getattr(args, name) < 1:
            raise ConfigError(f"bench steps: --{name.replace('_', '-')} must be at least 1", got=getattr(args, name))
    found = {}
    for name in chosen:
        found[name] = steps.measure(argparse.Namespace(**{**vars(args), "method": name}), build)
    if len(found) == 1:
        return found[chosen[0]]
    shared = ("what", "family", "teacher", "student", "batch", "compiled", "repeats", "runtime", "versions", "hardware")
    first = found[chosen[0]]
    return {
        **{key: first[key] for key in shared},
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in found.values()),
        "ratio": {name: max(result["ratio"].values()) for name, result in found.items()},
        "methods": {
            name: {key: value for key, value in result.items() if key not in (*shared, "peak_memory_bytes")}
            for name, result in found.items()
        },
    }


def build(args: argparse.Namespace, runtime: Runtime) -> Pieces:
    """The pieces of one method, and the bare calls of each."""
    from synthkit.bench.floor import Bare, recording

    method = _method(args, runtime)
    pieces = _pool_pieces(method) if hasattr(method, "synthesise") else _online_pieces(method)
    kept = copy.deepcopy(method.state_dict())

    def again() -> None:
        method.load_state_dict(copy.deepcopy(kept))

    run: dict[str, Callable[[], object]] = {}
    floors: dict[str, list[str]] = {}
    for name, piece in pieces.items():
        again()
        piece()  # what is made on the first use only
        again()
        with recording() as calls:
            piece()
        run[name], floors[name] = piece, [f"bare_{name}_{layout}" for layout in LAYOUTS]
        for layout, bare in zip(LAYOUTS, floors[name], strict=True):
            run[bare] = Bare(calls, runtime, channels_last=layout == "channels_last")
    if args.compile:
        _compile(method)
    facts = {
        "method": args.method,
        "teacher": args.teacher,
        "student": args.student,
        "generator": getattr(method, "generator_spec", None),
        "batch": args.batch,
        "compiled": args.compile,
        "settings": {k: v for k, v in dataclasses.asdict(method.config).items() if k in ("kd_steps", "g_steps", "adv")},
    }
    return Pieces(run=run, floors=floors, facts=facts, before=dict.fromkeys(pieces, again))


def _method(args: argparse.Namespace, runtime: Runtime) -> Any:
    """The method on fresh networks, with its defaults but for batch and lengths; its adversary is on."""
    from synthkit.models.build import build_model
    from synthkit.models.view import TeacherView
    from synthkit.synthesis.base import Task, seeded_init
    from synthkit.synthesis.curriculum import Curriculum

    method = tables.lookup("method", args.method)
    module = seeded_init(lambda: build_model(args.teacher, num_classes=args.classes), 0)
    teacher = TeacherView(
        module, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.201], input_size=(3, 32, 32), num_classes=args.classes
    ).to(runtime.device, channels_last=runtime.channels_last)
    curriculum = Curriculum.named(method.default_curriculum)
    defaults = method.Config()
    values: dict[str, Any] = {"student": args.student, "batch_size": args.batch}
    if hasattr(method, "synthesise"):
        values |= {"synthesis_batch": args.batch, "g_steps": args.iterations, "warmup": 0.0}
    else:
        cycle = min(defaults.kd_steps, args.kd_steps)
        values |= {"kd_steps": cycle, "ep_steps": cycle}  # memories that fill at the end of an epoch are filled
    if curriculum.ramp:
        values |= {"adv": defaults.adv or ADVERSARY, "grad_adv": 0.0}
    task = Task(teachers=[teacher], images=4 * args.batch, curriculum=curriculum, seed=0, runtime=runtime)
    return method(method.Config(**values), task)


def _online_pieces(method: Any) -> dict[str, Callable[[], object]]:
    from synthkit.synthesis.generator.loop import GeneratorLoop

    def cycle() -> None:
        with method.module_draws("bench"):
            method.run_cycle(method.config.kd_steps)

    def generator_step() -> None:
        method.set_modes(generating=True)
        method.generator_step()

    def kd_step() -> None:
        method.set_modes(generating=False)
        method.student_step()
        method.step += 1

    cycle()  # queues and memories hold something from the first cycle on
    if type(method).run_cycle is GeneratorLoop.run_cycle and type(method).student_step is GeneratorLoop.student_step:
        return {"generator_step": generator_step, "kd_step": kd_step}
    return {"cycle": cycle}


def _pool_pieces(method: Any) -> dict[str, Callable[[], object]]:
    student = method.student_view.module

    def synthesis() -> None:
        student.eval().requires_grad_(False)
        with method.module_draws("bench"):
            method.synthesise(1)

    def kd_step() -> None:
        student.train().requires_grad_(True)
        with method.module_draws("bench"):
            method.learn(method.student_images())

    method._call()  # the memory holds a batch
    return {"synthesis": synthesis, "kd_step": kd_step}


def _compile(method: Any) -> None:
    import torch

    for owner, name in ((method.teacher, "module"), (method.student_view, "module"), (method, "generator")):
        if hasattr(owner, name):
            setattr(owner, name, torch.compile(getattr(owner, name)))
