"""`synthkit bank verify`: is every byte what its record says?"""

from __future__ import annotations

import sys
from argparse import Namespace

from synthkit.cli.arguments import Arguments, print_json
from synthkit.cli.bank.common import clean


def configure(parser: Arguments) -> None:
    """Add the options."""
    parser.add_argument("bank", metavar="BANK", help="bank directory")
    parser.add_argument("--deep", action="store_true", help="look at the values too, not only at the bytes")
    parser.add_argument(
        "--untrusted", action="store_true", help="parse in a child process with limits: for a bank from a stranger"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    """Print what is damaged; raises `BankError` when anything is."""
    from synthkit.bank.checking.verify import verify

    report = verify(args.bank, deep=args.deep, untrusted=args.untrusted)
    if args.json:
        print_json(report.to_dict())
    else:
        for part, problems in report.problems.items():
            for problem in problems:
                print(f"DAMAGED {clean(part)}: {clean(problem, 400)}")
        for note in report.notes:
            print(f"note: {clean(note, 400)}")
        if report.guards:
            print(f"parsed in a child process with: {'; '.join(report.guards)}")
        if report.ok:
            depth = "bytes and values" if report.deep else "bytes"
            print(f"ok: {len(report.committed)} of {report.planned} shards, {report.bytes_read / 1e6:,.1f} MB, {depth}")
    sys.stdout.flush()
    report.raise_if_damaged()
    return 0
