"""What a piece of work makes autograd keep, and how much memory is free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class SavedBytes:
    """Counts what autograd keeps for backward while it is open: `bytes` at the peak of what is alive at once."""

    def __enter__(self):
        self.bytes = self._alive = 0
        self._held: dict[int, list[int]] = {}  # storage address -> [holders, bytes]
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._hooks.__exit__(*args)

    def _pack(self, tensor: Tensor) -> _Held:
        return _Held(tensor, self)

    def _take(self, tensor: Tensor) -> int:
        address = tensor.untyped_storage().data_ptr()
        entry = self._held.setdefault(address, [0, tensor.untyped_storage().nbytes()])
        if not entry[0]:
            self._alive += entry[1]
            self.bytes = max(self.bytes, self._alive)
        entry[0] += 1
        return address

    def _drop(self, address: int) -> None:
        entry = self._held[address]
        entry[0] -= 1
        if not entry[0]:
            self._alive -= entry[1]
            del self._held[address]


class _Held:
    """A tensor that a node of the graph keeps; it leaves the count when the graph is freed."""

    def __init__(self, tensor: Tensor, counter: SavedBytes):
        # detached, or an output that its own node keeps would keep that node; autograd ties it in again
        self.tensor, self._counter, self._address = tensor.detach(), counter, counter._take(tensor)

    def __del__(self) -> None:
        self._counter._drop(self._address)


def free_bytes(device: torch.device) -> int:
    """Free bytes of memory on `device` (on the CPU: what this process may still take)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    from synthkit.data.real import free_memory

    return free_memory()
