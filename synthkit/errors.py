"""Typed errors of synthkit. Every message says: what, got, allowed or nearest, what to do.

The exit code of the command line hangs on the class: 1 the run failed, 2 wrong usage, 3 bank damaged.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, allowed: Iterable[str], n: int = 1) -> list[str]:
    """The `n` names of `allowed` that look most like `name` (possibly none)."""
    return difflib.get_close_matches(name.lower(), list(allowed), n=n, cutoff=0.5)


def _shown(value: object, limit: int = 300) -> str:
    """`repr` without flooding the terminal: what a file holds may be megabytes long."""
    if isinstance(value, str):
        return repr(value if len(value) <= limit else value[:limit] + "...")
    try:
        text = repr(value)
    except ValueError:  # an int of thousands of digits
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= limit else text[:limit] + "..."


class SynthkitError(Exception):
    """Base of all errors that synthkit raises on purpose (exit code 1)."""

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, allowed: Iterable[str] | None = None, hint: str | None = None):
        parts = [what]
        if got is not None:
            parts.append(f"got {_shown(got)}")
        if allowed is not None:
            names = list(allowed)
            close = nearest(str(got), names) if got is not None else []
            if close:
                parts.append(f"did you mean {close[0]!r}?")
            elif names:
                shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
                parts.append(f"allowed: {shown}")
        if hint:
            parts.append(hint)
        super().__init__("; ".join(parts))
        self.what, self.got, self.hint = what, got, hint


class UsageError(SynthkitError):
    """The user asked for something that cannot be done (exit code 2); nothing was written."""

    exit_code = 2


class ConfigError(UsageError):
    """A recipe or flag is unknown, malformed or out of range."""


class ModelError(UsageError):
    """A model spec, architecture name or card cannot be resolved."""


class WeightsError(ModelError):
    """A weights file is unsafe, unreadable or does not fit the architecture."""


class DataError(UsageError):
    """A data spec cannot be resolved or does not fit the model."""


class RequirementError(UsageError):
    """A method needs something that the task does not have (BatchNorm, labels, real data, ...)."""


class OutputExistsError(UsageError):
    """The output directory already holds something; synthkit never overwrites."""


class RunError(SynthkitError):
    """The run itself failed (exit code 1); what was committed before stays valid."""


class NonFiniteError(RunError):
    """A loss, logit or weight became NaN or infinite during training."""


class StorageError(RunError):
    """Writing failed (disk full, no permission); no partial file is left behind as if it were whole."""


class BankError(SynthkitError):
    """A bank is damaged, incomplete or unsafe to read (exit code 3)."""

    exit_code = 3
