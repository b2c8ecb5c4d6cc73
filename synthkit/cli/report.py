"""`synthkit report`: one self-contained HTML page of banks and runs. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from synthkit.cli.arguments import Arguments, print_json
from synthkit.runtime import format_bytes

EPILOG = """examples:
  synthkit report banks/mnist
  synthkit report banks/c10 runs/s1 runs/s2 --out c10.html
"""


def main(argv: Sequence[str]) -> int:
    """Run `synthkit report ARGV...`; returns the exit code. Errors are raised as `SynthkitError`."""
    import argparse

    parser = Arguments(
        prog="synthkit report",
        description="One self-contained HTML page: results, images easy to hard, curves, recipe, warnings.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="RUN_OR_BANK", help="bank or run directories, in page order")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="page to write (report.html); only a "
                        "report of synthkit is replaced")  # fmt: skip
    parser.add_argument("--title", metavar="TEXT", help="heading of the page")
    parser.add_argument("--per-class", type=int, default=10, metavar="N", help="images per class, at most (10)")
    parser.add_argument("--max-classes", type=int, default=20, metavar="N", help="classes in the picture, at most (20)")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    args = parser.parse(argv)
    from synthkit.report.page import report

    out = report(
        args.paths, args.out, title=args.title, per_class=args.per_class, max_classes=args.max_classes
    )  # fmt: skip
    size = out.stat().st_size
    if args.json:
        print_json({"out": str(out), "bytes": size, "parts": len(args.paths)})
    else:
        print(f"wrote {out} ({format_bytes(size)})")
    return 0
