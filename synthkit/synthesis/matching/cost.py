"""Time and memory of trajectory matching before it starts, and the engine that suits: measured on throw-away work."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from synthkit.lazy import torch
from synthkit.synthesis.matching.flat import flattened
from synthkit.synthesis.memory import SavedBytes, free_bytes

if TYPE_CHECKING:
    from synthkit.synthesis.matching.engines import InnerRun
    from synthkit.synthesis.matching.mtt import MTT

ROOMY = 0.5  # share of the free memory that unrolling may take


def probe_run(method: MTT, steps: int) -> InnerRun:
    """A throw-away inner run of `steps` student steps from fresh weights."""
    start = flattened(method.build(0))
    return method.inner_run(method.task.rng("probe", "cpu"), start, start + 0.01, steps)


def probe(method: MTT, engine: str, steps: int) -> tuple[float, int]:
    """Seconds of `steps` student steps by `engine`, and the bytes that autograd held at once."""
    run = probe_run(method, steps)
    begun = time.perf_counter()
    with SavedBytes() as saved:
        method.gradients(run, engine)
        if method.device.type == "cuda":
            torch.cuda.synchronize(method.device)
    return time.perf_counter() - begun, saved.bytes


def choose_engine(method: MTT) -> str:
    """unroll where its graphs fit comfortably and it was faster just now, else sweep; the user is told why."""
    n = method.config.syn_steps
    steps = min(3, n)
    (swept, _), (unrolled, held) = probe(method, "sweep", steps), probe(method, "unroll", steps)
    need, free = held / steps * n, free_bytes(method.device)
    engine = "unroll" if need < ROOMY * free and unrolled < swept else "sweep"
    method.task.runtime.say(
        f"engine {engine}: unrolling {n} steps would hold {need / 2**20:,.0f} MiB ({free / 2**20:,.0f} are free);"
        f" a step took {1000 * unrolled / steps:.0f} ms unrolled, {1000 * swept / steps:.0f} ms swept"
    )
    return engine


def estimate(method: MTT) -> dict[str, float]:
    """{"seconds", "memory_bytes"} of the whole run, from two student steps and two batches of an expert."""
    c, real = method.config, method.real
    steps = min(2, c.syn_steps)
    seconds, held = probe(method, method.engine, steps)
    if method.engine == "unroll":
        held = held // steps * c.syn_steps
    vectors = 4 * method.network.size * (c.syn_steps + 1)
    total = c.iterations * seconds / steps * c.syn_steps
    if missing := method.experts.missing():
        all_images = c.expert_images or len(real)
        images = min(2 * c.expert_batch, all_images)
        spent = method.experts.train(0, 1, torch.arange(images))[1]["seconds"]
        total += missing * c.epochs * spent * all_images / images
    return {"seconds": total, "memory_bytes": 1.5 * held + vectors + real.bytes}
