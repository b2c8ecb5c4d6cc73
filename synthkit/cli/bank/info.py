"""`synthkit bank info`: what is in a bank."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from synthkit.cli.arguments import Arguments, print_json
from synthkit.cli.bank.common import clean

if TYPE_CHECKING:
    from synthkit.bank import Bank


def configure(parser: Arguments) -> None:
    """Add the options."""
    parser.add_argument("bank", metavar="BANK", help="bank directory")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    """Print the facts of the bank."""
    from synthkit.bank import Bank

    bank = Bank(args.bank)
    facts = bank.info()
    if args.json:
        print_json(facts)
    else:
        print("\n".join(info_lines(bank, facts)))
    return 0


def info_lines(bank: Bank, facts: dict[str, Any]) -> list[str]:
    """The facts as readable lines."""
    from synthkit.bank.card import method_of

    teacher = facts["teacher"]

    def number(key: str, form: str, note: str = "") -> str:
        return "not stored" if facts[key] is None else format(facts[key], form) + note

    state = "complete" if facts["complete"] else "unfinished"
    state += ", sealed" if facts["sealed"] else ""
    spread, course = facts["difficulty_range"], facts["difficulty_by_tenth"]
    logits = [f"top-{facts['top_k']} logits and the tail" if facts["top_k"] else "",
              "all logits" if "logits" in facts["columns"] else ""]  # fmt: skip
    rows = {
        "images": f"{facts['images']:,} of {facts['images_planned']:,}, uint8 {' x '.join(map(str, facts['shape']))}",
        "shards": f"{facts['shards']} of {facts['shards_planned']} ({state}), {facts['bytes'] / 1e6:,.1f} MB",
        "columns": ", ".join(facts["columns"]) or "none yet",
        "labels": ", ".join([f"{facts['label_kind']}, {facts['num_classes']} classes", *filter(None, logits)]),
        "label sets": "; ".join(map(_label_set, facts["label_set_facts"])) or "none",
        **({"transform": clean(facts["transform"].get("kind"))} if facts["transform"] else {}),
        "balance": number("balance", ".3f", " (1 is even)"),
        "difficulty": number("mean_difficulty", ".4g", f" ({spread[0]:.4g} to {spread[1]:.4g})" if spread else ""),
        **({"  by tenth": " ".join(f"{v:.3g}" for v in course) + " (in stored order)"} if course else {}),
        "agreement": number("teacher_agreement", ".2%", " of the labels are the argmax of the stored logits"),
        "confidence": number("mean_confidence", ".2%", " (mean of the teacher's largest probability)"),
        "steps": "not stored" if not facts["step_range"] else "{} to {}".format(*facts["step_range"]),
        "generators": str(facts["generators"]),
        "method": clean(method_of(bank.spec)),
        "teacher": clean(teacher.get("name") or teacher.get("arch") or "none"),
        "seed": str(facts["seed"]),
        "made": f"{clean(facts['created'])}, in {number('seconds', ',.1f')} s",
        "licence": clean(facts["licence"] or "not stated"),
        "recipe hash": clean(facts["recipe_hash"]),
        "root hash": facts["root"] or "none before the bank is complete",
    }
    lines = [f"{clean(facts['path'])}: {facts['origin']}", *(f"  {name:<12} {value}" for name, value in rows.items())]
    counts = facts["label_histogram"]
    if counts:
        lines += ["  classes", *_histogram(bank.class_names, counts)]
    if not facts["complete"]:
        lines.append("unfinished: go on with synthkit synthesize ... --resume")
    return lines


def _label_set(facts: dict[str, Any]) -> str:
    """ "fkd: 8,000 views, top 3, 0.5 MB"."""
    if "damaged" in facts:
        return f"{clean(facts['name'])}: damaged (synthkit bank verify)"
    kept = "all logits" if facts["top_k"] is None else f"top {facts['top_k']}"
    state = "" if facts["complete"] else ", unfinished"
    return f"{clean(facts['name'])}: {facts['rows']:,} {facts['kind']}, {kept}, {facts['bytes'] / 1e6:,.1f} MB{state}"


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
