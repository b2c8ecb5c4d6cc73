"""Several processes as one: batches gathered, gradients averaged and BatchNorm shared over the ranks of a run.

Rank r of w holds rows r::w of the global batch, and its objective is the mean over its own rows (or, for a relational
loss, the same value of the gathered batch on every rank). Averaged over the ranks, the gradients are then those of one
process with the whole batch, in both cases. Works with gloo and nccl; in a single process nothing is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from synthkit.errors import ModelError, RunError

BUCKET = 1 << 24  # elements of one all-reduce: few messages for small networks, bounded extra memory for large ones
_LOST = ("gloo", "nccl", "connection", "timed out", "timeout", "socket")


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def talking(what: str) -> Iterator[None]:
    """Turn the backend's error about a process that is gone into a typed one; `what` was being done.

    Raises:
        RunError: another process ended or did not answer within the backend's timeout.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(word in text.lower() for word in _LOST):
            raise
        if dist.is_initialized():
            dist.destroy_process_group()  # of no use any more; its threads would abort the interpreter at exit
        raise RunError(
            f"another process of this run is gone or does not answer ({what})",
            got=text.splitlines()[0] if text else type(error).__name__,
            hint="see the messages of the other processes; start them all again with --resume",
        ) from error


# --- batches ----------------------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """All rows of all ranks in global order; backward: this rank's rows of the summed gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: int) -> Tensor:
        ctx.world = world
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world)]
        with talking("gathering a batch"):
            dist.all_gather(parts, rows.detach().contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # every rank computed the same value: the sum is `world` times its gradient, which the mean over ranks undoes
        return _Sum.apply(grads[0])[dist.get_rank() :: ctx.world], None  # type: ignore[index]  # apply gives a tensor


def gather_batch(rows: Tensor) -> Tensor:
    """The global batch in its order from every rank's strided slice of it, with autograd.

    Shapes: (B / w, ...) on every rank, the same on each, to (B, ...) on all. Integer tensors (labels) work too.
    The gradient of a value that every rank computes from the result arrives at its own rows `w` times; averaged over
    the ranks (`average_gradients`) that is the gradient of the whole batch.
    """
    world = world_size()
    if world == 1:
        return rows
    return _Gather.apply(rows, world)  # type: ignore[return-value]  # apply gives a tensor


class _Sum(torch.autograd.Function):
    """Sum over the ranks; its gradient is the sum of the ranks' gradients, so it may be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        # always a copy: the gradient of an expanded tensor shares one element, and the caller keeps its own
        total = value.detach().clone(memory_format=torch.contiguous_format)
        with talking("summing over the processes"):
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Sum.apply(grads[0])  # type: ignore[return-value]  # apply gives a tensor


# --- gradients --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the ranks, in buckets of one message each.

    A gradient that is missing on this rank only counts as zero; one that is missing on all ranks stays missing, so that
    the optimiser leaves its parameter alone as in a single process (no decay, no momentum). The ranks must hold the
    same parameters in the same order.
    """
    world = world_size()
    if world == 1:
        return
    for bucket in _buckets(parameters):
        present = [float(p.grad is not None) for p in bucket]
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        # the flags travel with the gradients: one message, and only a rank that lacks some has to read them
        flags = torch.tensor(present, dtype=bucket[0].dtype, device=bucket[0].device)
        flat = torch.cat([piece.reshape(-1) for piece in pieces] + [flags])
        with talking("averaging gradients"):
            dist.all_reduce(flat)
        sums = flat[: -len(bucket)].div_(world).split([p.numel() for p in bucket])
        anywhere = present if all(present) else flat[-len(bucket) :].tolist()
        for parameter, piece, total, found in zip(bucket, pieces, sums, anywhere, strict=True):
            if found:
                parameter.grad = piece.copy_(total.view(piece.shape))


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Trainable parameters, in order, in groups of one dtype and about `BUCKET` elements."""
    groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        kind = parameter.dtype, parameter.device
        groups.setdefault(kind, []).append(parameter)
        sizes[kind] = sizes.get(kind, 0) + parameter.numel()
        if sizes[kind] >= BUCKET:
            yield groups.pop(kind)
            sizes[kind] = 0
    yield from groups.values()


# --- BatchNorm --------------------------------------------------------------------------------------------------------


class _RankBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the rows of all ranks, on any device; state dict and eval mode are torch's.

    Written with differentiable sums, in two passes (mean, then squared distances) since a sum of squares loses the
    digits of a small variance. Cost: two messages of C numbers forward and two backward per layer.
    """

    def forward(self, input: Tensor) -> Tensor:
        if world_size() == 1 or not (self.training or self.running_mean is None):
            return super().forward(input)
        self._check_input_dim(input)
        x = input if input.dtype == torch.float64 else input.float()
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        count = x.numel() // x.shape[1] * world_size()  # the ranks hold equal slices
        mean = _total(x.sum(dims)) / count
        centred = x - mean.view(shape)
        variance = _total(centred.square().sum(dims)) / count
        self._track(mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is None:
            return (centred * scale.view(shape)).to(input.dtype)
        return torch.addcmul(self.bias.view(shape), centred, (scale * self.weight).view(shape)).to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or not (self.training and self.track_running_stats):
            return
        factor: Any = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if factor is None:  # torch's meaning of None: the plain mean over all batches
                factor = 1.0 / self.num_batches_tracked.to(mean.dtype)
        with torch.no_grad():
            self.running_mean.lerp_(mean, factor)
            self.running_var.lerp_(variance * (count / (count - 1)), factor)


class RankBatchNorm1d(_RankBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` over all ranks."""


class RankBatchNorm2d(_RankBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` over all ranks."""


class RankBatchNorm3d(_RankBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` over all ranks."""


_KINDS = {nn.BatchNorm1d: RankBatchNorm1d, nn.BatchNorm2d: RankBatchNorm2d, nn.BatchNorm3d: RankBatchNorm3d}


def _total(value: Tensor) -> Tensor:
    return _Sum.apply(value)  # type: ignore[return-value]  # apply gives a tensor


def synchronise_batchnorm(module: nn.Module) -> nn.Module:
    """Let every BatchNorm layer of `module` normalise by the whole global batch; returns `module`.

    The layers stay the same objects (only their class changes), so optimisers, hooks and other references to them and
    to their tensors remain valid. `torch.nn.SyncBatchNorm` on CUDA, the classes above elsewhere; nothing is done in a
    single process.

    Raises:
        ModelError: a BatchNorm layer of a foreign class, whose forward pass is not known.
    """
    if world_size() == 1:
        return module
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or isinstance(layer, _RankBatchNorm):
            continue
        if isinstance(layer, nn.SyncBatchNorm):
            continue
        if type(layer) not in _KINDS:
            raise ModelError(
                f"layer {name}: several processes need a BatchNorm of torch", got=type(layer).__qualname__,
                hint="run one process",
            )  # fmt: skip
        if next((t.is_cuda for t in [*layer.parameters(), *layer.buffers()]), False):
            layer.__class__ = nn.SyncBatchNorm
            layer.process_group = None  # type: ignore[assignment]  # what the class's own constructor sets
        else:
            layer.__class__ = _KINDS[type(layer)]
    return module
