"""`synthkit bank repair`: damaged parts go to quarantine/; nothing is deleted."""

from __future__ import annotations

from argparse import Namespace

from synthkit.cli.arguments import Arguments, print_json
from synthkit.cli.bank.common import clean, ranges


def configure(parser: Arguments) -> None:
    """Add the options."""
    parser.add_argument("bank", metavar="BANK", help="bank directory")
    parser.add_argument("--untrusted", action="store_true", help="look for damage in a child process with limits")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    """Set damaged parts aside and say what is to be made again."""
    from synthkit.bank.checking.repair import repair

    report = repair(args.bank, untrusted=args.untrusted)
    if args.json:
        print_json(report.to_dict())
        return 0
    for place in report.moved:
        print(f"moved to {clean(place)}")
    for part, problems in report.left.items():
        print(f"cannot be mended by moving files: {clean(part)}: {clean(problems[0], 400)}")
    if not report.moved and not report.left:
        print("nothing is damaged")
    if report.remake:
        print(f"to be made: shards {ranges(report.remake)}; run the same synthesize command with --resume")
    return 0
