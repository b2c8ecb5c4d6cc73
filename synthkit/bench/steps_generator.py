"""The steps of the generator family: CuDFKD's generator step (adversary on) and KD step (sampling included)."""

from __future__ import annotations

import argparse

from synthkit.bench.steps import LAYOUTS, Pieces
from synthkit.errors import ConfigError
from synthkit.runtime import Runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Networks and batch."""
    parser.add_argument("--teacher", default="wrn40_2", help="architecture (fresh weights serve as well)")
    parser.add_argument("--student", default="wrn16_1", help="architecture")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--classes", type=int, default=10, help="number of classes")
    parser.add_argument("--compile", action="store_true", help="compile the three networks")


def build(args: argparse.Namespace, runtime: Runtime) -> Pieces:
    """CuDFKD's two steps and the bare forward and backward of its three networks."""
    from synthkit.models.build import build_model
    from synthkit.models.view import TeacherView
    from synthkit.synthesis.base import Task, seeded_init
    from synthkit.synthesis.curriculum import Curriculum
    from synthkit.synthesis.generator.cudfkd import CuDFKD, CuDFKDConfig

    if args.batch < 1:
        raise ConfigError("bench steps: --batch must be at least 1", got=args.batch)
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

    run = {"generator_step": generator_step, "kd_step": kd_step}
    for layout in LAYOUTS:
        run[f"bare_generator_step_{layout}"] = bare[layout].generator_step
        run[f"bare_kd_step_{layout}"] = bare[layout].kd_step
    floors = {kind: [f"bare_{kind}_{layout}" for layout in LAYOUTS] for kind in ("generator_step", "kd_step")}
    facts = {
        "teacher": args.teacher,
        "student": args.student,
        "generator": method.generator_spec,
        "batch": args.batch,
        "compiled": args.compile,
    }
    return Pieces(run=run, floors=floors, facts=facts)


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
