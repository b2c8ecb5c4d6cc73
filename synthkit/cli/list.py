"""`synthkit list KIND`: what can be named on the command line. No torch."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import synthkit
from synthkit import tables
from synthkit.cli.arguments import Arguments, print_json, table
from synthkit.config import recipes


def _described(entries: dict[str, str]) -> dict[str, str]:
    """Name -> first line of the docstring of the module behind it."""
    lines = {name: _docstring(place.partition(":")[0]).strip().split("\n", 1)[0] for name, place in entries.items()}
    return {name: line.rstrip(".") for name, line in lines.items()}


def _docstring(module: str) -> str:
    """The docstring of a module, read from its file: importing all methods would take longer than all the rest."""
    package, *parts = module.split(".")
    file = Path(synthkit.__file__).parent.joinpath(*parts).with_suffix(".py")
    if package != "synthkit" or not file.is_file():
        return importlib.import_module(module).__doc__ or ""
    return ast.get_docstring(ast.parse(file.read_bytes())) or ""


_NEEDS = {
    "labels": "hard labels of every image (--labels argmax, or stored)",
    "features": "features of both networks, hence a live teacher",
    "student features": "features of the student alone; stored logits will do",
    "teacher": "a live teacher, not stored logits alone",
    "teachers": "several teachers (--teacher A,B)",
    "index": "a finished bank and no fresh images: it remembers every image",
    "batch": "the whole batch: it compares samples, over all processes and micro-batches",
    "beside": "another loss beside it, such as kd: it leaves the student's classifier as it began",
    "deploys": "modules of the loss stay with the student",
}
"""What `synthkit list losses` says in a word, and what that means."""


def _needs(place: str) -> str:
    """The needs of the loss at `module:Class` with its default options, as words of `_NEEDS`."""
    module, _, kind = place.partition(":")
    loss = getattr(importlib.import_module(module), kind)()
    needs = loss.requires
    there = {
        "labels": needs.labels,
        "features": bool(needs.teacher),
        "student features": bool(needs.student) and not needs.teacher,
        "teacher": not needs.teacher and (needs.live_teacher or needs.teacher_classifier),
        "teachers": needs.teachers > 1,
        "index": needs.index,
        "batch": needs.relational,
        "beside": not loss.stands_alone,
        "deploys": needs.deploys,
    }
    return ", ".join(word for word, needed in there.items() if needed)


def _losses_with_needs() -> str:
    """The table of losses with what each needs, and what the words mean."""
    places = tables.losses()
    rows = [(name, text, _needs(places[name])) for name, text in _described(places).items()]
    lines = [(name, f"{text} [{needs}]" if needs else text) for name, text, needs in rows]
    words = table([(f"  [{word}]", meaning) for word, meaning in _NEEDS.items()])
    return f'{table(lines)}\n\n{words}\n\nWeighted sums: --loss "ce+0.9*kd+dkd@ramp20" (synthkit distill --help).'


def _models() -> dict[str, str]:
    from synthkit.models.names import ALIASES, ARCHITECTURES

    aliases: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        aliases.setdefault(name, []).append(alias)
    return {
        name: description + (f" (also {', '.join(aliases[name])})" if name in aliases else "")
        for name, (_, description, _) in ARCHITECTURES.items()
    }


def _protocols() -> dict[str, str]:
    from synthkit.distillation.protocols import PROTOCOLS
    from synthkit.evaluation.dd_protocols import DD_PROTOCOLS

    distill = {name: f"distill: {protocol.description}" for name, protocol in PROTOCOLS.items()}
    return distill | {name: f"evaluate --bank: {protocol.description}" for name, protocol in DD_PROTOCOLS.items()}


def _presets() -> dict[str, str]:
    from synthkit.distillation.relabel_presets import PRESETS

    return {name: f"relabel: {preset.description}" for name, preset in PRESETS.items()}


def _augmentations() -> dict[str, str]:
    from synthkit.data.policies import POLICIES

    return dict(POLICIES)


def _formats() -> dict[str, str]:
    return _described(tables.formats())


def _recipes() -> dict[str, str]:
    return {name: (recipes.header(recipes.find(name)) or [""])[0] for name in recipes.names()}


KINDS: dict[str, Callable[[], dict[str, str]]] = {
    "methods": lambda: _described(tables.methods()),
    "losses": lambda: _described(tables.losses()),
    "models": _models,
    "datasets": lambda: dict(tables.DATASETS),
    "recipes": _recipes,
    "protocols": _protocols,
    "presets": _presets,
    "curricula": lambda: dict(tables.CURRICULA),
    "augmentations": _augmentations,
    "formats": _formats,
}


def main(argv: Sequence[str]) -> int:
    """Print one table, or the names of all tables."""
    parser = Arguments(prog="synthkit list", description="List what can be named on the command line.")
    parser.add_argument("kind", nargs="?", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--json", action="store_true", help="machine-readable: {name: description}")
    arguments = parser.parse(argv)
    if arguments.kind is None:
        counts = {kind: sorted(read()) for kind, read in KINDS.items()}
        if arguments.json:
            print_json(counts)
        else:
            print(table([(kind, f"{len(names):>3}", _some(names)) for kind, names in counts.items()]))
        return 0
    entries = KINDS[_kind(arguments.kind)]()
    if arguments.json:
        print_json(entries)
    elif _kind(arguments.kind) == "losses":
        print(_losses_with_needs())
    else:
        print(table(entries.items()))
    return 0


def _kind(word: str) -> str:
    from synthkit.errors import UsageError

    singular = {kind.rstrip("s"): kind for kind in KINDS} | {"curriculum": "curricula", "loss": "losses"}
    if word in KINDS:
        return word
    if word in singular:
        return singular[word]
    raise UsageError("list: no such kind", got=word, allowed=KINDS)


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
