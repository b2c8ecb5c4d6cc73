"""Training fresh networks on a small set of images under a protocol of `dd_protocols`, several at once where it pays.

Every network has its own streams of random numbers (weights, order, augmentation), a function of its seed alone, so
that networks trained together and one by one are the same up to rounding.

On a CPU stacking does not pay: vmap turns convolutions into grouped ones, which are slower there, and an MLP gains a
little on a step that costs almost nothing (`synthkit bench fresh_nets`, assets/results/fresh_nets.json). On other
devices both ways are timed.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from synthkit.data import dsa
from synthkit.data.dc_augment import cutmix, dc_augment, idc_augment
from synthkit.evaluation.dd_protocols import DDProtocol

_TEST_BATCH = {"cpu": 32}  # 1.8 times as fast as 500 on a CPU, whose caches hold the maps of 32 small images
_TEST_BATCH_ELSEWHERE = 500

Build = Callable[[int], nn.Module]
"""A fresh network on the device of the run, from a seed."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Images on the device, and how they become what a network sees.

    Attributes: `images` (N,C,H,W) uint8 pixels, or float of any space; `targets` (N,) int64 classes or (N,K) class
    probabilities; `mean` and `std` (1,C,1,1) turn pixels in [0,1] into training space, None where the images are there.
    """

    images: Tensor
    targets: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, rows: Tensor | slice) -> Tensor:
        """Float images as stored: pixels, 1 for 255, or training space where `mean` is None."""
        found = self.images[rows]
        return found.float() / 255 if found.dtype == torch.uint8 else found.float()

    def training(self, pixels: Tensor) -> Tensor:
        """Those in training space."""
        return pixels if self.mean is None or self.std is None else (pixels - self.mean) / self.std


@dataclass(frozen=True, kw_only=True)
class Training:
    """A protocol made definite for one network and data set."""

    protocol: DDProtocol
    epochs: int
    """E of the protocol, or what a flag put in its place."""
    lr: float
    """First learning rate."""
    strategy: str
    """DSA families for these classes."""
    dc_ops: tuple[str, ...]
    """Operations of DC's augmentation; none where it does nothing."""

    def batch(self, pictures: Pictures, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented images in training space and their targets."""
        images, targets = pictures.pixels(rows), pictures.targets[rows]
        kind = self.protocol.augment
        if kind == "idc":
            images = idc_augment(images, self.strategy, generator, cutout=self.protocol.cutmix in (0.0, 1.0))
        images = pictures.training(images)
        if kind == "dsa":
            side, device = images.shape[-1], images.device
            images = dsa.apply(
                images, dsa.draw(self.strategy, len(images), side, generator, siamese=False, device=device)
            )
        elif kind == "dc" and self.dc_ops:
            images = dc_augment(images, self.dc_ops, generator)
        if self.protocol.cutmix and float(torch.rand((), generator=generator)) < self.protocol.cutmix:
            images, targets = cutmix(images, targets, generator)
        return images, targets

    def optimizer(self, parameters: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
        """A new optimiser; elementwise, so that it treats stacked networks as it treats each of them."""
        decay = self.protocol.weight_decay
        if self.protocol.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr, weight_decay=decay)
        return torch.optim.SGD(parameters, lr, momentum=self.protocol.momentum, weight_decay=decay)


@dataclass(kw_only=True)
class NetResult:
    """One trained network. Accuracies are shares."""

    seed: int
    last: float
    """After the last epoch, on the whole test set: the result."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(epochs done, accuracy on the diagnostic part of the test set)."""
    loss: float
    """Training loss of the last epoch's last step."""

    @property
    def best(self) -> float:
        """Highest point of the curve: selected on test images, a diagnostic and no result."""
        return max((accuracy for _, accuracy in self.curve), default=self.last)


def net_seed(seed: int, index: int) -> int:
    """The seed of network `index` of a run."""
    return stream_seed(seed, "net", index)


def stream_seed(seed: int, name: str, *numbers: int) -> int:
    """A 63-bit seed for the stream called `name`."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(name.encode()), *numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def has_batchnorm(net: nn.Module) -> bool:
    """Whether any layer normalises over the batch: such networks are never stacked."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


class _Nets:
    """Networks that take their steps together: one as it is, several stacked with vmap."""

    def __init__(self, build: Build, seeds: Sequence[int]):
        nets = [build(seed).train() for seed in seeds]
        self.template, self.count = nets[0], len(nets)
        self.weights: dict[str, Tensor] = dict(self.template.named_parameters())
        if self.count > 1:
            stacked, _ = stack_module_state(nets)  # no buffers: networks with BatchNorm are not stacked
            self.weights = {name: value.detach().requires_grad_() for name, value in stacked.items()}

    def loss(self, images: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Mean cross-entropy of every network on its own batch, (R,)."""
        if self.count == 1:
            return F.cross_entropy(self.template(images[0]), targets[0])[None]

        def one(weights: dict[str, Tensor], batch: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(self.template, weights, (batch,)), target)

        return vmap(one)(self.weights, torch.stack(list(images)), torch.stack(list(targets)))

    def accuracy(self, index: int, test: Pictures, rows: int) -> float:
        """Share of the first `rows` test images that network `index` names rightly."""
        weights = self.weights
        if self.count > 1:
            weights = {name: value[index] for name, value in weights.items()}
        self.template.eval()
        size = _test_batch(test)
        right = torch.zeros((), dtype=torch.int64, device=test.images.device)
        with torch.inference_mode():
            for start in range(0, rows, size):
                part = slice(start, min(start + size, rows))
                images = test.training(test.pixels(part))
                logits = functional_call(self.template, weights, (images,))
                right += (logits.argmax(1) == test.targets[part]).sum()
        self.template.train()
        return int(right) / rows


def train_together(
    build: Build,
    sets: Sequence[Pictures],
    test: Pictures,
    training: Training,
    seeds: Sequence[int],
    *,
    points: Sequence[int] = (),
    curve_images: int = 1000,
    tick: Callable[[int], None] | None = None,
) -> list[NetResult]:
    """Train one network per seed on its set and measure it; with several seeds they are stacked.

    Args:
        sets: one per seed, all of one size.
        points: numbers of epochs after which the curve is measured, on `curve_images` test images.
        tick: told how many optimiser steps of one network have been done.

    Returns:
        One result per seed, in order.
    """
    nets, protocol, epochs = _Nets(build, seeds), training.protocol, training.epochs
    streams = [torch.Generator().manual_seed(stream_seed(seed, "batches")) for seed in seeds]
    count, size = len(sets[0]), protocol.batch_size
    device, parameters = test.images.device, list(nets.weights.values())
    optimizer = training.optimizer(parameters, training.lr)
    curves: list[list[tuple[int, float]]] = [[] for _ in seeds]
    losses = torch.full((len(seeds),), float("nan"))
    for epoch in range(protocol.epochs_run(epochs)):
        rate = training.lr * protocol.rate(epoch, epochs)
        if protocol.restarts(epoch, epochs):
            optimizer = training.optimizer(parameters, rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        orders = [torch.randperm(count, generator=stream).to(device) for stream in streams]
        for start in range(0, count, size):
            batches = [
                training.batch(part, order[start : start + size], stream)
                for part, order, stream in zip(sets, orders, streams, strict=True)
            ]
            optimizer.zero_grad(set_to_none=True)
            losses = nets.loss([images for images, _ in batches], [targets for _, targets in batches])
            losses.sum().backward()
            optimizer.step()
            if tick:
                tick(len(seeds))
        if epoch + 1 in points:
            for i, curve in enumerate(curves):
                curve.append((epoch + 1, nets.accuracy(i, test, min(curve_images, len(test)))))
    return [
        NetResult(seed=seed, last=nets.accuracy(i, test, len(test)), curve=curves[i], loss=float(losses[i].detach()))
        for i, seed in enumerate(seeds)
    ]


def stacking_pays(build: Build, pictures: Pictures, training: Training, count: int) -> bool:
    """Whether `count` networks train faster stacked than one by one (see the module's docstring)."""
    if count < 2 or pictures.images.device.type == "cpu" or has_batchnorm(build(0)):
        return False
    together = step_seconds(build, pictures, training, count)[0]
    return together < count * step_seconds(build, pictures, training, 1)[0]


def step_seconds(
    build: Build,
    pictures: Pictures,
    training: Training,
    count: int,
    *,
    rounds: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, int]:
    """(seconds of one step of `count` stacked networks, bytes that it keeps for backward), on throw-away networks.

    Args:
        rounds: timed steps, the fastest of which counts.
        clock: what is read before and after a step.
    """
    nets = _Nets(build, list(range(count)))
    stream = torch.Generator().manual_seed(0)
    rows = torch.arange(min(training.protocol.batch_size, len(pictures)), device=pictures.images.device)
    optimizer = training.optimizer(list(nets.weights.values()), 1e-9)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    def step() -> None:
        batches = [training.batch(pictures, rows, stream) for _ in range(count)]
        optimizer.zero_grad(set_to_none=True)
        nets.loss([images for images, _ in batches], [targets for _, targets in batches]).sum().backward()
        optimizer.step()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    best = float("inf")
    for _ in range(rounds):
        begun = clock()
        step()
        if rows.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - begun)
    return best, sum(kept.values())


def _test_batch(test: Pictures) -> int:
    return _TEST_BATCH.get(test.images.device.type, _TEST_BATCH_ELSEWHERE)


def scoring_seconds(build: Build, test: Pictures) -> float:
    """Seconds that one network takes for the whole test set, from one batch."""
    nets = _Nets(build, [0])
    rows = min(4 * _test_batch(test), len(test))
    nets.accuracy(0, test, rows)
    begun = time.perf_counter()
    nets.accuracy(0, test, rows)
    return (time.perf_counter() - begun) * len(test) / rows
