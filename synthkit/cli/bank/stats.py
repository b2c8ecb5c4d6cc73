"""`synthkit bank stats`: diversity, and with real data the distance to them."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from synthkit.cli.arguments import Arguments, print_json
from synthkit.errors import UsageError

if TYPE_CHECKING:
    from synthkit.bank import Bank
    from synthkit.evaluation.features import FeatureSource


def configure(parser: Arguments) -> None:
    """Add the options."""
    parser.add_argument("bank", metavar="BANK", help="bank directory")
    parser.add_argument("--real", metavar="DATA", help="real images to compare with, for example mnist:DIR")
    parser.add_argument("--split", default="train", choices=("train", "test", "all"), help="part of --real (train)")
    add_feature_options(parser)
    parser.add_argument("--limit", type=int, default=10_000, metavar="N", help="images at most, of each set (10000)")
    parser.add_argument("--k", type=int, default=5, metavar="N", help="neighbour that sets the radii (5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (0)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_feature_options(parser: Arguments) -> None:
    """The options that choose a feature space."""
    parser.add_argument("--teacher", metavar="SPEC", help="network whose features are used (the bank's own teacher)")
    parser.add_argument("--features", choices=("teacher", "pixels"), help="space of the distances (teacher)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N")


def chosen_source(bank: Bank, args: Namespace) -> tuple[FeatureSource, list[str]]:
    """The feature space that the options name, and what had to be said about it."""
    from synthkit.evaluation.features import pixel_source, teacher_source
    from synthkit.runtime import resolve_device

    if args.features == "pixels":
        if args.teacher is not None:
            raise UsageError("--teacher has no part in --features pixels", hint="leave one of the two out")
        return pixel_source(bank.shape, resolve_device(args.device)), []
    return teacher_source(bank, args.teacher, args.device)


def run(args: Namespace) -> int:
    """Measure and print."""
    from synthkit.bank import Bank
    from synthkit.cli.bank.common import clean

    bank = Bank(args.bank)

    from synthkit.data.specs import load_data
    from synthkit.evaluation.stats import bank_stats, stats_lines
    from synthkit.runtime import hardware, versions

    source, said = chosen_source(bank, args)
    real = load_data(args.real, args.split, size=bank.shape) if args.real else None
    result = bank_stats(bank, source, real=real, limit=args.limit, k=args.k, seed=args.seed)
    result["notes"] = said + result["notes"]
    if args.json:
        print_json(result | {"versions": versions(), "hardware": hardware()})
    else:
        print("\n".join(clean(line, 400) for line in stats_lines(result)))
    return 0
