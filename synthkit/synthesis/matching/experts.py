"""Expert trajectories: networks trained on real data, the weights of every epoch kept on disk.

A buffer is a folder: `buffer.json` says what the experts were trained on and how, `expert_00007.h5` holds one float32
dataset `theta` (epochs + 1, P) without chunks, so that a checkpoint is read through a memory map, and
`expert_00007.json`, written last, says that it is whole. Experts are a pure function of what `buffer.json` says and of
their number; how many there are, and for how many epochs, is not part of it, so buffers grow.

Source: MTT's buffer.py (GeorgeCazenavette/mtt-distillation@50dccea). Differs from source: snapshots are copies (there,
on a CPU, `detach().cpu()` aliases the live weights and every epoch ends up equal); one file per expert; only epochs
that will be read are trained. They are trained one after the other: stacked with torch.func they were slower on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.bank.disk.storage import canonical_hash, read_json, staged, storage_errors
from synthkit.errors import BankError, DataError, NonFiniteError
from synthkit.lazy import F, torch
from synthkit.paths import store_dir
from synthkit.runtime import write_json
from synthkit.synthesis.matching.flat import flattened

if TYPE_CHECKING:
    from torch import Tensor, nn

    from synthkit.synthesis.matching.pool import RealPool


class ExpertBuffer:
    """The buffer in `folder`, made there if there is none.

    Args:
        folder: none is a folder of this identity in the user's store.
        identity: JSON data that decides the experts: data, network, schedule, seed.

    Raises:
        DataError: the folder holds experts of something else, or its record is damaged.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any]):
        self.identity, self.sha256 = identity, canonical_hash(identity)
        self.folder = folder = folder or store_dir() / "experts" / self.sha256[:16]
        self._maps: dict[int, np.ndarray] = {}
        record = folder / "buffer.json"
        if not record.exists():
            return
        found = _read(record).get("identity")
        if found != identity:
            old: dict[str, Any] = found if isinstance(found, dict) else {}
            other = [name for name in sorted({*old, *identity}) if old.get(name) != identity.get(name)]
            raise DataError(
                f"experts: {folder} holds trajectories of another task; these differ: {', '.join(other)}",
                got={name: old.get(name) for name in other},
                hint="name another folder (--method.experts DIR), or leave it out",
            )

    def path(self, index: int) -> Path:
        """File of expert `index`."""
        return self.folder / f"expert_{index:05d}.h5"

    def epochs(self, index: int) -> int:
        """Epochs for which expert `index` was trained; 0 where it is not there."""
        record = self.path(index).with_suffix(".json")
        return int(_read(record).get("epochs", 0)) if record.exists() else 0

    def write(self, index: int, theta: np.ndarray, facts: dict[str, Any]) -> None:
        """Commit expert `index`: theta float32 (epochs + 1, P); replaces a shorter one."""
        import h5py

        path = self.path(index)
        if not (self.folder / "buffer.json").exists():
            write_json(self.folder / "buffer.json", {"identity": self.identity})
        with storage_errors("experts", path):
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        with staged(path, folder=False) as temporary, h5py.File(temporary, "w") as file:
            file.create_dataset("theta", data=theta)  # contiguous: no chunks, no filter
        size = path.stat().st_size
        write_json(
            path.with_suffix(".json"),
            {"epochs": len(theta) - 1, "parameters": theta.shape[1], "bytes": size, "buffer": self.sha256, **facts},
        )
        self._maps.pop(index, None)

    def theta(self, index: int, epoch: int, device: torch.device) -> Tensor:
        """Weights (P,) of expert `index` after `epoch` epochs, a copy on `device`."""
        if index not in self._maps:
            self._maps[index] = self._map(index)
        return torch.from_numpy(np.array(self._maps[index][epoch])).to(device)

    def _map(self, index: int) -> np.ndarray:
        import h5py

        path = self.path(index)
        record = _read(path.with_suffix(".json"))
        shape = (int(record.get("epochs", 0)) + 1, int(record.get("parameters", 0)))
        damaged = DataError(f"experts: {path} is damaged", hint="remove it and its .json; it is trained anew")
        if record.get("buffer") != self.sha256 or not path.is_file() or path.stat().st_size != record.get("bytes"):
            raise damaged
        try:
            with h5py.File(path, "r") as file:
                data = file["theta"]
                offset = data.id.get_offset() if isinstance(data, h5py.Dataset) and data.chunks is None else None
                same = offset is not None and (data.shape, data.dtype) == (shape, np.dtype("<f4"))  # type: ignore[union-attr]
        except (OSError, KeyError) as error:
            raise damaged from error
        if not same:
            raise damaged
        return np.memmap(path, "<f4", "r", offset=offset, shape=shape)  # type: ignore[arg-type]  # checked above


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except BankError as error:
        hint = "remove the folder; its experts are trained anew"
        raise DataError(f"experts: {path} is damaged: {error.what}", hint=hint) from error


def train_expert(
    network: nn.Module,
    real: RealPool,
    rows: Tensor,
    *,
    epochs: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    batch_size: int,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    draws: Callable[[int], torch.Generator],
) -> tuple[np.ndarray, dict[str, Any]]:
    """Train `network` (which is used up) with SGD on the images `rows` of `real`.

    Args:
        augment: (images, generator) -> images.
        draws: epoch -> the generator of its order and augmentation.

    Returns:
        theta float32 (epochs + 1, P), row e after e epochs; {"loss": of each epoch, "seconds"}.

    Raises:
        NonFiniteError: training diverged.
    """
    begun = time.perf_counter()
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    first = flattened(network)
    theta = np.empty((epochs + 1, len(first)), np.float32)
    theta[0], losses = first.cpu().numpy(), []
    network.train()
    for epoch in range(epochs):
        generator = draws(epoch)
        total = torch.zeros((), device=first.device)
        for chosen in rows[torch.randperm(len(rows), generator=generator)].split(batch_size):
            images = augment(real.take(chosen), generator)
            loss = F.cross_entropy(network(images), real.labels[chosen.to(first.device)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(chosen)
        losses.append(float(total) / len(rows))
        theta[epoch + 1] = flattened(network).cpu().numpy()
        if not np.isfinite(losses[-1]):
            raise NonFiniteError(f"an expert diverged in epoch {epoch}", hint="lower --method.expert_lr")
    return theta, {"loss": losses, "seconds": time.perf_counter() - begun}
