"""Tiny real data whose classes differ, so that there is something to match."""

from __future__ import annotations

from dataclasses import replace

import torch

from synthkit.data.real import RealData

from .test_contract_random_real import real_data


def patterned(per_class: int = 12, **shape: int) -> RealData:
    """`real_data` in which every image is mostly the pattern of its class."""
    data = real_data(per_class, **shape)
    draw = torch.Generator().manual_seed(7)
    patterns = torch.randint(0, 256, (data.num_classes, *data.shape), generator=draw)
    return replace(data, images=((3 * patterns[data.labels] + data.images) // 4).to(torch.uint8))
