"""`synthkit bank seal`: the manifest with the root hash."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from synthkit.cli.arguments import Arguments, print_json


def configure(parser: Arguments) -> None:
    """Add the options."""
    parser.add_argument("bank", metavar="BANK", help="bank directory")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    """Verify and seal."""
    from synthkit.bank.seal import seal
    from synthkit.bank.verify import verify

    verify(args.bank).raise_if_damaged()
    manifest = seal(Path(args.bank), renew=True)
    if args.json:
        print_json(manifest)
    else:
        print(f"sealed: {len(manifest['shards'])} shards, root {manifest['root']}")
    return 0
