"""Gaussian diffusion with learned-range variance: schedule, respacing, training terms and sampling steps.

Numbers only: the network is handed in as its output. (The samplers of `synthesis/diffusion` drive diffusers'
schedulers, which know neither the variational term of training nor the learned range in float64.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthkit.errors import ConfigError

_EDGE = 0.999  # beyond it a value is taken as the outermost bin
_BIN = 1.0 / 255.0  # half the width of a bin
_FLOOR = 1e-12  # of a probability under a logarithm

Index = Tensor | int
"""Step of every row (N,), best on the CPU, or one of all rows."""
Predict = Callable[[Tensor, Tensor], Tensor]
"""(state (N, D), time (1,) of the training process) -> the network's output (N, 2 D)."""


def cosine_betas(steps: int = 1000, *, offset: float = 0.008, largest: float = 0.999) -> np.ndarray:
    """(steps,) float64: `beta_i = min(1 - a(i+1) / a(i), largest)`, `a(i) = cos^2((i/steps + s) / (1 + s) * pi/2)`."""
    abar = [math.cos((i / steps + offset) / (1 + offset) * math.pi / 2) ** 2 for i in range(steps + 1)]
    return np.array([min(1 - after / before, largest) for before, after in zip(abar, abar[1:], strict=False)])


def respaced(steps: int, count: int | str) -> list[int]:
    """The `count` of `steps` times at which is sampled, rising; "ddimN" takes every k-th from 0 with a whole k.

    A number adds `(steps - 1) / (count - 1)` up and rounds half to even, as the sources do.

    Raises:
        ConfigError: there are not so many times, or no whole stride gives that number.
    """
    if isinstance(count, str) and count.startswith("ddim"):
        wanted = int(count.removeprefix("ddim"))
        stride = next((k for k in range(1, steps) if len(range(0, steps, k)) == wanted), None)
        if stride is None:
            raise ConfigError(f"sampling steps: no whole stride through {steps} gives that number", got=count)
        return list(range(0, steps, stride))
    count = int(count)
    if not 2 <= count <= steps:
        raise ConfigError(f"sampling steps must lie between 2 and {steps}", got=count)
    at, taken = 0.0, []
    for _ in range(count):
        taken.append(round(at))
        at += (steps - 1) / (count - 1)
    return taken


