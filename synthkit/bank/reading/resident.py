"""A bank as tensors on one device: read once, then every batch is an `index_select` there.

For a GPU the columns pass through two pinned buffers: while one is being copied, the other is being read from the disk;
main memory never holds the bank. torch is imported when it is needed only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.bank.errors import BankMemoryError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from synthkit.bank.reader import Bank

PIECE_BYTES = 32 << 20  # of one copy to the device
SHARE = 0.9  # of the free memory that may be used: allocators need some room
# torch indexes no unsigned types but uint8; the values of the first two always fit
_STORED_AS = {"<u2": "<i4", "<u4": "<i8", "<u8": "<i8"}


class ResidentBank:
    """Columns of a bank on a device. Make one with `Bank.resident`.

    Attributes:
        tensors: column -> tensor (N, ...); images uint8 (N,C,H,W), labels int32, logits float16 ...; unsigned integers
            as the signed ones of twice the width (origin_seed: the same 64 bits, signed).
    """

    def __init__(self, tensors: dict[str, Tensor], device: torch.device):
        self.tensors, self.device = tensors, device

    def __len__(self) -> int:
        return next((len(t) for t in self.tensors.values()), 0)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.nbytes for t in self.tensors.values())

    def batch(self, indices: Tensor | np.ndarray | Sequence[int]) -> dict[str, Tensor]:
        """The rows `indices` (any order) of every column, as fresh tensors on the device."""
        import torch

        at = torch.as_tensor(np.asarray(indices) if not isinstance(indices, torch.Tensor) else indices)
        at = at.to(self.device, torch.int64, non_blocking=True)
        return {name: tensor.index_select(0, at) for name, tensor in self.tensors.items()}


def free_memory(device: torch.device) -> int:
    """Free bytes on the device (for the CPU: of this process, limits of its control groups included)."""
    if device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch, not in use
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    from synthkit.bank.reading.memory import free_memory as free

    return free()


def needed_bytes(bank: Bank, columns: Sequence[str]) -> int:
    """Bytes of the columns on a device."""
    return sum(len(bank) * _row_bytes(bank, name) for name in columns)


def load(bank: Bank, device: torch.device | str, columns: Sequence[str] | None = None) -> ResidentBank:
    """Read columns of the bank to `device`; see `Bank.resident`."""
    import torch

    device = torch.device(device)
    names = [c for c in ("images", "labels") if bank.has(c)] if columns is None else list(columns)
    needed, free = needed_bytes(bank, names), free_memory(device)
    if needed > SHARE * free:
        raise BankMemoryError(
            f"{bank.path}: {' and '.join(names)} need {needed / 2**30:,.2f} GiB on {device}, "
            f"{free / 2**30:,.2f} GiB are free there (of which {SHARE:.0%} may be used)",
            hint="read it with bank.stream(...), name fewer columns, or free some memory",
        )
    return ResidentBank({name: _column(bank, name, device) for name in names}, device)


def _stored_as(dtype: np.dtype) -> np.dtype:
    return np.dtype(_STORED_AS.get(dtype.str, dtype.str))


def _row_bytes(bank: Bank, name: str) -> int:
    shape, dtype = bank.row(name)
    return math.prod(shape) * _stored_as(dtype).itemsize


def _column(bank: Bank, name: str, device: torch.device) -> Tensor:
    import torch

    shape, dtype = bank.row(name)
    stored = torch.from_numpy(np.empty(0, _stored_as(dtype))).dtype
    target = torch.empty((len(bank), *shape), dtype=stored, device=device)
    rows = max(1, PIECE_BYTES // max(1, _row_bytes(bank, name)))
    if device.type == "cuda":
        buffers: list[Tensor] = [
            torch.empty((min(rows, len(bank)), *shape), dtype=stored, pin_memory=True) for _ in range(2)
        ]
        _fill_through(bank, name, target, buffers, lambda: torch.cuda.current_stream(device).record_event())
    elif device.type == "cpu":
        for start in range(0, len(bank), rows):
            _read_into(bank, name, start, target[start : start + rows])
    else:
        _fill_through(bank, name, target, [torch.empty((min(rows, len(bank)), *shape), dtype=stored)], None)
    return target


def _fill_through(bank: Bank, name: str, target: Tensor, buffers: list[Tensor], mark: Any) -> None:
    """Copy a column to `target` by way of `buffers` in turn; `mark()` is an event that ends with the copies so far."""
    ends: list[Any] = [None] * len(buffers)
    rows = len(buffers[0])
    for turn, start in enumerate(range(0, len(target), rows)):
        which = turn % len(buffers)
        if ends[which] is not None:
            ends[which].synchronize()  # this buffer may still be on its way
        piece = target[start : start + rows]
        buffer = buffers[which][: len(piece)]
        _read_into(bank, name, start, buffer)
        piece.copy_(buffer, non_blocking=mark is not None)
        ends[which] = mark() if mark is not None else None
    for end in ends:
        if end is not None:
            end.synchronize()


def _read_into(bank: Bank, name: str, start: int, target: Tensor) -> None:
    """Rows `start`, `start` + 1, ... of a column into a tensor in main memory."""
    array, rows = target.numpy(), np.arange(start, start + len(target))
    if array.dtype == bank.row(name)[1]:
        bank.batch(rows, (name,), out={name: array})
    else:
        array[...] = getattr(bank.batch(rows, (name,)), name)
