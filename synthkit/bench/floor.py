"""What a piece of work cannot avoid: every call of a network that it makes, recorded, then run again bare.

While `recording` is open every outermost call of a module with weights is noted: a copy of its inputs, train or eval,
with or without gradients, and how often a gradient came back from its output all the way to its first weight or its
input; a gradient that ends in the middle (Grad-CAM) is noted with the layer that it came to. `Bare` makes exactly those
forward and backward passes again on copies of the networks: no losses, no statistics, no optimiser, no sampling. Calls
outside of modules (functional code) are not part of a floor.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from synthkit.runtime import Runtime


@dataclass
class Call:
    """One outermost call of a network."""

    network: nn.Module
    inputs: list[Any]
    """Positional arguments; tensors are copies, with `requires_grad` as the call had it."""
    options: dict[str, Any]
    """Keyword arguments."""
    training: bool
    grad: bool
    """Whether autograd was on."""
    asked: bool
    """Whether a weight asked for its gradient."""
    trained: bool = False
    """Whether a gradient reached its weights."""
    backwards: list[int] = field(default_factory=lambda: [0])
    """How often a gradient came back all the way from each output (at least one entry)."""
    begun: set[int] = field(default_factory=set)
    """Outputs that a gradient has reached, and that it has not yet left at the other end."""

    whole: set[int] = field(default_factory=set)
    """Backward passes (autograd's numbers) that came all the way."""
    layers: int = 0
    """Layers with weights, and blocks of them, that have run so far."""
    touched: dict[int, int] = field(default_factory=dict)
    """Backward pass -> the earliest of these to whose output it came."""

    @property
    def cuts(self) -> list[int]:
        """Where the passes ended that did not come all the way."""
        return [layer for number, layer in self.touched.items() if number not in self.whole]

    def touch(self, layer: int, _gradient: Tensor) -> None:
        """A gradient is at the output of an inner layer."""
        now = torch._C._current_graph_task_id()
        self.touched[now] = min(layer, self.touched.get(now, layer))

    def reached(self, weight: bool, _gradient: Tensor) -> None:
        """A gradient is at the network's first weight or at an input."""
        now = torch._C._current_graph_task_id()  # weight and input are left in one pass, in either order
        if self.begun:
            self.whole.add(now)
        self.trained = self.trained or (weight and now in self.whole)
        for i in self.begun:
            self.backwards[i] += 1
        self.begun.clear()


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """The calls made while it is open; nothing stays attached."""
    calls: list[Call] = []
    depth = 0

    def before(network: nn.Module, inputs: Any) -> None:
        nonlocal depth
        if not _weighs(network):
            return
        if depth == 0:
            kept = [_kept(value) for value in inputs]
            weights = [p for p in network.parameters() if p.requires_grad][:1]
            call = Call(network, kept, {}, network.training, torch.is_grad_enabled(), bool(weights))
            calls.append(call)
            if call.grad:
                given = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
                handles.extend(w.register_hook(partial(call.reached, True)) for w in weights)
                handles.extend(v.register_hook(partial(call.reached, False)) for v in given)
        depth += 1

    def after(network: nn.Module, _inputs: Any, options: dict[str, Any], output: Any) -> None:
        nonlocal depth
        if not _weighs(network):
            return
        depth -= 1
        call = calls[-1]
        if depth > 0:
            for tensor in _with_gradient(output):
                tensor.register_hook(partial(call.touch, call.layers))
            call.layers += 1
        else:
            call.options = {name: _kept(value) for name, value in options.items()}
            outputs = _with_gradient(output)
            call.backwards = [0] * max(1, len(outputs))
            for i, tensor in enumerate(outputs):
                tensor.register_hook(partial(_begin, call, i))

    handles: list[Any] = [
        hooks.register_module_forward_pre_hook(before),
        hooks.register_module_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class Bare:
    """The calls of a recording and nothing else, in one memory layout."""

    def __init__(self, calls: list[Call], runtime: Runtime, *, channels_last: bool):
        self.calls, self.runtime = calls, runtime
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.copies: dict[nn.Module, nn.Module] = {}
        for call in calls:
            if call.network not in self.copies:
                network = copy.deepcopy(call.network)
                network.zero_grad(set_to_none=True)
                self.copies[call.network] = network.to(memory_format=layout)  # type: ignore[call-overload]  # stub lacks it
        self.outputs: list[Any] = []  # of the inner layers of the latest call, where they are needed
        for network in {self.copies[call.network] for call in calls if call.cuts}:
            for layer in network.modules():
                if layer is not network and _weighs(layer):
                    layer.register_forward_hook(lambda _layer, _inputs, output: self.outputs.append(output))
        self.inputs = [[_laid_out(value, layout) for value in call.inputs] for call in calls]

    def __call__(self) -> None:
        """All forwards and backwards once."""
        for call, inputs in zip(self.calls, self.inputs, strict=True):
            network = self.copies[call.network]
            if network.training != call.training:
                network.train(call.training)
            network.requires_grad_(call.trained or (call.asked and bool(call.cuts)))
            self.outputs.clear()
            with torch.set_grad_enabled(call.grad), self.runtime.autocast():
                output = network(*inputs, **call.options)
            for layer in call.cuts:
                ends = _with_gradient(output)
                found = _with_gradient(self.outputs[layer])
                torch.autograd.grad(ends, found, [torch.ones_like(t) for t in ends], retain_graph=True)
            times = max(call.backwards)
            if not times:
                continue
            used = [t for t, n in zip(_with_gradient(output), call.backwards, strict=True) if n]
            leaves = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
            leaves += [p for p in network.parameters() if p.requires_grad]
            for left in reversed(range(times)):
                torch.autograd.grad(
                    used, leaves, [torch.ones_like(t) for t in used], retain_graph=left > 0, allow_unused=True
                )
        self.outputs.clear()


def _weighs(network: nn.Module) -> bool:
    """Whether the module holds weights: losses, augmentations and normalisers do not."""
    return next(network.parameters(), None) is not None


def _kept(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _laid_out(value: Any, layout: torch.memory_format) -> Any:
    if not isinstance(value, Tensor) or value.ndim != 4:
        return value
    return value.detach().contiguous(memory_format=layout).requires_grad_(value.requires_grad)


def _with_gradient(output: Any) -> list[Tensor]:
    """The tensors of an output that carry gradient, in order."""
    values = output if isinstance(output, (tuple, list)) else output.values() if isinstance(output, dict) else [output]
    return [v for v in values if isinstance(v, Tensor) and v.requires_grad]


def _begin(call: Call, output: int, _gradient: Tensor) -> None:
    call.begun.add(output)
