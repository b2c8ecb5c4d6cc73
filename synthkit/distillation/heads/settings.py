"""Settings of deployed networks come from a file, the card of a run: nothing is built from them unchecked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from synthkit.errors import ModelError

LARGEST = 1 << 16  # of any width, number of classes or the like


def check_settings(who: str, settings: dict[str, Any], numbers: Sequence[str], others: Sequence[str] = ()) -> None:
    """Raise `ModelError` unless `settings` hold whole numbers from 1 to `LARGEST`, and the others whatever they are."""
    if missing := [name for name in (*numbers, *others) if name not in settings]:
        raise ModelError(f"head {who}: settings are missing", got=missing)
    found = {name: settings[name] for name in numbers}
    if wrong := {k: v for k, v in found.items() if type(v) is not int or not 1 <= v <= LARGEST}:
        raise ModelError(f"head {who}: whole numbers from 1 to {LARGEST} are needed", got=wrong)
