"""Resumable training state: safetensors and JSON, never pickle; the JSON is the commit record."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from synthkit.errors import RunError
from synthkit.runtime import atomic_write, storage_errors, write_json

_NAME = re.compile(r"\d{8,}\.(safetensors|json)(\.tmp-.*)?")


class StateStore:
    """States below one folder, one pair of files each: `00000123.safetensors` and `00000123.json`.

    A pair counts once its JSON is there; the newest two are kept.
    """

    def __init__(self, path: Path):
        self.path = path

    def steps(self) -> list[int]:
        """Steps with a whole state, in order."""
        if not self.path.is_dir():
            return []
        names = (file.stem for file in self.path.glob("*.json"))
        return sorted(int(n) for n in names if n.isdigit() and (self.path / f"{n}.safetensors").is_file())

    def newest(self) -> int | None:
        """The last step with a whole state."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, step: int, network: nn.Module, optimizer: torch.optim.Optimizer, meta: dict[str, Any]) -> None:
        """Write network, optimiser and `meta` as the state of `step`.

        Raises:
            StorageError: the disk is full or not writable; older states stay.
        """
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
        found = optimizer.state_dict()
        plain: dict[str, Any] = {}
        for index, entries in found["state"].items():
            for key, value in entries.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value.detach().cpu().contiguous()
                elif value is not None:
                    plain[f"{index}.{key}"] = value
        name = f"{step:08d}"
        atomic_write(self.path / f"{name}.safetensors", save(tensors))
        record = {**meta, "step": step, "groups": found["param_groups"], "plain": plain}
        write_json(self.path / f"{name}.json", record)
        for old in self.steps()[:-2]:
            self._remove(old)

    def load(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Load the newest state into network and optimiser; returns its meta, or None where there is none.

        Raises:
            RunError: the state does not fit the network (the run was started with another configuration).
        """
        step = self.newest()
        if step is None:
            return None
        file = self.path / f"{step:08d}.safetensors"
        tensors = load_file(str(file))
        record = json.loads((self.path / f"{step:08d}.json").read_text(encoding="utf-8"))
        model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        if set(model) != set(network.state_dict()):
            raise RunError(f"the state {file} belongs to another network", hint="resume with the same configuration")
        network.load_state_dict(model)
        state: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        for key, value in record["plain"].items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in record["groups"]]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        _match_layout(optimizer)
        return record

    def clear(self) -> None:
        """Remove the states (the run is finished; its result stands beside them) and what killed runs left of them."""
        if not self.path.is_dir():
            return
        for step in self.steps():
            self._remove(step)
        for file in self.path.iterdir():
            if _NAME.fullmatch(file.name):
                file.unlink()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def _remove(self, step: int) -> None:
        (self.path / f"{step:08d}.json").unlink(missing_ok=True)  # first: without it the state does not exist
        (self.path / f"{step:08d}.safetensors").unlink(missing_ok=True)


def _match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Lay the optimiser's buffers out as their parameters: fused kernels walk both in memory order."""
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
