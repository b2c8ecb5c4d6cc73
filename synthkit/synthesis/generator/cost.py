"""Time and memory of a run before it starts, measured on a few small steps that are undone afterwards."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from synthkit.lazy import torch
from synthkit.synthesis.base import flatten_state, unflatten_state
from synthkit.synthesis.memory import SavedBytes

if TYPE_CHECKING:
    from synthkit.synthesis.generator.student import StudentLoop

SMALL = 32  # images of a measured step on a CPU; seconds and saved bytes grow linearly with the batch


def estimate(loop: StudentLoop, cycle: Callable[[int], object]) -> tuple[tuple[float, float], float]:
    """((seconds of a cycle without student steps, seconds of a student step), bytes); the loop itself is unchanged."""
    full = loop.config.batch_size
    with trial(loop, SMALL) as scale:
        cycle(1)  # warm
        one, saved = timed(loop, lambda: cycle(1))
        three, _ = timed(loop, lambda: cycle(3))
    step = max(three - one, 0.0) / 2 * scale
    assert loop.config.batch_size == full
    return (max(one * scale - step, 0.0), step), saved * scale * 1.5 + 4 * weight_bytes(loop)


@contextmanager
def trial(loop: StudentLoop, batch: int) -> Iterator[float]:
    """Steps in here run with at most `batch` images on a CPU and are undone at the end; gives full / small batch."""
    tensors, plain = flatten_state(loop.state_dict())
    kept = unflatten_state({name: value.clone() for name, value in tensors.items()}, plain)
    config, tick = loop.config, loop.task.tick
    loop.task.tick = None
    small = min(config.batch_size, batch) if loop.device.type == "cpu" else config.batch_size
    loop.config = copy.copy(config)
    object.__setattr__(loop.config, "batch_size", small)
    try:
        with loop.module_draws("estimate"):
            yield config.batch_size / small
    finally:
        loop.config, loop.task.tick = config, tick
        loop._reset_figures()
        loop.load_state_dict(kept)
        loop.student_view.module.zero_grad(set_to_none=True)


def timed(loop: StudentLoop, work: Callable[[], object]) -> tuple[float, int]:
    """(seconds, bytes that autograd kept at once) of `work`."""
    with SavedBytes() as counter:
        start = time.perf_counter()
        work()
        if loop.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds, counter.bytes


def weight_bytes(loop: StudentLoop) -> int:
    """Bytes of every network that the loop holds (weights; gradients and two moments are up to three times more)."""
    networks = [loop.student_view.module, loop.teacher.module]
    networks += [value for value in vars(loop).values() if isinstance(value, torch.nn.Module)]
    return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())
