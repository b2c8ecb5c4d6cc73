"""Reading and fitting weights without ever running code from a file."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shlex
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from synthkit.errors import StorageError, WeightsError

State = dict[str, Tensor]
TORCH_SUFFIXES = (".pt", ".pth", ".th", ".tar", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

# Keys under which training scripts put the state dict, in order of preference.
_NESTING = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "weights",
    "student",
    "teacher",
    "params",
    "module",
    "ema",
)
_WRAPPERS = ("module.", "_orig_mod.")
# Segments that different public code bases give to the same part.
_SYNONYMS = {"downsample": "shortcut", "fc": "linear", "classifier": "linear"}
_LFS = b"version https://git-lfs"
_TORCH_MAGIC = (b"PK\x03\x04", b"\x80")  # zip archive, or the pickle of torch before 1.6
_SHOWN = 8  # keys listed per kind of mismatch


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, buffers (BN statistics) not counted."""
    return sum(p.numel() for p in module.parameters())


def read_state_dict(path: str | Path) -> State:
    """The state dict in a .safetensors or torch file, on the CPU.

    Torch files are read with `weights_only=True`, always. Nested dicts (`state_dict`, `model`, `net`, ...) are opened.

    Raises:
        WeightsError: the file is missing, damaged, not a weights file, or a pickled object; says what to do.
    """
    path = Path(path)
    _refuse_obvious(path)
    if path.suffix.lower() == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, ValueError) as error:
            raise WeightsError(
                f"weights {path}: not a whole safetensors file ({error})", hint="fetch or export the file again"
            ) from None
    return _open_nesting(_read_torch(path), path)


