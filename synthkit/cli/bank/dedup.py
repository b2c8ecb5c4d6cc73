"""`synthkit bank dedup`: a new bank without duplicates; the old one stays as it is."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit.cli.arguments import Arguments, print_json
from synthkit.cli.bank.stats import add_feature_options, chosen_source
from synthkit.errors import UsageError

if TYPE_CHECKING:
    from synthkit.bank import Bank
    from synthkit.bank.joining.dedup import Duplicates

MOST_PAIRS = 60


def configure(parser: Arguments) -> None:
    """Add the options."""
    parser.description = (
        "Write a new bank without duplicates: those with equal pixels always, and images whose features lie within the "
        "threshold of an earlier image. The lowest row of a group stays. The old bank is not changed."
    )
    parser.add_argument("bank", metavar="BANK", help="bank directory")
    parser.add_argument("--out", metavar="NEW", help="directory of the new bank")
    parser.add_argument("--threshold", default="auto", metavar="T",
                        help="largest distance of near duplicates (0 to 2 between teacher features of length 1; 0 to "
                        "1, root mean square, between pixels), or auto: far below what neighbours of this bank have, "
                        "or none: equal pixels only")  # fmt: skip
    add_feature_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed and write no bank")
    parser.add_argument("--pairs", metavar="FILE.png", help="picture of removed images beside those that stay")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample behind auto (0)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    """Find the duplicates, and write what stays."""
    from synthkit.bank import Bank
    from synthkit.bank.joining.dedup import check_source, only_exact, summary, write_kept
    from synthkit.report.pairs import require_new_file, write_new_file

    bank = Bank(args.bank)
    if args.out is None and not args.dry_run:
        raise UsageError("dedup: where should the new bank go?", hint="give --out NEW, or --dry-run")
    threshold = _threshold(args.threshold)
    if args.out is not None and not args.dry_run:
        check_source(bank, Path(args.out))
    if args.pairs is not None:
        require_new_file(Path(args.pairs), (".png",), "--pairs")
    notes: list[str] = []
    if threshold == "none":
        found = only_exact(bank)
    else:
        from synthkit.evaluation.duplicates import find_duplicates

        source, notes = chosen_source(bank, args)
        value = None if threshold == "auto" else float(threshold)
        found = find_duplicates(bank, source, threshold=value, seed=args.seed, tell=_tell)
    facts = summary(bank, found) | {"bank": str(bank.path), "out": None, "dry_run": args.dry_run, "notes": notes}
    if args.out is not None and not args.dry_run:
        write_kept(bank, found, args.out)
        facts["out"] = str(args.out)
        sets = bank.label_sets()
        if sets:
            notes.append(f"label sets stay with the old bank: {', '.join(sets)} (relabel the new one)")
    if args.pairs is not None:
        picture = _picture(bank, found)
        if picture is None:
            notes.append(f"no duplicates, so {args.pairs} was not written")
        else:
            write_new_file(Path(args.pairs), picture)
    if args.json:
        print_json(facts)
    else:
        print("\n".join(_lines(facts)))
    return 0


def _threshold(text: str) -> str | float:
    if text in ("auto", "none"):
        return text
    try:
        value = float(text)
    except ValueError:
        raise UsageError("--threshold must be a number, auto or none", got=text) from None
    if not 0 <= value < float("inf"):
        raise UsageError("--threshold must be a number from 0", got=text)
    return value


def _tell(text: str) -> None:
    print(f"dedup: {text}", file=sys.stderr, flush=True)


def _picture(bank: Bank, found: Duplicates) -> bytes | None:
    """Removed images beside those that stay, the most doubtful (largest distance) first; None where there are none."""
    import numpy as np

    from synthkit.report.pairs import Pair, pairs_png

    removed = found.removed
    if not len(removed) or found.distances is None:
        return None
    shown = removed[np.argsort(-found.distances[removed], kind="stable")][:MOST_PAIRS]
    left = bank.batch(shown, columns=("images",)).images
    right = bank.batch(found.leader[shown], columns=("images",)).images
    assert left is not None and right is not None  # the column was asked for
    pairs = [
        Pair(a, b, f"{row}={found.leader[row]} exact" if found.exact[row] else f"{row}~{found.leader[row]} "
             f"{found.distances[row]:.3g}") for a, b, row in zip(left, right, shown.tolist(), strict=True)
    ]  # fmt: skip
    title = f"{bank.path.resolve().name}: {len(removed):,} removed (left) and the image that stays (right)"
    limit = "equal pixels only" if found.threshold is None else f"threshold {found.threshold:.4g}, largest first"
    real = "; contains real images" if bank.spec.contains_real else ""
    return pairs_png(pairs, title=title, subtitle=f"{limit}{real}")


def _lines(facts: dict[str, Any]) -> list[str]:
    from synthkit.cli.bank.common import clean

    verb = "would be removed" if facts["dry_run"] else "removed"
    lines = [f"{clean(facts['bank'])}: {facts['removed']:,} of {facts['images']:,} images {verb}: "
             f"{facts['exact']:,} with equal pixels, {facts['near']:,} near"]  # fmt: skip
    if facts["threshold"] is not None:
        space = facts["features"]["name"]
        lines += [f"  features    {clean(space)}", f"  threshold   {facts['threshold']:.4g} ({facts['unit']})",
                  f"  from        {facts['threshold_from']}"]  # fmt: skip
        quantiles = facts.get("nearest_quantiles")
        if quantiles:
            shown = ", ".join(f"{float(q):.0%} {value:.3g}" for q, value in quantiles.items())
            lines.append(f"  neighbours  quantiles of the distance to the nearest other image: {shown}")
    if facts["removed"]:
        lines.append(f"  groups      {facts['groups']:,}, the largest of {facts['largest_group']:,} images")
    classes = facts["removed_per_class"]
    if classes:
        shown = ", ".join(f"{clean(name, 30)}: {count:,}" for name, count in list(classes.items())[:20])
        lines.append(f"  classes     {shown}{', ...' if len(classes) > 20 else ''}")
    lines += [f"  note: {clean(note)}" for note in facts["notes"]]
    if facts["out"]:
        lines.append(f"wrote {clean(facts['out'])}: {facts['kept']:,} images")
    return lines
