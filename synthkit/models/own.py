"""Networks of the user: `py:FILE.py:NAME` or `py:package.module:NAME` on the command line, nn.Modules in Python.

`py:` runs the user's code, so it is followed only where the user typed it (`trust_words`, or the environment variable
SYNTHKIT_TRUST): a card or a bank that names code is refused.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import inspect
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from synthkit.errors import ModelError

CODE, OBJECT = "py:", "object:"
PREFIXES = (CODE, OBJECT)
ENVIRONMENT = "SYNTHKIT_TRUST"

_trusted: set[str] = set()
_objects: dict[str, Any] = {}


def trust_words(words: Iterable[str]) -> None:
    """Let the `py:` specs among the words of a command line be followed."""
    for word in words:
        for part in word.rpartition("=")[2].split(","):
            if part.strip().startswith(CODE):
                _trusted.add(part.strip().partition("@")[0])


def hold(module: Any) -> str:
    """The spec of an nn.Module (or a `ModelView`) of this process; the same weights give the same spec."""
    network = getattr(module, "module", module)
    digest = hashlib.sha256(repr(network).encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(_bytes()).numpy().tobytes())
    spec = f"{OBJECT}{type(network).__name__}-{digest.hexdigest()[:12]}"
    _objects[spec] = module
    return spec


def held(spec: str) -> Any:
    """The nn.Module or `ModelView` behind a spec of `hold`.

    Raises:
        ModelError: it was an object of another process.
    """
    if spec not in _objects:
        raise ModelError(
            f"model: {spec} was a Python object of another process",
            hint="build it yourself and load the weights file beside the card, or pass the object again",
        )
    return _objects[spec]


def build(name: str, *, num_classes: int, in_channels: int, image_size: int) -> Any:
    """A fresh network of the user: `py:` calls NAME with those of the three sizes that it accepts, by name; `object:`
    copies the module.

    Raises:
        ModelError: code that was not typed by the user, cannot be found, fails, or gives no nn.Module.
    """
    from torch import nn

    if name.startswith(OBJECT):
        module = held(name)
        return copy.deepcopy(getattr(module, "module", module)).requires_grad_(True)
    maker = _maker(name)
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    parameters = inspect.signature(maker).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    try:
        module = maker(**{key: value for key, value in sizes.items() if every or key in parameters})
    except Exception as error:  # the user's code: whatever it raises is said with its name
        raise ModelError(f"model: {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"model: {name} gave no torch.nn.Module", got=type(module).__name__)
    return module


def _maker(name: str) -> Any:
    place, colon, attribute = name.removeprefix(CODE).rpartition(":")
    if not colon or not place or not attribute:
        raise ModelError("model: a network of your own is py:FILE.py:NAME or py:package.module:NAME", got=name)
    if name not in _trusted | {part.strip() for part in os.environ.get(ENVIRONMENT, "").split(",")}:
        raise ModelError(
            f"model: a card or bank names Python code ({name}), which is run only where you type it yourself",
            hint=f"if you trust that code: {name}@WEIGHTS as the model, or {ENVIRONMENT}={name}",
        )
    try:
        if place.endswith(".py"):
            path = Path(place).expanduser()
            if not path.is_file():
                raise ModelError("model: no such Python file", got=place)
            spec = importlib.util.spec_from_file_location(f"synthkit_own_{path.stem}", path)
            assert spec is not None and spec.loader is not None  # a .py file has both
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except ModelError:
        raise
    except Exception as error:  # the user's code: whatever it raises is said with its name
        raise ModelError(f"model: {place} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, attribute, None)):
        known = [n for n in vars(module) if not n.startswith("_")]
        raise ModelError(f"model: {place} has no class or function of that name", got=attribute, allowed=known)
    return getattr(module, attribute)


def _bytes() -> Any:
    import torch

    return torch.uint8
