"""A config dataclass flattened to dotted names: the basis of flags, key checks and suggestions. No torch."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

from synthkit.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """One leaf of a config."""

    name: str
    """Dotted name, e.g. `method.lr_g`."""
    type: Any
    """Its annotation."""
    default: Any = MISSING
    """Its default; MISSING where a value must be given."""

    @property
    def required(self) -> bool:
        """Whether a value must be given."""
        return self.default is MISSING

    @property
    def optional(self) -> bool:
        """Whether null is a value."""
        return type(None) in _members(self.type)

    @property
    def boolean(self) -> bool:
        """Whether it is true or false, so that the bare flag means true."""
        return bool in _members(self.type)

    @property
    def sequence(self) -> bool:
        """Whether it holds several values."""
        return any((get_origin(m) or m) in (tuple, list) for m in _members(self.type))

    @property
    def choices(self) -> list[str]:
        """The allowed words of a Literal, else nothing."""
        return [str(a) for m in _members(self.type) if get_origin(m) is Literal for a in get_args(m)]

    @property
    def expected(self) -> str:
        """The type in words, for messages."""
        names = []
        for member in _members(self.type):
            if get_origin(member) is Literal:
                names.append("one of " + ", ".join(str(a) for a in get_args(member)))
            elif member is type(None):
                names.append("none")
            else:
                words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
                names.append(words.get(member, str(member).replace("typing.", "")))
        return " or ".join(names)


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def options_of(config: type, prefix: str = "", skip: Iterable[str] = ()) -> dict[str, Option]:
    """Every leaf of a config dataclass by dotted name; nested dataclasses are opened."""
    hints = typing.get_type_hints(config)
    found: dict[str, Option] = {}
    for entry in fields(config):
        if entry.name in skip or not entry.init:
            continue
        name, annotation = prefix + entry.name, hints[entry.name]
        if is_dataclass(annotation):
            found.update(options_of(typing.cast(type, annotation), name + "."))
        else:
            made = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            found[name] = Option(name, annotation, made)
    return found


def describe(config: type) -> dict[str, str]:
    """Field name -> the docstring below it, base classes included; read from the source, nothing is executed."""
    found: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        if not is_dataclass(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field_node, text_node in zip(statements, statements[1:], strict=False):
            if not (isinstance(field_node, ast.AnnAssign) and isinstance(field_node.target, ast.Name)):
                continue
            if isinstance(text_node, ast.Expr) and isinstance(text_node.value, ast.Constant):
                found[field_node.target.id] = " ".join(str(text_node.value.value).split())
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names; an empty mapping says nothing and vanishes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, name + "."))
        else:
            flat[name] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        target = nested
        for part in path:
            target = target.setdefault(part, {})
        target[last] = value
    return nested


def suggest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed dotted name meant most likely: same last part first, then the nearest spelling."""
    names = list(allowed)
    last = name.split(".")[-1].lower()
    for other in names:
        if other.split(".")[-1].lower() == last:
            return other
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    if close:
        return close[0]
    by_last = {other.split(".")[-1].lower(): other for other in reversed(names)}
    close = difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6)
    return by_last[close[0]] if close else None


def unknown(where: str, shown: str, name: str, allowed: Iterable[str], dashes: str, help_command: str) -> ConfigError:
    """The error for a name that no option has, with the nearest one."""
    close = suggest(name, allowed)
    hint = f"did you mean {dashes}{close}?" if close else f"see {help_command}"
    return ConfigError(f"{where}: unknown option {shown}", hint=hint)
