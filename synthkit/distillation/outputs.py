"""Run directories of distill and teach: made, resumed and compared; the card of the trained network."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit.errors import ConfigError, OutputExistsError
from synthkit.runtime import RunDir, Runtime, hardware, peak_memory, versions

if TYPE_CHECKING:
    from torch import nn

_FREE = {"out", "resume", "runtime"}  # may differ between a run and its resumption


def is_first_process() -> bool:
    """Whether this is the process that prints (rank 0 of torchrun, or the only one)."""
    return os.environ.get("RANK", "0") == "0"


def plain_config(cfg: Any) -> dict[str, Any]:
    """A config dataclass as plain values (nested configs too), as run.json stores it."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def identity(cfg: Any) -> dict[str, Any]:
    """What makes a run the same run: its config without `out`, `resume` and `runtime`."""
    return {k: v for k, v in plain_config(cfg).items() if k not in _FREE}


def short_hash(cfg: Any) -> str:
    """Six hexadecimal digits of the identity, for default directory names."""
    text = json.dumps(identity(cfg), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def check_out(path: Path, cfg: Any, *, resume: bool) -> dict[str, Any] | None:
    """Look before any work: may this run write to `path`? Writes nothing.

    Returns:
        run.json of the run to go on with, or None for a new run.

    Raises:
        OutputExistsError: something lies there and `resume` was not asked for, or it is no run of this kind.
        ConfigError: resuming with another configuration; says which values differ.
    """
    if path.exists() and not path.is_dir():
        raise OutputExistsError("out: a file lies there", got=str(path), hint="choose another --out")
    if not path.is_dir() or not any(path.iterdir()):
        return None
    if not resume:
        raise OutputExistsError(
            "out: the directory is not empty and synthkit never overwrites",
            got=str(path),
            hint="choose another --out, or add --resume to go on with this run",
        )
    found = RunDir(path).read_json("run.json")
    if found is None or "identity" not in found:
        raise OutputExistsError(
            "out: holds files but no run.json to resume", got=str(path), hint="choose another --out"
        )
    now = json.loads(json.dumps(identity(cfg), default=str))
    before = found["identity"]
    changed = sorted(k for k in now.keys() | before.keys() if now.get(k) != before.get(k))
    if changed:
        pairs = ", ".join(f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in changed)
        raise ConfigError(
            f"resume: {path} was started with another configuration ({pairs})",
            hint="give the same values again, or choose another --out",
        )
    return found


def start_run(path: Path, cfg: Any, runtime: Runtime, **facts: Any) -> RunDir:
    """Make the directory and write run.json (first rank only); `facts` are added to it."""
    run = RunDir(path)
    runtime.accelerator.wait_for_everyone()  # all ranks have looked (`check_out`) before the first one writes
    if runtime.is_main:
        run.create()
        for left in path.glob("*.tmp-*"):  # of a killed run; this one now owns the directory
            left.unlink()
        if run.read_json("run.json") is None:
            record = {"config": plain_config(cfg), "identity": identity(cfg), "status": "running"}
            run.write_json("run.json", {**record, **facts, "versions": versions(), "hardware": hardware()})
    runtime.accelerator.wait_for_everyone()
    return run


def finish_run(run: RunDir, **facts: Any) -> None:
    """Add timings, peak memory and the status to run.json."""
    record = run.read_json("run.json") or {}
    run.write_json("run.json", {**record, **facts, "status": "done", "peak_memory": peak_memory()})


def save_network(run: RunDir, network: nn.Module, card: Any, file: str) -> Path:
    """Write the weights as `file` and then card.yaml (which makes the directory a model); returns the card's path."""
    from synthkit.models.weights import file_sha256, save_weights

    target = run.path / file
    save_weights(network, target)
    card.weights, card.sha256 = file, file_sha256(target)
    path = run.path / "card.yaml"
    card.save(path)
    return path
