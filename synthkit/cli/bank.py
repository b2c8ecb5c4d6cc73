"""`synthkit bank ...`: look at a bank, check it, mend it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from synthkit.errors import BankError, OutputExistsError, StorageError, UsageError

if TYPE_CHECKING:
    from synthkit.bank import Bank

COMMANDS = {
    "info": "what is in a bank: classes, difficulty, teacher, recipe",
    "ls": "the shards of a bank, or the banks in a folder",
    "verify": "check every file against its record (exit code 3 when damaged)",
    "repair": "move damaged parts to quarantine/ and say what to make again",
    "seal": "write the manifest with the root hash (done by itself when a bank is finished)",
    "show": "write a picture: one row per class, easy to hard",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", hint=f"see: {self.prog} --help")


def main(argv: list[str]) -> int:
    """Run `synthkit bank ARGV...`; returns the exit code. Errors are raised as `SynthkitError`."""
    name = next((a for a in argv if not a.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        raise UsageError("bank: no such command", got=name, allowed=COMMANDS, hint="see: synthkit bank --help")
    parser = _make_parser()
    if not argv:
        parser.print_help()
        return 2
    args = parser.parse_args(argv)
    return _RUN[args.command](args)


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="synthkit bank", description="Look at a bank, check it, mend it.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    made: dict[str, argparse.ArgumentParser] = {}
    for name, text in COMMANDS.items():
        made[name] = commands.add_parser(name, help=text, description=text[0].upper() + text[1:], allow_abbrev=False)
    for name in ("info", "verify", "repair", "seal", "show"):
        made[name].add_argument("bank", metavar="BANK", help="bank directory")
    made["ls"].add_argument(
        "bank", metavar="DIR", nargs="?", default="banks", help="a bank, or a folder of banks (banks)"
    )
    for name in ("info", "ls", "verify", "repair", "seal"):
        made[name].add_argument("--json", action="store_true", help="print JSON")
    made["verify"].add_argument("--deep", action="store_true", help="look at the values too, not only at the bytes")
    show = made["show"]
    show.add_argument("--out", metavar="FILE", help="PNG to write (BANK-NAME.png in this folder)")
    show.add_argument("--per-class", type=int, default=10, metavar="N", help="images per class (10)")
    show.add_argument("--max-classes", type=int, default=20, metavar="N", help="rows at most (20)")
    show.add_argument("--classes", metavar="0,3,7", help="the classes to show")
    return parser


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1))


def clean(value: object, limit: int = 200) -> str:
    """`value` as one printable line: text from a bank must not steer the terminal."""
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _info(args: argparse.Namespace) -> int:
    from synthkit.bank import Bank

    bank = Bank(args.bank)
    facts = bank.info()
    if args.json:
        _print_json(facts)
    else:
        print("\n".join(_info_lines(bank, facts)))
    return 0


def _info_lines(bank: Bank, facts: dict[str, Any]) -> list[str]:
    from synthkit.bank.card import method_of

    teacher = facts["teacher"]

    def number(key: str, form: str, note: str = "") -> str:
        return "not stored" if facts[key] is None else format(facts[key], form) + note

    state = "complete" if facts["complete"] else "unfinished"
    state += ", sealed" if facts["sealed"] else ""
    spread = facts["difficulty_range"]
    rows = {
        "images": f"{facts['images']:,} of {facts['images_planned']:,}, uint8 {' x '.join(map(str, facts['shape']))}",
        "shards": f"{facts['shards']} of {facts['shards_planned']} ({state}), {facts['bytes'] / 1e6:,.1f} MB",
        "columns": ", ".join(facts["columns"]) or "none yet",
        "labels": f"{facts['label_kind']}, {facts['num_classes']} classes",
        "balance": number("balance", ".3f", " (1 is even)"),
        "difficulty": number("mean_difficulty", ".4g", f" ({spread[0]:.4g} to {spread[1]:.4g})" if spread else ""),
        "agreement": number("teacher_agreement", ".2%", " of the labels are the argmax of the stored logits"),
        "confidence": number("mean_confidence", ".2%", " (mean of the teacher's largest probability)"),
        "steps": "not stored" if not facts["step_range"] else "{} to {}".format(*facts["step_range"]),
        "generators": str(facts["generators"]),
        "method": clean(method_of(bank.spec)),
        "teacher": clean(teacher.get("name") or teacher.get("arch") or "none"),
        "seed": str(facts["seed"]),
        "made": f"{clean(facts['created'])}, in {number('seconds', ',.1f')} s",
        "real data": facts["origin"],
        "recipe hash": clean(facts["recipe_hash"]),
        "root hash": facts["root"] or "none before the bank is complete",
    }
    lines = [clean(facts["path"]), *(f"  {name:<12} {value}" for name, value in rows.items())]
    counts = facts["label_histogram"]
    if counts:
        lines += ["  classes", *_histogram(bank.class_names, counts)]
    if not facts["complete"]:
        lines.append("unfinished: go on with synthkit synthesize ... --resume")
    return lines


def _histogram(names: list[str], counts: list[int], shown: int = 20) -> list[str]:
    names = [clean(n, 24) for n in names]
    width, top = max(len(n) for n in names[:shown]), max(max(counts), 1)
    lines = [
        f"    {name:<{width}} {count:>8,} {'#' * round(40 * count / top)}"
        for name, count in list(zip(names, counts, strict=True))[:shown]
    ]
    if len(counts) > shown:
        empty = sum(1 for c in counts if c == 0)
        lines.append(f"    ... {len(counts)} classes, {min(counts):,} to {max(counts):,} images each, {empty} empty")
    return lines


def _ls(args: argparse.Namespace) -> int:
    from synthkit.bank import Bank

    root = Path(args.bank)
    if (root / "bank.json").exists():
        bank = Bank(root)
        rows = [{"shard": s.index, "n": s.n, "bytes": s.bytes, "sha256": s.sha256,
                 **{k: s.raw.get(k) for k in ("mean_difficulty", "teacher_agreement", "step_range", "seconds")}}
                for s in bank.sidecars]  # fmt: skip
        if args.json:
            _print_json(rows)
            return 0
        print(f"{'shard':>5} {'images':>8} {'MB':>8} {'difficulty':>10} {'agreement':>9} {'steps':>17}  sha256")
        for r in rows:
            steps = "-" if not r["step_range"] else "{}-{}".format(*r["step_range"])
            print(f"{r['shard']:>5} {r['n']:>8,} {r['bytes'] / 1e6:>8.1f} {_or_dash(r['mean_difficulty']):>10}"
                  f" {_or_dash(r['teacher_agreement']):>9} {steps:>17}  {r['sha256'][:16]}")  # fmt: skip
        if not bank.complete:
            print(f"{bank.spec.shards - len(rows)} of {bank.spec.shards} shards are still to be made")
        return 0
    found = sorted(p.parent for p in root.glob("*/bank.json"))
    if not found:
        raise UsageError(f"{root}: neither a bank nor a folder of banks", hint="synthkit bank ls DIR")
    banks = [Bank(p) for p in found]
    if args.json:
        _print_json([b.info() for b in banks])
        return 0
    for bank in banks:
        shape = "x".join(map(str, bank.shape))
        state = "complete" if bank.complete else f"unfinished, {len(bank.sidecars)} of {bank.spec.shards} shards"
        print(f"{clean(bank.path)}  {len(bank):,} images {shape}  {bank.num_classes} classes  {state}")
    return 0


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _verify(args: argparse.Namespace) -> int:
    from synthkit.bank.verify import verify

    report = verify(args.bank, deep=args.deep)
    if args.json:
        _print_json(report.to_dict())
    else:
        for part, problems in report.problems.items():
            for problem in problems:
                print(f"DAMAGED {part}: {clean(problem, 400)}")
        for note in report.notes:
            print(f"note: {note}")
        if report.ok:
            depth = "bytes and values" if report.deep else "bytes"
            print(f"ok: {len(report.committed)} of {report.planned} shards, {report.bytes_read / 1e6:,.1f} MB, {depth}")
    sys.stdout.flush()
    report.raise_if_damaged()
    return 0


def _repair(args: argparse.Namespace) -> int:
    from synthkit.bank.verify import repair

    report = repair(args.bank)
    if args.json:
        _print_json(report.to_dict())
        return 0
    for place in report.moved:
        print(f"moved to {place}")
    if not report.moved:
        print("nothing is damaged")
    if report.remake:
        print(f"to be made: shards {_ranges(report.remake)}; run the same synthesize command with --resume")
    return 0


def _ranges(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _seal(args: argparse.Namespace) -> int:
    from synthkit.bank.seal import seal
    from synthkit.bank.verify import verify

    verify(args.bank).raise_if_damaged()
    manifest = seal(Path(args.bank))
    if args.json:
        _print_json(manifest)
    else:
        print(f"sealed: {len(manifest['shards'])} shards, root {manifest['root']}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from synthkit.bank import Bank
    from synthkit.report.grid import grid_png

    bank = Bank(args.bank)
    out = Path(args.out or f"{bank.path.resolve().name}.png")
    if out.suffix.lower() != ".png":
        raise UsageError("show: --out must name a .png file", got=str(out))
    if out.exists():
        raise OutputExistsError(f"{out}: exists already", hint="choose another --out")
    try:
        classes = None if args.classes is None else [int(c) for c in args.classes.split(",")]
    except ValueError:
        raise UsageError("show: --classes must be numbers like 0,3,7", got=args.classes) from None
    if not len(bank):
        raise BankError(f"{bank.path}: no shard is committed yet", hint="go on with: synthkit synthesize --resume")
    picture = grid_png(bank, args.per_class, max_classes=args.max_classes, classes=classes)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(picture)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror}") from error
    print(f"wrote {out}")
    return 0


_RUN = {"info": _info, "ls": _ls, "verify": _verify, "repair": _repair, "seal": _seal, "show": _show}
