"""Gradients of a matching loss through an inner training run: three engines, one signature.

    theta_{i+1} = theta_i - alpha g_i,  g_i = grad_theta loss(theta_i, A_i x[batch_i], y[batch_i]),  i = 0 .. N-1
    L = ||theta_N - theta*||^2 / D,  D = ||theta_0 - theta*||^2

Each engine returns L and its gradients for pixels x, step size alpha and (where they are learnt) label logits y.

- `sweep` is exact and holds one step's graph at a time: forward without a graph, keeping theta_0 .. theta_N, then
  backwards through the steps with the adjoint lambda = dL / dtheta_i: with s = <lambda, g_i>, dL/dx -= alpha ds/dx,
  dL/dy -= alpha ds/dy, dL/dalpha -= s, lambda <- lambda - alpha ds/dtheta_i.
- `unroll` is exact and lets autograd hold all N graphs.
- `tesla` holds one step's graph and leaves the dependence of theta_i on x out: the last adjoint at every step,
  dL/dx = sum_i 2 <alpha (theta* - theta_0) + alpha^2 G, dg_i/dx> / D with G = sum_i g_i held constant.

Source: MTT (Cazenavette et al., CVPR 2022, arXiv 2203.11932), GeorgeCazenavette/mtt-distillation@50dccea; TESLA (Cui et
al., ICML 2023, arXiv 2211.10586), justincui03/tesla@488842e; the sweep is reverse-mode differentiation with
recomputed steps (matching.md 2.6).
Cost of N steps on b images, F the forward cost of an image: unroll 9 N b F, sweep 12 N b F, tesla up to 12 N b F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class InnerRun:
    """A training run on the synthetic set, as a function that can be repeated exactly."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(theta flat (P,), images (b, C, H, W), labels (b,) or label logits (b, K)) -> scalar training loss."""
    start: Tensor
    """theta_0 (P,)."""
    target: Tensor
    """theta* (P,)."""
    batches: Sequence[Tensor]
    """N index tensors into the synthetic set, one per step, without repetition within a step."""
    augment: Sequence[Callable[[Tensor], Tensor]]
    """N transforms A_i of a batch; the same images give the same result at every call."""

    @property
    def scale(self) -> Tensor:
        """D."""
        return (self.start - self.target).square().sum()

    def leaves(self, i: int, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Images and labels of step i as graph leaves, and those of the two that take a gradient."""
        x, y = pixels[self.batches[i]].detach().requires_grad_(), labels[self.batches[i]].detach()
        soft = y.is_floating_point()
        return x, y.requires_grad_(soft), [x, y] if soft else [x]

    def gradient(self, i: int, theta: Tensor, x: Tensor, y: Tensor, *, create_graph: bool = False) -> Tensor:
        """g_i (P,) at theta, a tensor that requires grad."""
        loss = self.loss(theta, self.augment[i](x), y)
        return torch.autograd.grad(loss, theta, create_graph=create_graph)[0]


@dataclass(kw_only=True)
class Gradients:
    """What an engine returns; nothing carries a graph."""

    loss: Tensor
    """L, scalar."""
    pixels: Tensor
    """dL/dx, of the shape of the pixels."""
    alpha: Tensor
    """dL/dalpha, scalar."""
    labels: Tensor | None
    """dL/dy, of the shape of the label logits; None for hard labels."""

    def finite(self) -> bool:
        """Whether no number is NaN or infinite (one synchronisation with the device)."""
        parts = [self.loss, self.pixels.sum(), self.alpha, *([] if self.labels is None else [self.labels.sum()])]
        return bool(torch.stack(parts).isfinite().all())


Engine = Callable[[InnerRun, "Tensor", "Tensor", "Tensor"], Gradients]


def sweep(run: InnerRun, pixels: Tensor, labels: Tensor, alpha: Tensor) -> Gradients:
    """Exact, with the activations of one step; pixels (M, C, H, W), labels (M,) or (M, K), alpha scalar."""
    alpha = alpha.detach()
    thetas = _trained(run, pixels, labels, alpha)[0]
    adjoint, found = _begun(run, thetas[-1], pixels, labels)
    for i in reversed(range(len(run.batches))):
        theta = thetas[i].requires_grad_()
        x, y, leaves = run.leaves(i, pixels, labels)
        s = torch.dot(adjoint, run.gradient(i, theta, x, y, create_graph=True))
        *parts, through = torch.autograd.grad(s, [*leaves, theta])
        _add(found, run.batches[i], parts, -alpha)
        found.alpha -= s.detach()
        adjoint = adjoint - alpha * through
        thetas.pop()
    return found


def tesla(run: InnerRun, pixels: Tensor, labels: Tensor, alpha: Tensor) -> Gradients:
    """TESLA's formula, exact for one step only: the last adjoint is applied at every step."""
    alpha = alpha.detach()
    thetas, total = _trained(run, pixels, labels, alpha)
    adjoint, found = _begun(run, thetas[-1], pixels, labels)
    for i in range(len(run.batches)):
        x, y, leaves = run.leaves(i, pixels, labels)
        s = torch.dot(adjoint, run.gradient(i, thetas[i].requires_grad_(), x, y, create_graph=True))
        _add(found, run.batches[i], torch.autograd.grad(s, leaves), -alpha)
    found.alpha = -torch.dot(adjoint, total)
    return found


def tesla_as_released(run: InnerRun, pixels: Tensor, labels: Tensor, alpha: Tensor) -> Gradients:
    """`tesla` with half the gradient for pixels and labels, which is what the released code computes (it writes
    2 * on a tuple, which repeats it)."""
    found = tesla(run, pixels, labels, alpha)
    found.pixels /= 2
    if found.labels is not None:
        found.labels /= 2
    return found


def unroll(run: InnerRun, pixels: Tensor, labels: Tensor, alpha: Tensor) -> Gradients:
    """Exact, with the activations of all steps at once."""
    x, step = pixels.detach().requires_grad_(), alpha.detach().requires_grad_()
    soft = labels.is_floating_point()
    y = labels.detach().requires_grad_(soft)
    theta = run.start.detach().requires_grad_()
    for i, batch in enumerate(run.batches):
        theta = theta - step * run.gradient(i, theta, x[batch], y[batch], create_graph=True)
    loss = (theta - run.target).square().sum() / run.scale
    for_x, for_alpha, *rest = torch.autograd.grad(loss, [x, step, *([y] if soft else [])])
    return Gradients(loss=loss.detach(), pixels=for_x, alpha=for_alpha, labels=rest[0] if soft else None)


ENGINES: dict[str, Engine] = {
    "sweep": sweep,
    "unroll": unroll,
    "tesla": tesla,
    "tesla_as_released": tesla_as_released,
}


def minibatches(count: int, size: int, steps: int, draws: torch.Generator) -> list[Tensor]:
    """Indices of `steps` minibatches of a set of `count`: each permutation is split into chunks of `size` and the last
    chunk comes first (so that a short remainder leads); a new one is drawn when it is used up."""
    found: list[Tensor] = []
    while len(found) < steps:
        found += reversed(torch.randperm(count, generator=draws).split(size))
    return found[:steps]


def _trained(run: InnerRun, pixels: Tensor, labels: Tensor, alpha: Tensor) -> tuple[list[Tensor], Tensor]:
    """theta_0 .. theta_N without graphs, and the sum of the gradients."""
    thetas, total = [run.start.detach()], torch.zeros_like(run.start)
    for i, batch in enumerate(run.batches):
        gradient = run.gradient(i, thetas[-1].detach().requires_grad_(), pixels[batch].detach(), labels[batch].detach())
        thetas.append(thetas[-1] - alpha * gradient)
        total += gradient
    return thetas, total


def _begun(run: InnerRun, end: Tensor, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Gradients]:
    """The adjoint 2 (theta_N - theta*) / D at the end, and gradients of zero to add to."""
    scale, miss = run.scale, end - run.target
    found = Gradients(
        loss=miss.square().sum() / scale,
        pixels=torch.zeros_like(pixels),
        alpha=torch.zeros_like(scale),
        labels=torch.zeros_like(labels) if labels.is_floating_point() else None,
    )
    return 2 * miss / scale, found


def _add(found: Gradients, batch: Tensor, parts: Sequence[Tensor], factor: Tensor) -> None:
    found.pixels.index_add_(0, batch, factor * parts[0])
    if found.labels is not None:
        found.labels.index_add_(0, batch, factor * parts[1])
