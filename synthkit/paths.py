"""Where the embedded recipes and assets lie: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _embedded(name: str) -> Path:
    inside = _PACKAGE / f"_{name}"
    return inside if inside.is_dir() else _PACKAGE.parent / name


def recipes_dir() -> Path:
    """Folder of the shipped YAML recipes."""
    return _embedded("recipes")


def assets_dir() -> Path:
    """Folder of the embedded teacher, evaluation bank and measured results."""
    return _embedded("assets")


def store_dir() -> Path:
    """The user's local store of teachers (`$SYNTHKIT_HOME`, else `~/.cache/synthkit`)."""
    return Path(os.environ.get("SYNTHKIT_HOME", Path.home() / ".cache" / "synthkit"))
