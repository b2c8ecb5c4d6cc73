"""`synthkit bank show`: a picture of a bank."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from synthkit.cli.arguments import Arguments
from synthkit.errors import BankError, OutputExistsError, StorageError, UsageError


def configure(parser: Arguments) -> None:
    """Add the options."""
    parser.add_argument("bank", metavar="BANK", help="bank directory")
    parser.add_argument("--out", metavar="FILE", help="PNG to write (BANK-NAME.png in this folder)")
    parser.add_argument("--per-class", type=int, default=10, metavar="N", help="images per class (10)")
    parser.add_argument("--max-classes", type=int, default=20, metavar="N", help="rows at most (20)")
    parser.add_argument("--classes", metavar="0,3,7", help="the classes to show")


def run(args: Namespace) -> int:
    """Write the picture."""
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
