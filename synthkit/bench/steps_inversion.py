"""The step of the inversion family: a whole DeepInversion iteration (view, statistics, priors, Adam, clamp)."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from synthkit.bench.steps import LAYOUTS, Pieces
from synthkit.errors import ConfigError
from synthkit.runtime import Runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Network, batch and views."""
    parser.add_argument("--teacher", default="resnet20_a", help="architecture (fresh weights serve as well)")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--side", type=int, default=32, help="side of the images")
    parser.add_argument("--classes", type=int, default=10, help="number of classes")
    parser.add_argument("--crop", type=float, default=None, help="also crop the views, at least this share of the area")
    parser.add_argument("--per-image", action="store_true", help="a view for every image")


def build(args: argparse.Namespace, runtime: Runtime) -> Pieces:
    """A DeepInversion iteration, and the bare forward and backward-to-input of its teacher."""
    import torch

    from synthkit.models.build import build_model
    from synthkit.models.view import TeacherView
    from synthkit.synthesis.base import Task, seeded_init
    from synthkit.synthesis.curriculum import Curriculum
    from synthkit.synthesis.inversion.deepinversion import DeepInversion, DeepInversionConfig
    from synthkit.synthesis.inversion.job import Job

    if args.batch < 1:
        raise ConfigError("bench steps: --batch must be at least 1", got=args.batch)

    def network() -> torch.nn.Module:
        return build_model(args.teacher, num_classes=args.classes, image_size=args.side).eval().requires_grad_(False)

    teacher = TeacherView(
        seeded_init(network, 0),
        [0.4914, 0.4822, 0.4465],
        [0.2023, 0.1994, 0.201],
        input_size=(3, args.side, args.side),
        num_classes=args.classes,
    ).to(runtime.device, channels_last=runtime.channels_last)
    config = DeepInversionConfig(
        batch_size=args.batch, iterations=1_000_000, flip=True, clamp=True, crop=args.crop, per_image=args.per_image
    )
    task = Task(teachers=[teacher], images=args.batch, curriculum=Curriculum.named("none"), seed=0, runtime=runtime)
    inverter = DeepInversion(config, task).inverter
    labels = inverter.labels(0, args.batch)
    job = Job(inverter, 0, labels, inverter.start(0, labels))
    run: dict[str, Callable[[], object]] = {"iteration": job.step}
    for layout in LAYOUTS:
        memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        module = seeded_init(network, 0).to(runtime.device).to(memory_format=memory)  # type: ignore[call-overload]
        pixels = inverter.start(0, labels).contiguous(memory_format=memory).requires_grad_()

        def bare(module: torch.nn.Module = module, pixels: torch.Tensor = pixels) -> None:
            with runtime.autocast():
                total = module(pixels).sum()
            torch.autograd.grad(total, pixels)

        run[f"bare_{layout}"] = bare
    facts = {
        "teacher": args.teacher,
        "batch": args.batch,
        "side": args.side,
        "crop": args.crop,
        "per_image": args.per_image,
    }
    return Pieces(run=run, floors={"iteration": [f"bare_{layout}" for layout in LAYOUTS]}, facts=facts)
