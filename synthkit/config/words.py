"""Command-line words as named values, and Python or YAML values as the words a user would type. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from synthkit.config.fields import Option
from synthkit.errors import ConfigError


class Words:
    """Command-line words as (dotted name, value) pairs; dashes and underscores are the same in names."""

    def __init__(self, command: str, argv: Sequence[str]):
        self.pairs: list[tuple[str, list[str]]] = []
        self.help = self.print_config = self.json = False
        rest = list(argv)
        while rest:
            word = rest.pop(0)
            if word in ("-h", "--help"):
                self.help = True
            elif not word.startswith("--") or word == "--":
                hint = f"options begin with --; see synthkit {command} --help"
                raise ConfigError(f"{command}: unexpected word", got=word, hint=hint)
            else:
                name, equals, value = word[2:].partition("=")
                values = [value] if equals else []
                while not equals and rest and not rest[0].startswith("--") and rest[0] != "-h":
                    values.append(rest.pop(0))
                self._add(name.replace("-", "_"), values)

    def _add(self, name: str, values: list[str]) -> None:
        if name in ("print_config", "json"):
            if values:
                raise ConfigError(f"--{name} takes no value", got=" ".join(values))
            setattr(self, name, True)
        else:
            self.pairs.append((name, values))

    def take(self, name: str) -> list[str]:
        """Remove and return all values of `name`."""
        found = [v for n, values in self.pairs if n == name for v in values or [""]]
        self.pairs = [p for p in self.pairs if p[0] != name]
        if "" in found:
            raise ConfigError(f"--{name} needs a value")
        return found


def as_text(value: Any, option: Option) -> str:
    """A Python or YAML value as the word a user would type."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return none_word(value, option)
    if isinstance(value, (bool, list, tuple, dict)):
        return json.dumps(list(value) if isinstance(value, tuple) else value)
    return str(value)


def word_value(name: str, values: list[str], option: Option) -> str:
    """The words after a flag as one value; a bare boolean flag is true, several words make a list."""
    if not values:
        if option.boolean:
            return "true"
        raise ConfigError(f"--{name} needs a value: {option.expected}")
    if option.sequence:
        text = ",".join(values)
        return text if text.startswith("[") else f"[{text}]"
    if len(values) > 1:
        raise ConfigError(f"--{name} takes one value", got=" ".join(values))
    return none_word(values[0], option)


def none_word(value: str, option: Option) -> str:
    """`none` as the null that the parser knows, where the option can be empty and `none` is no choice of its own."""
    is_none = value.lower() in ("none", "null") and option.optional and value not in option.choices
    return "null" if is_none else value
