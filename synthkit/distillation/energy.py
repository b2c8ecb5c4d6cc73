"""Mean square over the channels of a map, with a backward pass of one product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _MeanSquare(torch.autograd.Function):
    """Autograd's own chain of cast, square and mean keeps two copies of the map and passes over it four times more."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor) -> Tensor:
        ctx.save_for_backward(feature)
        return _wide(feature).square().mean(dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (feature,) = ctx.saved_tensors
        scale = (grads[0] * (2.0 / feature.shape[1])).unsqueeze(1)
        return (_wide(feature) * scale).to(feature.dtype)


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def mean_square(feature: Tensor) -> Tensor:
    """(B, ...) of (B, C, ...): the mean of the squares over C. Half precisions are summed, and given, in float32."""
    return _MeanSquare.apply(feature)  # type: ignore[no-any-return]  # untyped in torch's stubs
