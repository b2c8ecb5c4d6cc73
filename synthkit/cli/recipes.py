"""`synthkit recipes list|show|copy|check`: the shipped recipes. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synthkit.cli.arguments import Arguments, print_json, table
from synthkit.config import recipes
from synthkit.config.parse import load_recipe
from synthkit.errors import ConfigError, OutputExistsError, UsageError

ACTIONS = ("list", "show", "copy", "check")


def main(argv: Sequence[str]) -> int:
    """Run one action on recipes."""
    parser = Arguments(prog="synthkit recipes", description="Show, copy or check recipes.")
    parser.add_argument("action", nargs="?", default="list", metavar="ACTION", help=", ".join(ACTIONS))
    parser.add_argument("names", nargs="*", metavar="NAME", help="a shipped recipe or a file; copy: NAME [DESTINATION]")
    parser.add_argument("--json", action="store_true", help="machine-readable output of list and check")
    arguments = parser.parse(argv)
    if arguments.action not in ACTIONS:
        raise UsageError("recipes: no such action", got=arguments.action, allowed=ACTIONS)
    if arguments.action == "list":
        return _list(arguments.names, arguments.json)
    if arguments.action == "check":
        return _check(arguments.names or recipes.names(), arguments.json)
    if not arguments.names:
        raise UsageError(f"recipes {arguments.action}: a NAME is needed", hint="synthkit recipes list")
    return _show(arguments.names) if arguments.action == "show" else _copy(arguments.names)


def _list(names: list[str], as_json: bool) -> int:
    entries = {n: (recipes.header(recipes.find(n)) or [""])[0] for n in recipes.names()}
    entries = {n: text for n, text in entries.items() if all(part in n for part in names)}
    if as_json:
        print_json(entries)
    else:
        print(table(entries.items()))
    return 0


def _show(names: list[str]) -> int:
    for name in names:
        print(recipes.find(name).read_text(encoding="utf-8"), end="")
    return 0


def _copy(names: list[str]) -> int:
    if len(names) > 2:
        raise UsageError("recipes copy: takes NAME [DESTINATION]", got=" ".join(names))
    source = recipes.find(names[0])
    target = Path(names[1]) if len(names) == 2 else Path(source.name)
    target = target / source.name if target.is_dir() else target
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise OutputExistsError(f"{target} exists already", hint="name another destination") from error
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from error
    print(f"{target}; run it with --config {target}")
    return 0


def _check(names: list[str], as_json: bool) -> int:
    results = {name: _problem(name) for name in names}
    bad = [name for name, problem in results.items() if problem]
    if as_json:
        print_json({name: problem or "ok" for name, problem in results.items()})
    else:
        print("\n".join(f"{name}: {problem or 'ok'}" for name, problem in results.items()))
    return ConfigError.exit_code if bad else 0


def _problem(name: str) -> str | None:
    try:
        check_names(load_recipe(name))
    except UsageError as error:
        return str(error)
    return None


def check_names(config: Any) -> None:
    """Look up every name in a config that the parse leaves to the run: the architectures.

    Raises:
        ModelError: a name is in no table; the nearest one is offered.
    """
    from synthkit.models.names import resolve_name

    method = getattr(config, "method", None)
    specs = [getattr(config, field, None) for field in ("teacher", "student", "arch")] + [
        getattr(method, "student", None)
    ]
    for spec in specs:
        name = (spec or "auto").partition("@")[0]
        if name == "unet":  # of `teach`: a diffusion model, no classifier
            continue
        if name != "auto" and "/" not in name and not name.endswith((".yaml", ".yml", ".json")) and ":" not in name:
            resolve_name(name)
