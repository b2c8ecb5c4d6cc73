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
    from synthkit.bank.checking.verify import verify
    from synthkit.bank.disk.lock import claim
    from synthkit.bank.seal import seal
    from synthkit.bank.spec import read_record

    bank = Path(args.bank)
    read_record(bank)
    with claim(bank):  # what is verified is what is sealed: no run writes meanwhile
        verify(bank).raise_if_damaged()
        manifest = seal(bank, renew=True)
    if args.json:
        print_json(manifest)
    else:
        print(f"sealed: {len(manifest['shards'])} shards, root {manifest['root']}")
    return 0
