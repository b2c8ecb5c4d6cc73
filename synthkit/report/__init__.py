"""Pictures and pages: the class grid of a bank, and one HTML page on banks and runs. Neither imports torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthkit.report.grid import grid_html, grid_png
    from synthkit.report.page import report

_WHERE = {
    "report": "synthkit.report.page", "grid_png": "synthkit.report.grid", "grid_html": "synthkit.report.grid",
}  # fmt: skip

__all__ = ["grid_html", "grid_png", "report"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'synthkit.report' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
