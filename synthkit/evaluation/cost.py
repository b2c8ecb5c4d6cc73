"""What a network costs to use: parameters and operations for one image."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from synthkit.models.weights import count_parameters


class Cost(TypedDict):
    """Cost of one network."""

    params: int
    """Numbers in all parameters, frozen ones among them; no buffers."""
    flops: int
    """Floating-point operations for one image, a multiplication and an addition as two."""


def network_cost(module: nn.Module, input_size: Sequence[int]) -> Cost:
    """Parameters, and operations for one image of (C, H, W), of `module` in eval mode.

    Counted are convolutions, matrix products and attention, as `torch.utils.flop_counter` does; activations, norms and
    sums are not. Every pass counts: a network that samples 100 steps costs 100 passes of what it calls. The pass runs
    on shapes alone, without computing, and neither the network nor its mode is changed.

    >>> from torch import nn
    >>> network_cost(nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), (3, 2, 2))
    {'params': 130, 'flops': 240}
    """
    shapes = copy.deepcopy(module).eval().to("meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        shapes(torch.zeros(1, *input_size, device="meta"))
    return {"params": count_parameters(module), "flops": counter.get_total_flops()}
