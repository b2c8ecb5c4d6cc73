"""Torch and numpy on first use, so that method files can be imported to read their configs without paying for them.

`from synthkit.lazy import torch, F, np` gives proxies that import the real module at the first attribute access.
Files below `synthesis/` and `distillation/losses/` use it; they therefore hold no `nn.Module` subclass at module
level (networks live in `models/`) and no torch decorator. Type checkers see the real modules.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
else:

    class _Lazy:
        def __init__(self, name: str):
            self.__dict__["_name"] = name

        def __getattr__(self, attribute: str):
            return getattr(importlib.import_module(self._name), attribute)

    torch = _Lazy("torch")
    F = _Lazy("torch.nn.functional")
    np = _Lazy("numpy")

__all__ = ["F", "np", "torch"]
