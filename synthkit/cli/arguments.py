"""Small argument parsing for the commands that take no config: argparse with typed errors and suggestions. No torch."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from synthkit.config.fields import suggest
from synthkit.errors import UsageError


class Arguments(argparse.ArgumentParser):
    """An ArgumentParser whose errors are `UsageError`s with the nearest flag; no abbreviations."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise UsageError(message, hint=f"see {self.prog} --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all words; dashes and underscores are the same in flags.

        Raises:
            UsageError: unknown flag (with the nearest), wrong choice, missing argument.
        """
        flags = {flag for action in self._actions for flag in action.option_strings}
        words = [self._known_spelling(word, flags) for word in argv]
        known, unknown = self.parse_known_args(words)
        if unknown:
            name = unknown[0].partition("=")[0]
            close = suggest(name.lstrip("-"), [f.lstrip("-") for f in flags]) if name.startswith("-") else None
            hint = f"did you mean --{close}?" if close else f"see {self.prog} --help"
            kind = "unknown option" if name.startswith("-") else "unexpected argument"
            raise UsageError(f"{kind} {name}", hint=hint)
        return known

    @staticmethod
    def _known_spelling(word: str, flags: set[str]) -> str:
        if not re.match(r"--\w", word):
            return word
        name, equals, value = word.partition("=")
        for other in (name.replace("_", "-"), "--" + name[2:].replace("-", "_")):
            if other in flags:
                return other + equals + value
        return word


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=1, default=str))


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows as left-aligned columns, two blanks apart."""
    rows = [list(map(str, row)) for row in rows]
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
