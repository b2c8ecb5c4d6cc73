"""`synthkit export`: a bank as ImageFolder, parquet, WebDataset, MDS, npz, .pt or safetensors, without torch; or a
trained student as safetensors, torch.export or ONNX."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from synthkit.bank.export import Plan, format_class, formats, plan
from synthkit.cli.arguments import Arguments, print_json
from synthkit.config.fields import Option, describe, options_of
from synthkit.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


STUDENT_FORMATS = ("safetensors", "torch-export", "onnx")  # of distillation/student_export.py, which imports torch


def main(argv: Sequence[str]) -> int:
    """Run `synthkit export ARGV...`; returns the exit code. Errors are raised as `SynthkitError`."""
    sources = {flag for flag in ("--bank", "--student") if any(w.partition("=")[0] == flag for w in argv)}
    if len(sources) == 2 or (argv and not sources and not {"-h", "--help"} & set(argv)):
        got = "both" if sources else "neither"
        raise UsageError("export: give exactly one of --bank and --student", got=got, hint="synthkit export --help")
    if "--student" in sources:
        return _export_student(argv)
    return _export_bank(argv)


def _export_student(argv: Sequence[str]) -> int:
    about = (
        "Write a trained classifier for use elsewhere: the weights with their card, or a graph that takes [0, 1] "
        "images (torch-export, onnx) and is checked against the network before it counts. Nothing is overwritten."
    )
    parser = Arguments(prog="synthkit export", description=about)
    parser.add_argument("--student", required=True, metavar="SPEC", help="run directory, card or other model spec")
    parser.add_argument("--format", required=True, choices=STUDENT_FORMATS, help=", ".join(STUDENT_FORMATS))
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make: the file and card.yaml")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse(argv)
    from synthkit.distillation.student_export import export_student
    from synthkit.models.card import ModelCard

    path = export_student(args.student, args.format, args.out)
    card = ModelCard.load(path / "card.yaml")
    facts = card.extra["export"]
    if args.json:
        print_json({"path": str(path), "bytes": _written(path), "weights": card.weights, **facts})
        return 0
    near = facts.get("checked_to")
    checked = "" if near is None else f"the same logits to {near:.1g}; " if near else "exactly the same logits; "
    print(f"wrote {path / str(card.weights)} ({_size(_written(path))}); {checked}input {facts['input']}")
    return 0


def _export_bank(argv: Sequence[str]) -> int:
    chosen = _format_of(argv)
    parser = _parser(chosen)
    given = vars(parser.parse(argv))
    own = {name: given.pop(f"option.{name}") for name in _options(chosen) if f"option.{name}" in given}
    planned = plan(given["bank"], given["format"], given["out"], labels_from=given["labels_from"],
                   unfinished=given["unfinished"], verify=given["verify"], workers=given["workers"], **own)  # fmt: skip
    from synthkit.bank.card import origin_line

    quiet = given["json"]
    if not quiet:
        sizes = f"about {_size(planned.bytes)}; {_size(planned.free)} are free there"
        print(f"{planned.source.count:,} images, {sizes}", flush=True)
    path = _run(planned)
    if quiet:
        print_json(_summary(planned, path))
        return 0
    print(origin_line(planned.source.spec))
    for note in planned.made.notes:
        print(f"note: {note}")
    print(f"wrote {path} ({_size(_written(path))}); how to read it is in {path / 'README.md'}")
    return 0


def _run(planned: Plan) -> Path:
    from synthkit.runtime import Progress

    with Progress(planned.steps, planned.title) as line:
        return planned.run(line.update)


def _summary(planned: Plan, path: Path) -> dict[str, Any]:
    from synthkit.bank.export.provenance import provenance

    record = provenance(planned.source, planned.name, planned.made)
    keys = ("to", "images", "columns", "left_out", "labels_from", "learning_rate", "contains_real", "real_data_used",
            "origin", "notes", "options")  # fmt: skip
    return {"path": str(path), "bytes": _written(path), **{key: record[key] for key in keys}}


def _written(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _format_of(argv: Sequence[str]) -> str | None:
    """The word after --format, so that its options can be added before everything is parsed."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--format", nargs="?")
    try:
        name = first.parse_known_args(list(argv))[0].format
    except argparse.ArgumentError:
        return None
    if name is not None:
        format_class(name)  # refuses a name that is not known, with the nearest
    return name


def _options(chosen: str | None) -> dict[str, Option]:
    return options_of(format_class(chosen).Options) if chosen else {}


def _parser(chosen: str | None) -> Arguments:
    about = "Write a bank in another format. The target is there whole or not at all; nothing is overwritten."
    after = (
        "Options of a format: synthkit export --format NAME --help. What the formats are: synthkit list formats. "
        "A trained student instead of a bank: synthkit export --student SPEC --help."
    )
    parser = Arguments(prog="synthkit export", description=about, epilog=None if chosen else after)
    parser.add_argument("--bank", required=True, metavar="BANK", help="bank directory")
    parser.add_argument("--format", required=True, metavar="FORMAT", help=", ".join(formats()))
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--labels-from", metavar="SET", help="label set that takes the place of the bank's labels")
    parser.add_argument("--unfinished", action="store_true", help="export what is committed of an incomplete bank")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True,
                        help="check the sha256 of every shard on the way (yes)")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="threads that encode PNG (one per CPU)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    if chosen:
        texts = describe(format_class(chosen).Options)
        group = parser.add_argument_group(f"options of {chosen}")
        for name, option in _options(chosen).items():
            _add(group, name, option, texts.get(name, ""))
    return parser


def _add(group: Any, name: str, option: Option, text: str) -> None:
    flag, default = "--" + name.replace("_", "-"), option.default
    shown = (
        {True: "yes", False: "no", None: "none"}.get(default, default)
        if isinstance(default, (bool, type(None)))
        else default
    )
    text = f"{text} ({shown})".replace("%", "%%")
    target = {"dest": f"option.{name}", "default": argparse.SUPPRESS}
    if option.boolean:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text, **target)
    elif option.choices:
        group.add_argument(flag, choices=option.choices, help=text, **target)
    else:
        kinds = {"a whole number": int, "a number": float, "a number or none": float, "a whole number or none": int}
        group.add_argument(flag, type=kinds.get(option.expected, str), metavar=name.upper(), help=text, **target)


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"
