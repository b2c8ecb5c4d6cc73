"""Batch statistics of BatchNorm inputs, differentiable and cheap.

Instead of a forward hook that reads every BN input a second time, the layer's own forward is replaced while a context
is open: one fused autograd node returns the normalised output together with the batch mean and variance, and its
backward adds the gradient of the statistics in the same pass. Statistics are computed in fp32 at least.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _EvalBatchNormWithStatistics(torch.autograd.Function):
    """(x, scale, shift) -> (x * scale + shift, mean, biased variance), per channel of (B, C, H, W)."""

    @staticmethod
    def forward(ctx, x: Tensor, bn: nn.BatchNorm2d):
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        mean, var = torch.batch_norm_update_stats(wide, None, None, 0.0)
        y = torch.nn.functional.batch_norm(
            x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training=False, eps=bn.eps
        )
        scale = torch.rsqrt(bn.running_var + bn.eps)  # type: ignore[operator]  # checked by ModelView.batchnorms
        if bn.weight is not None:
            scale = scale * bn.weight
        ctx.save_for_backward(x, scale, mean)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor, grad_mean: Tensor, grad_var: Tensor):  # type: ignore[override]
        x, scale, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = grad_var * (2.0 / count)
        offset = grad_mean / count - slope * mean
        shape = (1, -1, 1, 1)
        grad = torch.addcmul(offset.to(grad_y.dtype).view(shape), grad_y, scale.to(grad_y.dtype).view(shape))
        return grad.addcmul_(x, slope.to(x.dtype).view(shape)), None


class BatchNormStatistics:
    """Batch means and variances of BN inputs of the latest forward, with the running ones beside them."""

    def __init__(self, layers: Sequence[nn.BatchNorm2d]):
        self.layers = list(layers)
        self._found: dict[nn.BatchNorm2d, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Replace the layers' forward while open; restore it whatever happens."""
        for layer in self.layers:
            layer.forward = self._forward(layer)  # type: ignore[method-assign]  # undone below
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def _forward(self, layer: nn.BatchNorm2d):
        def forward(x: Tensor) -> Tensor:
            y, mean, var = _EvalBatchNormWithStatistics.apply(x, layer)  # type: ignore[misc]
            self._found[layer] = (mean, var)
            return y

        return forward  # lives on the instance, so the class's forward is untouched

    @property
    def batch(self) -> list[tuple[Tensor, Tensor]]:
        """(mean, biased variance), each (C,), of every layer in module order."""
        return [self._found[layer] for layer in self.layers if layer in self._found]

    @property
    def running(self) -> list[tuple[Tensor, Tensor]]:
        """The teacher's running (mean, variance) in the same order."""
        return [
            (layer.running_mean, layer.running_var)  # type: ignore[misc]  # checked by ModelView.batchnorms
            for layer in self.layers
            if layer in self._found
        ]

    def per_layer(self, ema: StatisticsEMA | None = None) -> list[Tensor]:
        """BN-statistics loss of every layer: ||var - running_var||_2 + ||mean - running_mean||_2 (norms, not squared).

        Args:
            ema: blend the batch statistics with those of earlier batches first (FastDFKD, NAYER).

        Source: DeepInversion (Yin et al. 2020), NVlabs/DeepInversion@2413af1 `DeepInversionFeatureHook`.
        """
        batch = ema.blend(self.batch) if ema else self.batch
        return [bn_statistics_loss(*pair, *running) for pair, running in zip(batch, self.running, strict=True)]

    def loss(self, *, first_multiplier: float = 1.0, ema: StatisticsEMA | None = None) -> Tensor:
        """Sum of `per_layer` (scalar), the first layer times `first_multiplier` (10 in ImageNet DeepInversion)."""
        first, *rest = self.per_layer(ema)
        return torch.stack([first_multiplier * first, *rest]).sum()


class StatisticsEMA:
    """Memory of BN statistics over batches: m <- (1 - b) m_batch + b m_ema, the memory itself without gradient.

    The memory is empty (no blending) until the first `update`, which copies; later ones blend. Source: zju-vipa/
    Fast-Datafree@0dcecbc and tmtuan1307/NAYER@c6bedcd `DeepInversionHook` (`bn_mmt`).
    """

    def __init__(self, momentum: float = 0.9):
        self.momentum = momentum
        self.memory: list[tuple[Tensor, Tensor]] | None = None

    def blend(self, batch: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The batch's (mean, var) pairs pulled towards the memory; gradient flows through the batch part."""
        if self.memory is None:
            return list(batch)
        b = self.momentum
        return [
            ((1 - b) * mean + b * old_mean, (1 - b) * var + b * old_var)
            for (mean, var), (old_mean, old_var) in zip(batch, self.memory, strict=True)
        ]

    def update(self, batch: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take the statistics of the last batch of a call into the memory."""
        self.memory = [(mean.detach(), var.detach()) for mean, var in self.blend(batch)]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The memory by layer, for a stored state; empty before the first update."""
        return {str(i): {"mean": mean, "var": var} for i, (mean, var) in enumerate(self.memory or [])}

    def load(self, state: dict[str, dict[str, Tensor]], device: torch.device) -> None:
        """Inverse of `state`."""
        layers = [state[str(i)] for i in range(len(state))]
        self.memory = [(layer["mean"].to(device), layer["var"].to(device)) for layer in layers] or None


def bn_statistics_loss(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """||var - running_var||_2 + ||mean - running_mean||_2 of one layer; all (C,), returns a scalar."""
    return torch.linalg.vector_norm(var - running_var) + torch.linalg.vector_norm(mean - running_mean)


@contextlib.contextmanager
def running_statistics_kept(network: nn.Module) -> Iterator[None]:
    """BatchNorm normalises with the batch's statistics, as in training, but does not record them."""
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
