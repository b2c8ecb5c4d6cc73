"""The steps of the diffusion family: a sampling step without guidance, with it, and with it through the network."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from synthkit.bench.steps import LAYOUTS, Pieces
from synthkit.errors import ConfigError
from synthkit.runtime import Runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Networks and batch."""
    parser.add_argument("--teacher", default="lenet5_bn", help="architecture (fresh weights serve as well)")
    parser.add_argument("--channels", default="16,32,64", help="channels of the UNet's levels")
    parser.add_argument("--size", type=int, default=32, help="side of the grey images")
    parser.add_argument("--batch", type=int, default=64, help="images per step")


def build(args: argparse.Namespace, runtime: Runtime) -> Pieces:
    """Whole steps (prediction, energy, gradient, update) and the bare passes of the same two networks."""
    import torch

    from synthkit.models.build import build_model
    from synthkit.models.view import TeacherView
    from synthkit.synthesis.base import Task, seeded_init
    from synthkit.synthesis.curriculum import Curriculum
    from synthkit.synthesis.diffusion.diffusion import Diffusion, GuidedConfig

    if args.batch < 1:
        raise ConfigError("bench steps: --batch must be at least 1", got=args.batch)
    size = (1, args.size, args.size)
    classifier = seeded_init(lambda: build_model(args.teacher, num_classes=10, in_channels=1, image_size=args.size), 0)
    teacher = TeacherView(classifier, [0.1307], [0.3081], input_size=size, num_classes=10)
    teacher.to(runtime.device, channels_last=runtime.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), tuple(int(width) for width in args.channels.split(",")), size)
        configs = {
            "step": GuidedConfig(model=folder, sampler="ddim", guidance=0.0),
            "guided_step": GuidedConfig(model=folder, sampler="ddim"),
            "guided_step_through": GuidedConfig(model=folder, sampler="ddim", through=True),
        }
        none = Curriculum.named("none")
        task = Task(teachers=[teacher], images=args.batch, curriculum=none, seed=0, runtime=runtime)
        methods = {name: Diffusion(config, task) for name, config in configs.items()}
    draw = torch.Generator().manual_seed(0)
    state = torch.randn(args.batch, *size, generator=draw).to(runtime.device)
    labels = torch.arange(args.batch, device=runtime.device) % 10

    def whole(method: Diffusion) -> Callable[[], None]:
        step = method.sampler.steps - 2  # with signal enough to be guided
        now, condition = method.sampler.times[step].to(runtime.device), method.painter.condition(labels)
        scale = method.guidance_scale(0, args.batch).to(runtime.device)

        def run() -> None:
            method.sampler.restart()
            output = method.predict(state, step, now, condition, method.energy(labels, 0), scale)
            method.sampler.update(output, step, state, draw)

        return run

    run: dict[str, Callable[[], object]] = {name: whole(method) for name, method in methods.items()}
    floors: dict[str, list[str]] = {name: [] for name in methods}
    for layout in LAYOUTS:
        bare = Bare(methods["step"], state, labels, runtime, channels_last=layout == "channels_last")
        for name in methods:
            piece = f"bare_{name}_{layout}"
            run[piece] = getattr(bare, name)
            floors[name].append(piece)
    facts = {"teacher": args.teacher, "unet": args.channels, "image_size": list(size), "batch": args.batch}
    return Pieces(run=run, floors=floors, facts=facts)


def save_model(folder: Path, channels: tuple[int, ...], size: tuple[int, int, int]) -> None:
    """A class-conditional UNet with random weights, as `synthkit teach` writes it."""
    from diffusers import UNet2DModel  # type: ignore[attr-defined]  # lazy module

    from synthkit.config.schema import TeachConfig
    from synthkit.synthesis.base import seeded_init
    from synthkit.synthesis.diffusion.card import DiffusionCard
    from synthkit.synthesis.diffusion.training import save_pipeline, scheduler_for, unet_config

    shape = unet_config(TeachConfig(arch="unet", data="", unet_channels=channels), size, 10)
    about = DiffusionCard(
        image_size=size, class_names=[str(i) for i in range(10)], mean=[0.5], std=[0.5], null_class=10
    )  # fmt: skip
    save_pipeline(folder, seeded_init(lambda: UNet2DModel(**shape), 0), scheduler_for("v_prediction"), about)


class Bare:
    """The same two networks and nothing else."""

    def __init__(self, method, state, labels, runtime: Runtime, *, channels_last: bool):
        import copy

        import torch

        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.torch, self.runtime, self.labels = torch, runtime, labels
        self.network = copy.deepcopy(method.painter.network).to(memory_format=layout)
        self.teacher = copy.deepcopy(method.task.teacher.module).to(memory_format=layout)
        self.state, self.time = state.to(memory_format=layout), torch.full_like(labels, 500)

    def step(self) -> None:
        """Forward of the UNet."""
        with self.torch.no_grad(), self.runtime.autocast():
            self.network(self.state, self.time, class_labels=self.labels)

    def guided_step(self) -> None:
        """Forward of the UNet; forward and backward of the teacher to its input."""
        self.step()
        images = self.state.detach().requires_grad_()
        with self.runtime.autocast():
            total = self.teacher(images).sum()
        total.backward()

    def guided_step_through(self) -> None:
        """Forward of UNet and teacher, backward to the UNet's input."""
        images = self.state.detach().requires_grad_()
        with self.runtime.autocast():
            output = self.network(images, self.time, class_labels=self.labels).sample
            total = self.teacher(output).sum()
        total.backward()
