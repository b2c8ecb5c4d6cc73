"""One batch of pixels on its way: the steps of the optimisation, and its state at any iteration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from synthkit.errors import NonFiniteError
from synthkit.lazy import F, torch
from synthkit.synthesis.base import load_optimizer_state, optimizer_state
from synthkit.synthesis.inversion.config import InversionConfig

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.synthesis.inversion.loop import Inverter

LOGS = 10
"""Lines of the log per batch."""


class Job:
    """One batch of pixels under optimisation; `t` iterations are done."""

    def __init__(self, inverter: Inverter, start: int, labels: Tensor, pixels: Tensor, t: int = 0):
        self.inverter, self.start, self.labels, self.t = inverter, start, labels, t
        memory = torch.channels_last if inverter.task.runtime.channels_last else torch.contiguous_format
        self.pixels = pixels.to(inverter.device, copy=True).contiguous(memory_format=memory).requires_grad_()
        self.bounds = inverter.bounds(self.pixels.dtype)
        self.optimizer: torch.optim.Optimizer | None = None
        self.record: dict[str, float] = {}

    @property
    def done(self) -> bool:
        """Whether all iterations are done."""
        return self.t >= self.inverter.iterations

    def step(self) -> dict[str, Tensor]:
        """One iteration: view, terms, gradient, Adam, clamp. Returns the terms before the step, detached."""
        inverter, stage = self.inverter, self.inverter.stage_of(self.t)
        if self.optimizer is None or self.t == stage.first:
            self.optimizer = inverter.optimizer(self.pixels)
        optimizer = self.optimizer
        optimizer.param_groups[0]["lr"] = inverter.learning_rate(self.t)
        base = F.avg_pool2d(self.pixels, stage.pool) if stage.pool > 1 else self.pixels
        size = (base.shape[2], base.shape[3])
        view = inverter.views(self.start, len(base), self.t, size)(base)
        terms = inverter.terms(self, view, base)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        if inverter.config.clamp:
            with torch.no_grad():
                self.pixels.clamp_(*self.bounds)
        self.t += 1
        return {name: term.detach() for name, term in terms.items()}

    def run(self, advance: Callable[[int], int]) -> Job:
        """All iterations that are left; `advance(images)` tells the progress after each and gives the step."""
        while not self.done:
            self.log(self.step(), advance)
        return self

    def log(self, terms: dict[str, Tensor], advance: Callable[[int], int]) -> None:
        """Tell the progress line of one iteration, and the log of every tenth part of them."""
        step = advance(len(self.labels))
        every = max(1, self.inverter.iterations // LOGS)
        if not self.inverter.task.log or ((self.t - 1) % every and not self.done):
            return
        figures = {name: float(value) for name, value in terms.items()}
        if not math.isfinite(sum(figures.values())):
            raise NonFiniteError(
                f"inversion diverged at iteration {self.t} of the rows from {self.start} on",
                got=figures,
                hint="lower --method.lr, or the weight of the BatchNorm term (--method.bn)",
            )
        self.record = {"step": step, "row": self.start, "iteration": self.t, "loss": sum(figures.values()), **figures}
        if not self.done:  # the last line is told with what the finished images look like
            self.inverter.task.log(self.record)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        optimizer = {} if self.optimizer is None else optimizer_state(self.optimizer)
        return {"start": self.start, "count": len(self.labels), "t": self.t, "pixels": self.pixels.detach(),
                "optimizer": optimizer}  # fmt: skip

    @classmethod
    def from_state(cls, inverter: Inverter, state: dict[str, Any]) -> Job:
        """The job that `state_dict` was taken of."""
        start = int(state["start"])
        job = cls(inverter, start, inverter.labels(start, int(state["count"])), state["pixels"], t=int(state["t"]))
        if state.get("optimizer"):
            job.optimizer = inverter.optimizer(job.pixels)
            load_optimizer_state(job.optimizer, state["optimizer"])
        return job


def learning_rate(t: int, iterations: int, config: InversionConfig) -> float:
    """Rate of iteration `t` of a stage of T: lr (t + 1) / w in the warm-up w, then lr or its half cosine.

    The half cosine is lr (1 + cos(pi (t - w) / (T - w))) / 2.

    Source: NVlabs/DeepInversion@2413af1 `utils/utils.py:lr_cosine_policy`; VILA-Lab/SRe2L@8d00cba (w = 0).
    """
    if t < config.warmup:
        return config.lr * (t + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    return 0.5 * config.lr * (1 + math.cos(math.pi * (t - config.warmup) / (iterations - config.warmup)))


def even_parts(start: int, end: int, most: int) -> list[tuple[int, int]]:
    """[start, end) cut into as few stretches of at most `most` as there can be, of almost equal length."""
    parts = -(-(end - start) // most)
    edges = [start + (end - start) * i // parts for i in range(parts + 1)]
    return list(zip(edges, edges[1:], strict=False))
