"""synthkit: a trained classifier (or a real dataset) into a bank of synthetic images, a bank into a trained student.

The names below load their parts at first use; `import synthkit` itself imports neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from synthkit.api import distill, evaluate, relabel, synthesize, teach
    from synthkit.bank import Bank
    from synthkit.bank.export import export
    from synthkit.bank.imports import import_bank
    from synthkit.config.parse import load_recipe

_WHERE = {
    "synthesize": "synthkit.api",
    "distill": "synthkit.api",
    "relabel": "synthkit.api",
    "teach": "synthkit.api",
    "evaluate": "synthkit.api",
    "export": "synthkit.bank.export",
    "import_bank": "synthkit.bank.imports",
    "load_recipe": "synthkit.config.parse",
    "Bank": "synthkit.bank",
}

__all__ = ["Bank", "__version__", "distill", "evaluate", "export", "import_bank", "load_recipe", "relabel",
           "synthesize", "teach"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'synthkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    # A function and a sub-package may share a name; what the public name means must not depend on import order.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
