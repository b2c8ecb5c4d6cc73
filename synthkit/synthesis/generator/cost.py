"""Time and memory of a generator run before it starts, measured on two steps of a throw-away copy."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

from synthkit.lazy import torch
from synthkit.synthesis.memory import SavedBytes

if TYPE_CHECKING:
    from synthkit.synthesis.generator.loop import GeneratorLoop

_SMALL = 32  # images of a measured step on a CPU; seconds and saved bytes grow linearly with the batch


def estimate(loop: GeneratorLoop) -> dict[str, float]:
    """{"seconds", "memory_bytes"} of the whole run; the loop itself is unchanged."""
    twin = _twin(loop)
    scale = loop.config.batch_size / twin.config.batch_size
    seconds, saved = {}, 0
    for kind, step in (("g", twin.generator_step), ("s", twin.student_step)):
        twin._set_modes(generating=kind == "g")
        with loop._module_draws("estimate"):
            step()
        with loop._module_draws("estimate"), SavedBytes() as counter:
            start = time.perf_counter()
            step()
            if loop.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[kind] = (time.perf_counter() - start) * scale
        saved = max(saved, counter.bytes)
    loop._set_modes(generating=False)
    networks = (loop.generator, loop.student_view.module, loop.teacher.module)
    weights = sum(p.numel() * p.element_size() for network in networks for p in network.parameters())
    cycles = loop.total_steps / loop.config.kd_steps
    return {
        "seconds": cycles * loop.config.g_steps * seconds["g"] + loop.total_steps * seconds["s"],
        "memory_bytes": saved * scale * 1.5 + 4 * weights,  # workspace on top; weights, gradients, two moments
    }


def _twin(loop: GeneratorLoop) -> GeneratorLoop:
    twin = copy.copy(loop)
    twin.generator = copy.deepcopy(loop.generator)
    twin.student_view = copy.copy(loop.student_view)
    twin.student_view.module = copy.deepcopy(loop.student_view.module)
    twin.optimizer_g = torch.optim.Adam(twin.generator.parameters(), lr=0.0)
    twin.optimizer_s = torch.optim.SGD(twin.student_view.module.parameters(), lr=0.0, momentum=0.9)
    twin.noise = loop.task.rng("estimate")
    small = min(loop.config.batch_size, _SMALL) if loop.device.type == "cpu" else loop.config.batch_size
    twin.config = copy.copy(loop.config)
    object.__setattr__(twin.config, "batch_size", small)
    twin._reset_figures()
    return twin