class GaussianDiffusion:
    """The process over `len(times)` of the steps of `betas`.

    With `a_t = prod (1 - beta)` the state is `x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps`. A network gives (..., 2 D): the
    noise eps, and v in [-1, 1] that places the log variance between its bounds,
    `(v + 1)/2 log beta_t + (1 - v)/2 log beta~_t`, `beta~_t = beta_t (1 - a_{t-1}) / (1 - a_t)`.

    Args:
        betas: (T,) float64 of the training process.
        times: rising numbers of the steps that are kept; none keeps all. `times[index]` is what the network is told.
    """

    def __init__(self, betas: np.ndarray, times: Sequence[int] | None = None):
        self.times = list(range(len(betas))) if times is None else list(times)
        passed = np.cumprod(1.0 - betas)[self.times]
        self.betas = betas.copy() if times is None else 1.0 - passed / np.append(1.0, passed[:-1])
        self.abar = kept = np.cumprod(1.0 - self.betas)  # of the betas as rounded, like the sources
        self.abar_before = before = np.append(1.0, kept[:-1])
        self.posterior_variance = self.betas * (1.0 - before) / (1.0 - kept)
        # the variance of the first step is 0: its logarithm takes the second's
        self.posterior_log_variance = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        self.posterior_from_clean = self.betas * np.sqrt(before) / (1.0 - kept)
        self.posterior_from_state = (1.0 - before) * np.sqrt(1.0 - self.betas) / (1.0 - kept)

    def __len__(self) -> int:
        return len(self.times)

    def _at(self, index: Index, like: Tensor, *tables: np.ndarray) -> tuple[Any, ...]:
        """Values of float64 tables at `index`: (N, 1) tensors of the type of `like`, moved to its device together."""
        if isinstance(index, int):
            return tuple(float(table[index]) for table in tables)
        rows = np.stack(tables)[:, index.cpu().numpy()]
        return tuple(torch.from_numpy(rows).to(like.device, like.dtype)[..., None])

    def noised(self, clean: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """x_t of `clean` (N, D) at `index` (N,)."""
        signal, spread = self._at(index, clean, np.sqrt(self.abar), np.sqrt(1.0 - self.abar))
        return signal * clean + spread * noise

    def _prediction(self, state: Tensor, output: Tensor, index: Index) -> tuple[Tensor, Tensor, Tensor]:
        """(clean, mean, log variance) of the step from `state`, by the network's `output`."""
        noise, place = output.chunk(2, dim=-1)
        scale, share, low, high, from_clean, from_state = self._at(
            index,
            state,
            np.sqrt(1.0 / self.abar),
            np.sqrt(1.0 / self.abar - 1.0),
            self.posterior_log_variance,
            np.log(self.betas),
            self.posterior_from_clean,
            self.posterior_from_state,
        )
        clean = scale * state - share * noise
        position = (place + 1) / 2
        return clean, from_clean * clean + from_state * state, position * high + (1 - position) * low

    def terms(
        self, output: Tensor, clean: Tensor, state: Tensor, noise: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both terms of the training loss, one number per row.

        The first is the mean squared error of the noise. The second is the variational bound in bits per dimension:
        `KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))`, at step 0 the negative log likelihood of `clean` in bins of
        2/255; it teaches the variance alone, since the predicted noise enters without gradient.

        Shapes: `output` (N, 2 D); `clean`, `state`, `noise` (N, D); `index` (N,) int64; returns (N,), (N,).
        """
        predicted, place = output.chunk(2, dim=-1)
        squared = (predicted - noise).square().mean(dim=-1)
        frozen = torch.cat([predicted.detach(), place], dim=-1)
        _, mean, log_variance = self._prediction(state, frozen, index)
        from_clean, from_state, true_log_variance = self._at(
            index, clean, self.posterior_from_clean, self.posterior_from_state, self.posterior_log_variance
        )
        true_mean = from_clean * clean + from_state * state
        kl = 0.5 * (
            log_variance
            - true_log_variance
            - 1.0
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean).square() * torch.exp(-log_variance)
        )
        first = (index == 0).to(clean.device)[:, None]
        bound = torch.where(first, -binned_log_likelihood(clean, mean, 0.5 * log_variance), kl)
        return squared, bound.mean(dim=-1) / math.log(2.0)

    def ancestral_step(
        self, state: Tensor, output: Tensor, index: Index, noise: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """x_{t-1} of `state` (N, D): the predicted mean plus the predicted deviation times `noise`; none at step 0."""
        _, mean, log_variance = self._prediction(state, output, index)
        (later,) = self._at(index, state, np.minimum(np.arange(len(self)), 1.0))
        return mean + later * temperature * torch.exp(0.5 * log_variance) * noise

    def ddim_step(self, state: Tensor, output: Tensor, index: Index, noise: Tensor, eta: float = 0.0) -> Tensor:
        """x_{t-1} of DDIM (Song et al. 2021): deterministic at `eta` 0, the variance of the posterior at 1."""
        clean, _, _ = self._prediction(state, output, index)
        kept, before = self.abar, self.abar_before
        sigma = eta * np.sqrt((1.0 - before) / (1.0 - kept)) * np.sqrt(1.0 - kept / before)
        signal, direction, spread = self._at(
            index, state, np.sqrt(before), np.sqrt(1.0 - before - sigma**2), sigma * (np.arange(len(kept)) > 0)
        )
        return signal * clean + direction * output.chunk(2, dim=-1)[0] + spread * noise

    def step(self, predict: Predict, state: Tensor, at: int, noise: Tensor, *, eta: float | None = None) -> Tensor:
        """One step of sampling from `state` (N, D) at index `at`; `eta` none is ancestral, a number is DDIM's."""
        output = predict(state, torch.full((1,), self.times[at], device=state.device))
        if eta is None:
            return self.ancestral_step(state, output, at, noise)
        return self.ddim_step(state, output, at, noise, eta)


def binned_log_likelihood(values: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the bin of 2/255 around each value in [-1, 1] under N(mean, exp(log_scale)^2).

    The outermost bins reach to infinity; values outside [-1, 1] count as in them. The normal distribution function is
    the tanh approximation of the sources.
    """

    def below(x: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    inverse = torch.exp(-log_scale)
    upper = below(inverse * (values - mean + _BIN))
    lower = below(inverse * (values - mean - _BIN))
    return torch.where(
        values < -_EDGE,
        upper.clamp_min(_FLOOR).log(),
        torch.where(values > _EDGE, (1.0 - lower).clamp_min(_FLOOR).log(), (upper - lower).clamp_min(_FLOOR).log()),
    )
