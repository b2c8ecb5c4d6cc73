"""`synthkit select`: when to stop a run, and which run to take, without a validation set. No torch until it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synthkit.cli.arguments import Arguments, print_json, table
from synthkit.cli.bank.common import clean

HEADS = {
    "agreement": "agree",
    "agreement_augmented": "agree+",
    "kl": "KL",
    "confidence": "confid.",
    "class_balance": "balance",
    "bn_distance": "BN",
    "disagreement": "disagr.",
}
"""Column of every signal."""
EPILOG = """examples:
  synthkit synthesize --teacher t --method cudfkd --method.checkpoints 10 --out banks/cudfkd
  synthkit select banks/cudfkd --probe banks/dafl
  synthkit select banks/cudfkd banks/dafl banks/cmi banks/nayer --out choice.json
"""


def _parser() -> Arguments:
    parser = Arguments(
        prog="synthkit select",
        description="Choose the stopping point of every run, and one run, by what can be seen without data: how well "
        "students agree with their teacher on images of banks that they did not learn from.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="RUN_OR_BANK",
                        help="banks made with --method.checkpoints N, or distill runs (one student each)")  # fmt: skip
    parser.add_argument("--probe", nargs="+", action="extend", metavar="BANK",
                        help="banks to judge on; `others` (the default) is: every given bank of another method, or of "
                        "another seed where there is one method only")  # fmt: skip
    parser.add_argument("--teacher", metavar="SPEC", help="model spec; the banks' own by default")
    parser.add_argument("--eval-data", metavar="DATA", help="labelled data: afterwards, say what the choice has cost")
    parser.add_argument("--limit", type=int, default=512, metavar="N", help="probe images per bank, at most (512)")
    parser.add_argument("--total", type=int, default=4096, metavar="N",
                        help="probe images per student, at most, over all probe banks (4096)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of probe images (0)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--out", metavar="FILE.json", help="write the result to a new file too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run `synthkit select ARGV...`; returns the exit code. Errors are raised as `SynthkitError`."""
    args = _parser().parse(argv)

    from synthkit.evaluation.selection import OTHERS, select
    from synthkit.report.pairs import require_new_file, write_new_file
    from synthkit.runtime import hardware, versions

    if args.out is not None:
        require_new_file(Path(args.out), (".json",), "--out")
    result = select(
        args.paths, args.probe or [OTHERS], teacher=args.teacher, eval_data=args.eval_data, limit=args.limit,
        total=args.total, seed=args.seed, device=args.device, tell=_tell,
    )  # fmt: skip
    record = result | {"versions": versions(), "hardware": hardware()}
    if args.out is not None:
        write_new_file(Path(args.out), json.dumps(record, indent=1).encode())
    if args.json:
        print_json(record)
    else:
        print("\n".join(clean(line, 400) for line in lines(result)))
        if args.out is not None:
            print(f"wrote {clean(args.out)}")
    return 0


def _tell(text: str) -> None:
    print(f"select: {clean(text, 400)}", file=sys.stderr, flush=True)


def lines(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    measured = result["diagnosis"] is not None
    head = ["method", "seed", "step", "score", *HEADS.values(), *(["top-1"] if measured else []), ""]
    rows = [head]
    choice = result["choice"]
    for row in result["candidates"]:
        chosen = choice is not None and (row["run"], row["step"]) == (choice["run"], choice["stop"])
        mark = "chosen" if chosen else "stop" if row["stop"] else ""
        figures = [_number(row["score"]), *(_number(row["signals"][name]) for name in HEADS)]
        top1 = [f"{100 * row['top1']:.2f}"] if measured else []
        rows.append([row["name"], str(row["seed"]), str(row["step"]), *figures, *top1, mark])
    out = [*table(rows).splitlines(), "", "stopping point: the step of a run with the " + result["rule"]]
    methods = [f"{row['name']} {_number(row['score'])}" for row in result["methods"]]
    if choice is None:
        out.append("no run is chosen")
    else:
        out += [f"methods, mean score of their runs at the stopping points, by the same rule: {', '.join(methods)}",
                f"chosen: {choice['name']} seed {choice['seed']}, step {choice['stop']}: {choice['path']}"]  # fmt: skip
    if measured:
        out += _diagnosis(result["diagnosis"])
    return out + [f"note: {note}" for note in result["notes"]]


def _diagnosis(found: dict[str, Any]) -> list[str]:
    """What the choice has cost, in points of top-1, and how well every signal orders the students."""
    stopping, among, together = found["stopping"], found["among_runs"], found["together"]
    rows = [["", "stopping point", "among runs", "together"]]
    names = ["choice", "last", "best_last", "random", *HEADS]
    for name in names:
        values = [part["regret"].get(name) for part in (stopping, among, together)]
        if any(value is not None for value in values):
            rows.append([name.replace("_", " "), *("-" if v is None else f"{100 * v:.2f}" for v in values)])
    out = ["", f"diagnosis on {found['images']:,} labelled images of {found['data']} ({found['split']}), seen after "
           "the choice: points of top-1 lost to the best possible choice", *table(rows).splitlines()]  # fmt: skip
    rows = [["", "within runs", "among last epochs"]]
    for name in ("score", *HEADS):
        values = [part["spearman"].get(name) for part in (stopping, among)]
        if any(value is not None for value in values):
            rows.append([name.replace("_", " "), *map(_number, values)])
    methods = found["methods"]
    if methods["choice"] is not None and len(methods["top1"]) > 1:
        lost = 100 * methods["regret"]["choice"]
        out.append(f"method: {methods['choice']} is chosen, {methods['oracle']} is best; {lost:.2f} points lost")
    return [*out, "", "Spearman's correlation with top-1 (1: the signal orders all rightly)", *table(rows).splitlines()]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
