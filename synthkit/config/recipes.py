"""The shipped recipes: names, files, headers. No torch."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from synthkit.config import safe_yaml
from synthkit.errors import ConfigError, nearest
from synthkit.paths import recipes_dir


def names() -> list[str]:
    """Names of the shipped recipes, e.g. `cifar10/cudfkd-r34-r18`, sorted; `recipes/teachers/` holds model cards."""
    return list(_names(recipes_dir()))


@functools.cache  # the shipped files do not change while the program runs
def _names(root: Path) -> tuple[str, ...]:
    files = (p.relative_to(root) for p in root.rglob("*.yaml"))
    return tuple(sorted(p.with_suffix("").as_posix() for p in files if p.parts[0] != "teachers"))


def find(recipe: str | os.PathLike[str]) -> Path:
    """The file of a recipe: a path, or the name of a shipped one (with or without `recipes/` and `.yaml`).

    Raises:
        ConfigError: neither; the nearest shipped name is offered.
    """
    text = os.fspath(recipe)
    if Path(text).is_file():
        return Path(text)
    name = text.removeprefix("./").removeprefix("recipes/").removesuffix(".yaml").removesuffix(".yml")
    shipped = names()
    if name in shipped:
        return recipes_dir() / f"{name}.yaml"
    close = nearest(name, shipped) or [n for n in shipped if name and name in n]
    hint = f"did you mean {close[0]!r}?" if close else "synthkit list recipes"
    raise ConfigError("recipe: no such file, and no shipped recipe of that name", got=text, hint=hint)


def load(recipe: str | os.PathLike[str]) -> dict[str, Any]:
    """The plain values of a recipe."""
    return safe_yaml.load(find(recipe))


def header(path: Path) -> list[str]:
    """The comment lines at the top of a recipe, without `#`."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return lines
