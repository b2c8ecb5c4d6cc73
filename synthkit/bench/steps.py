"""`synthkit bench steps`: CPU seconds of CuDFKD's steps against the bare networks that they cannot avoid.

One generator step (adversary on) and one KD step (sampling included) are timed, interleaved with the bare forward and
backward of the same three networks: no loss terms, no BatchNorm statistics, no normalisation, no optimiser. The floor
is the faster of the two memory layouts of the bare networks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from synthkit.config.schema import RuntimeConfig
from synthkit.errors import ConfigError
from synthkit.runtime import Runtime, hardware, peak_memory, versions, write_json


def main(argv: list[str]) -> int:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(prog="synthkit bench steps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", default="wrn40_2", help="architecture (fresh weights serve as well)")
    parser.add_argument("--student", default="wrn16_1", help="architecture")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="precision of the steps")
    parser.add_argument("--compile", action="store_true", help="compile the three networks")
    parser.add_argument("--repeats", type=int, default=7, help="timed repetitions; the median counts")
    parser.add_argument("--classes", type=int, default=10, help="number of classes")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse_args(argv)
    if args.batch < 1 or args.repeats < 1:
        raise ConfigError("bench steps: --batch and --repeats must be at least 1", got=(args.batch, args.repeats))
    result = measure(args)
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Medians of all pieces, interleaved in one run."""
    from synthkit.models.build import build_model
    from synthkit.models.view import TeacherView
    from synthkit.synthesis.base import Task, seeded_init
    from synthkit.synthesis.curriculum import Curriculum
    from synthkit.synthesis.generator.cudfkd import CuDFKD, CuDFKDConfig

    runtime = Runtime.create(RuntimeConfig(device=args.device, precision=args.precision, threads=args.threads))
    module = seeded_init(lambda: build_model(args.teacher, num_classes=args.classes), 0)
    teacher = TeacherView(
        module, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.201], input_size=(3, 32, 32), num_classes=args.classes
    ).to(runtime.device, channels_last=runtime.channels_last)
    config = CuDFKDConfig(student=args.student, batch_size=args.batch, loss="kl", adv=0.5, grad_adv=0.0)
    task = Task(teachers=[teacher], images=1, curriculum=Curriculum.named("easy2hard"), seed=0, runtime=runtime)
    method = CuDFKD(config, task)
    if args.compile:
        import torch

        for owner, name in ((teacher, "module"), (method.student_view, "module"), (method, "generator")):
            setattr(owner, name, torch.compile(getattr(owner, name)))
    bare = {layout: Bare(args, method, channels_last=layout == "channels_last") for layout in LAYOUTS}

    def generator_step() -> None:
        method._set_modes(generating=True)
        method.generator_step()

    def kd_step() -> None:
        method._set_modes(generating=False)
        method.student_step()
        method.step += 1

    pieces: dict[str, Callable[[], object]] = {"generator_step": generator_step, "kd_step": kd_step}
    for layout in LAYOUTS:
        pieces[f"bare_generator_step_{layout}"] = bare[layout].generator_step
        pieces[f"bare_kd_step_{layout}"] = bare[layout].kd_step
    seconds = timed(pieces, args.repeats, cuda=runtime.device.type == "cuda")
    floor = {
        kind: min(seconds[f"bare_{kind}_{layout}"] for layout in LAYOUTS) for kind in ("generator_step", "kd_step")
    }
    return {
        "what": "CPU seconds (process time)" if runtime.device.type == "cpu" else "wall seconds, synchronised",
        "teacher": args.teacher,
        "student": args.student,
        "generator": method.generator_spec,
        "batch": args.batch,
        "repeats": args.repeats,
        "seconds": {name: round(value, 5) for name, value in seconds.items()},
        "floor": {name: round(value, 5) for name, value in floor.items()},
        "ratio": {name: round(seconds[name] / floor[name], 4) for name in floor},
        "runtime": runtime.describe(),
        "compiled": args.compile,
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "hardware": hardware(),
    }


LAYOUTS = ("channels_last", "contiguous")


class Bare:
    """The same three networks and nothing else."""

    def __init__(self, args: argparse.Namespace, method, *, channels_last: bool):
        import torch

        from synthkit.models.build import build_model
        from synthkit.models.generators import build_generator

        device = method.device
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.torch, self.runtime, self.args, self.device = torch, method.task.runtime, args, device
        self.teacher, self.student = (
            build_model(arch, num_classes=args.classes).to(device).to(memory_format=layout)
            for arch in (args.teacher, args.student)
        )
        self.generator = build_generator(**method.generator_spec).to(device).to(memory_format=layout)
        self.teacher.eval().requires_grad_(False)
        self.latents = torch.randn(args.batch, method.config.nz, device=device)

    def generator_step(self) -> None:
        """Forward of generator, teacher and student; backward to the generator's weights."""
        self.generator.train()
        self.student.eval().requires_grad_(False)
        with self.runtime.autocast():
            images = self.generator(self.latents)
            total = self.teacher(images).sum() + self.student(images).sum()
        self.generator.zero_grad(set_to_none=True)
        total.backward()

    def kd_step(self) -> None:
        """Forward of generator and teacher, forward and backward of the student."""
        self.generator.eval()
        self.student.train().requires_grad_(True)
        with self.runtime.autocast():
            with self.torch.no_grad():
                images = self.generator(self.latents)
                self.teacher(images)
            total = self.student(images).sum()
        self.student.zero_grad(set_to_none=True)
        total.backward()


def timed(pieces: dict[str, Callable[[], object]], repeats: int, *, cuda: bool) -> dict[str, float]:
    """Median seconds of every piece over interleaved repetitions, after two warm-up rounds."""
    found: dict[str, list[float]] = {name: [] for name in pieces}
    for round_ in range(repeats + 2):
        for name, piece in pieces.items():
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
