"""The steps of the matching family: a DC matching step, a DM iteration, an MTT outer iteration by each exact engine.

The bare forms run the same networks on the same numbers of images: first-order gradients of the real batches, and for
the synthetic images the gradient with a graph and the backward through it, which gradient matching cannot avoid. The
sweep computes every first-order gradient twice by design, and so does its floor; unrolling once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from synthkit.bench.steps import LAYOUTS, Pieces
from synthkit.errors import ConfigError
from synthkit.runtime import Runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Network and numbers of images."""
    parser.add_argument("--arch", default="convnet", help="architecture")
    parser.add_argument("--side", type=int, default=32, help="height and width of the images (three channels)")
    parser.add_argument("--classes", type=int, default=10, help="number of classes")
    parser.add_argument("--ipc", type=int, default=1, help="synthetic images per class")
    parser.add_argument("--batch-real", type=int, default=64, help="real images per class and step (DC, DM)")
    parser.add_argument("--inner-steps", type=int, default=5, help="student steps of an MTT iteration")


def build(args: argparse.Namespace, runtime: Runtime) -> Pieces:
    """The steps of the methods and the bare networks."""
    from synthkit.synthesis.matching.cost import probe_run
    from synthkit.synthesis.matching.dc import DC, DCConfig
    from synthkit.synthesis.matching.dm import DM, DMConfig
    from synthkit.synthesis.matching.mtt import MTT, MTTConfig

    for name in ("ipc", "batch_real", "inner_steps", "classes"):
        if getattr(args, name) < 1:
            raise ConfigError(f"bench steps: --{name.replace('_', '-')} must be at least 1", got=getattr(args, name))
    task = _task(args, runtime)
    dc = DC(DCConfig(arch=args.arch, batch_real=args.batch_real), task)
    dm = DM(DMConfig(arch=args.arch, batch_real=args.batch_real, strategy="none"), task)
    mtt = MTT(MTTConfig(arch=args.arch, syn_steps=args.inner_steps, strategy="none"), task)
    network, draws = dc.fresh_network("bench"), task.rng("bench", "cpu")
    inner = probe_run(mtt, args.inner_steps)
    run: dict[str, Callable[[], object]] = {
        "dc_step": lambda: dc.matching_step(network, draws),
        "dm_step": lambda: dm.iteration(draws),
        "mtt_step_sweep": lambda: mtt.gradients(inner, "sweep"),
        "mtt_step_unroll": lambda: mtt.gradients(inner, "unroll"),
    }
    steps = tuple(run)
    for layout in LAYOUTS:
        bare = Bare(args, mtt, channels_last=layout == "channels_last")
        for step in steps:
            run[f"bare_{step}_{layout}"] = getattr(bare, step)
    floors = {step: [f"bare_{step}_{layout}" for layout in LAYOUTS] for step in steps}
    facts = {name: getattr(args, name) for name in ("arch", "side", "classes", "ipc", "batch_real", "inner_steps")}
    return Pieces(run=run, floors=floors, facts=facts)


def _task(args: argparse.Namespace, runtime: Runtime) -> Any:
    import torch

    from synthkit.data.real import RealData
    from synthkit.synthesis.base import ImageSpec, Task
    from synthkit.synthesis.curriculum import Curriculum

    shape, count = (3, args.side, args.side), 2 * args.batch_real * args.classes
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = [f"class {i}" for i in range(args.classes)]
    data = RealData(
        images=images, labels=torch.arange(count) % args.classes, class_names=names, name="noise", root="nowhere"
    )
    spec = ImageSpec(shape=shape, num_classes=args.classes, mean=[0.5] * 3, std=[0.25] * 3, class_names=names)
    return Task(
        teachers=[], images=args.ipc * args.classes, curriculum=Curriculum.named("none"), seed=0, runtime=runtime,
        data=data, spec=spec,
    )  # fmt: skip


class Bare:
    """The same network, and nothing but its passes."""

    def __init__(self, args: argparse.Namespace, method: Any, *, channels_last: bool):
        import torch

        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.torch, self.args = torch, args
        self.network = method.fresh_network("bench").to(memory_format=layout)
        self.weights = [p for p in self.network.parameters() if p.ndim > 1]
        self.all_weights = list(self.network.parameters())
        draw = torch.Generator().manual_seed(1)

        def images(count: int) -> Any:
            shape = (count, 3, args.side, args.side)
            return torch.randn(shape, generator=draw).to(method.device).contiguous(memory_format=layout)

        self.real, self.one, self.all = images(args.batch_real), images(args.ipc), images(args.ipc * args.classes)

    def _second_order(self, images: Any, weights: list[Any], wanted: list[Any]) -> None:
        gradients = self.torch.autograd.grad(self.network(images).square().sum(), weights, create_graph=True)
        self.torch.autograd.grad(gradients, wanted, [g.detach() for g in gradients])

    def dc_step(self) -> None:
        """Per class: real batch to the weights; synthetic images to the weights, and from there to the images."""
        for _ in range(self.args.classes):
            self.torch.autograd.grad(self.network(self.real).sum(), self.weights)
            images = self.one.detach().requires_grad_()
            self._second_order(images, self.weights, [images])

    def dm_step(self) -> None:
        """Per class a forward of the real batch; forward and backward of all synthetic images to themselves."""
        self.network.requires_grad_(False)
        with self.torch.no_grad():
            for _ in range(self.args.classes):
                self.network(self.real)
        images = self.all.detach().requires_grad_()
        self.torch.autograd.grad(self.network(images).sum(), images)
        self.network.requires_grad_(True)

    def mtt_step_unroll(self) -> None:
        """Per student step the second-order passes to images and weights."""
        for _ in range(self.args.inner_steps):
            images = self.all.detach().requires_grad_()
            self._second_order(images, self.all_weights, [images, *self.all_weights])

    def mtt_step_sweep(self) -> None:
        """The same, and a first-order pass per student step."""
        for _ in range(self.args.inner_steps):
            self.torch.autograd.grad(self.network(self.all).sum(), self.all_weights)
        self.mtt_step_unroll()
