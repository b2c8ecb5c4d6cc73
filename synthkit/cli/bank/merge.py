"""`synthkit bank merge`: several banks become one."""

from __future__ import annotations

from argparse import Namespace

from synthkit.cli.arguments import Arguments, print_json
from synthkit.cli.bank.common import clean, ranges


def configure(parser: Arguments) -> None:
    """Add the options."""
    parser.add_argument("banks", metavar="BANK", nargs="+", help="bank directories, in the order of the result")
    parser.add_argument("--out", metavar="DIR", required=True, help="the new bank")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument(
        "--allow-different-teachers", action="store_true", help="join banks with logits of different teachers"
    )
    parser.add_argument(
        "--images-per-shard", type=int, metavar="N", help="shard size of the new bank (one of the parents')"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    """Merge, and say what came from where."""
    from synthkit.bank.joining.merge import merge

    report = merge(
        args.banks, args.out, dry_run=args.dry_run, allow_different_teachers=args.allow_different_teachers,
        images_per_shard=args.images_per_shard,
    )  # fmt: skip
    if args.json:
        print_json({**report.to_dict(), "dry_run": args.dry_run})
        return 0
    verb = "would be" if args.dry_run else "is"
    print(f"{clean(report.out)} {verb} {report.images:,} images in {report.shards} shards:"
          f" {report.copied} copied byte for byte, {report.packed} packed anew")  # fmt: skip
    for note in report.notes:
        print(f"note: {clean(note, 400)}")
    if report.missing:
        print(f"missing: shards {ranges(report.missing)}")
    if report.root:
        print(f"root {report.root}")
    return 0