def _refuse_obvious(path: Path) -> None:
    if not path.exists():
        raise WeightsError("weights: no such file", got=str(path))
    if not path.is_file():
        raise WeightsError("weights: not a file", got=str(path))
    if path.suffix.lower() not in SUFFIXES:
        raise WeightsError(
            f"weights {path}: unknown file type", got=path.suffix, hint=f"understood: {', '.join(SUFFIXES)}"
        )
    try:
        with path.open("rb") as f:
            head = f.read(64)
    except OSError as error:
        raise WeightsError(f"weights {path}: cannot be read ({error.strerror})") from None
    if not head:
        raise WeightsError(f"weights {path}: the file is empty", hint="fetch it again")
    if head.startswith(_LFS):
        raise WeightsError(f"weights {path}: a Git LFS pointer, not the weights", hint="run `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise WeightsError(f"weights {path}: a web page, not weights", hint="download the raw file")
    if path.suffix.lower() in TORCH_SUFFIXES and not head.startswith(_TORCH_MAGIC):
        raise WeightsError(f"weights {path}: damaged or not a torch file", hint="fetch the file again")


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if found := re.search(r"GLOBAL ([\w.]+)|Unsupported class ([\w.]+)|(Unsupported operand \d+)", text):
            raise WeightsError(
                f"weights {path}: holds pickled Python objects, not only tensors ({found[found.lastindex or 0]}); "
                "loading it could run any code, so synthkit does not",
                hint=f"if you trust the file, convert it once and use the new one:\n  {conversion_command(path)}",
            ) from None
        reason = _first_line(
            text.partition("WeightsUnpickler error:")[2] or text
        )  # before it torch advises to be unsafe
        raise WeightsError(
            f"weights {path}: damaged or not a torch file ({reason})", hint="fetch the file again"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, UnicodeDecodeError, OSError) as error:
        raise WeightsError(
            f"weights {path}: damaged or not a torch file ({_first_line(str(error)) or type(error).__name__})",
            hint="fetch the file again",
        ) from None


def conversion_command(path: Path) -> str:
    """Shell line that turns a pickled model or checkpoint into a plain weights file beside it."""
    target = path.with_name(path.stem + "-weights.pt")
    code = (
        f'import torch; o = torch.load({json.dumps(str(path))}, map_location="cpu", weights_only=False); '
        'o = next((o[k] for k in ("state_dict", "model", "net") if k in o), o) if isinstance(o, dict) else o; '
        f'torch.save(o.state_dict() if hasattr(o, "state_dict") else o, {json.dumps(str(target))})'
    )
    return f"python -c {shlex.quote(code)}"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else ""


def _open_nesting(found: Any, path: Path, depth: int = 0) -> State:
    if isinstance(found, dict):
        tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
        if tensors and len(tensors) == len(found):
            return tensors
        for key in _NESTING:
            if isinstance(found.get(key), dict) and depth < 4:
                return _open_nesting(found[key], path, depth + 1)
        if tensors and len(tensors) >= len(found) - 4:  # a state dict with an epoch or an accuracy beside it
            return tensors
    shown = (
        f"a dict with keys {', '.join(map(str, list(found)[:8]))}" if isinstance(found, dict) else type(found).__name__
    )
    raise WeightsError(
        f"weights {path}: no state dict inside; found {shown}",
        hint=f"save `model.state_dict()`, or put it under one of: {', '.join(_NESTING[:4])}",
    )


def save_weights(module: nn.Module, path: str | Path) -> str:
    """Write parameters and buffers as safetensors, whole or not at all; returns the file's sha256.

    Raises:
        StorageError: the file cannot be written.
    """
    path = Path(path)
    inner = getattr(module, "_orig_mod", module)  # torch.compile wraps
    state = {k: v.detach().to("cpu").contiguous().clone() for k, v in inner.state_dict().items()}
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if temporary.is_file():
            temporary.unlink()
        raise StorageError(f"cannot write the weights {path}: {error}") from None
    return file_sha256(path)


def align_keys(module: nn.Module, state: State) -> State:
    """`state` under the names of `module`: wrapper prefixes taken off, synonyms (fc/linear, ...) translated."""
    wanted = module.state_dict().keys()
    state = {_unwrap(k): v for k, v in state.items()}
    # The network may have been one attribute of a larger module: model.conv1.weight, net.backbone.conv1.weight.
    while len({k.partition(".")[0] for k in state}) == 1 and all("." in k for k in state) and not wanted & state.keys():
        state = {k.partition(".")[2]: v for k, v in state.items()}
    if wanted <= state.keys():
        return state
    canonical = {_canonical(k): k for k in wanted}
    if len(canonical) != len(wanted) or len({_canonical(k) for k in state}) != len(state):
        return state
    return {k if k in wanted else canonical.get(_canonical(k), k): v for k, v in state.items()}


def _unwrap(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.partition(".")[2]
    return key


def _canonical(key: str) -> str:
    return ".".join(_SYNONYMS.get(part, part) for part in key.split("."))


def mismatches(module: nn.Module, state: State) -> dict[str, list[str]]:
    """What stands between aligned `state` and `module`: lists `missing`, `unexpected` and `shape` (may be empty).

    The counters `num_batches_tracked` do not change an output and are never a mismatch.
    """
    own = {k: tuple(v.shape) for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: tuple(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}
    return {
        "missing": [k for k in own if k not in given],
        "unexpected": [k for k in given if k not in own],
        "shape": [
            f"{k}: the file has {given[k]}, the network {s}" for k, s in own.items() if k in given and given[k] != s
        ],
    }


def fit_state_dict(module: nn.Module, state: State, source: str, *, hint: str | None = None) -> None:
    """Load `state` into `module`, every tensor or none.

    Args:
        source: where the state came from, for the message.
        hint: what to do about a mismatch (for example the architecture that does fit).

    Raises:
        WeightsError: keys are missing, unexpected or of another shape (the first eight of each are listed), or a
            floating-point tensor holds NaN or infinity.
    """
    state = align_keys(module, state)
    problems = mismatches(module, state)
    if any(problems.values()):
        lines = [f"weights {source} do not fit the architecture"]
        for kind, keys in problems.items():
            lines += [f"  {kind:<10} {k}" for k in keys[:_SHOWN]]
            if len(keys) > _SHOWN:
                lines.append(f"  {kind:<10} ... and {len(keys) - _SHOWN} more")
        raise WeightsError("\n".join([*lines, f"  {hint}"] if hint else lines))
    bad = Counter(k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all()))
    if bad:
        raise WeightsError(f"weights {source}: NaN or infinity in {', '.join(list(bad)[:_SHOWN])}")
    own = module.state_dict()
    module.load_state_dict({k: state.get(k, v) for k, v in own.items()})
