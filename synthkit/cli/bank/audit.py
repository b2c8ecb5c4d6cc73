"""`synthkit bank audit`: does the bank hold copies of real images?"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit.cli.arguments import Arguments, print_json
from synthkit.errors import DataError, ModelError, UsageError

if TYPE_CHECKING:
    from synthkit.bank import Bank
    from synthkit.data.real import RealData
    from synthkit.evaluation.features import FeatureSource


def configure(parser: Arguments) -> None:
    """Add the options."""
    parser.description = (
        "Look for real images in a bank: exact copies (also mirrored or moved by up to two pixels), near copies, and "
        "whether the bank is nearer to the training images than to a hold-out. It ends with a plain verdict, which is "
        "no privacy guarantee."
    )
    parser.add_argument("bank", metavar="BANK", help="bank directory")
    parser.add_argument("--real", metavar="DATA", help="the real images behind the bank: mnist:DIR, ...")
    parser.add_argument("--split", default="train", choices=("train", "test", "all"), help="part of --real (train)")
    parser.add_argument("--holdout", metavar="DATA", help="images of the same kind that took no part (the test part of "
                        "--real, where there is one)")  # fmt: skip
    parser.add_argument("--holdout-split", default="test", choices=("train", "test", "all"), help="its part (test)")
    parser.add_argument("--teacher", metavar="SPEC", help="network of the feature space (the bank's own teacher)")
    parser.add_argument("--features", choices=("both", "teacher", "pixels"), default="both", help="spaces (both)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N")
    limit = "bank and hold-out images at most for distances; copies are looked for in all (10000)"
    parser.add_argument("--limit", type=int, default=10_000, metavar="N", help=limit)
    percentile = "an image nearer than this share of the hold-out is a near copy, in percent (1)"
    parser.add_argument("--percentile", type=float, default=1.0, metavar="P", help=percentile)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (0)")
    parser.add_argument("--pairs", metavar="FILE.png", help="picture of the pairs to look at")
    parser.add_argument("--out", metavar="FILE", help="write the report as .html or .json")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    """Audit and print."""
    from synthkit.bank import Bank
    from synthkit.report.pairs import require_new_file, write_new_file

    bank = Bank(args.bank)
    if args.real is None:
        raise UsageError("audit: which real images?", hint="give --real DATA, for example --real mnist:DIR")
    if args.out is not None:
        require_new_file(Path(args.out), (".html", ".json"), "--out")
    if args.pairs is not None:
        require_new_file(Path(args.pairs), (".png",), "--pairs")

    from synthkit.cli.bank.common import clean
    from synthkit.data.specs import load_data
    from synthkit.evaluation.privacy import audit
    from synthkit.report.audit import audit_lines, audit_page, audit_picture
    from synthkit.runtime import hardware, versions

    spaces, notes = _spaces(bank, args)
    train = load_data(args.real, args.split, size=bank.shape)
    holdout = _holdout(args, train, bank, notes)
    result = audit(bank, train, holdout, spaces, limit=args.limit, percentile=args.percentile, seed=args.seed)
    result["notes"] = notes + result["notes"]
    record = result | {"versions": versions(), "hardware": hardware()}
    html = args.out is not None and Path(args.out).suffix.lower() == ".html"
    picture = audit_picture(result, bank, train) if html or args.pairs is not None else b""
    if args.pairs is not None:
        write_new_file(Path(args.pairs), picture)
    if args.out is not None:
        text = audit_page(result, picture) if html else (json.dumps(record, indent=1) + "\n").encode()
        write_new_file(Path(args.out), text)
    if args.json:
        print_json(record)
    else:
        print("\n".join(clean(line, 1000) for line in audit_lines(result)))
    return 0


def _spaces(bank: Bank, args: Namespace) -> tuple[list[FeatureSource], list[str]]:
    """The spaces that the options name; without a teacher at hand, pixels alone and a note."""
    from synthkit.evaluation.features import pixel_source, teacher_source
    from synthkit.runtime import resolve_device

    if args.features == "pixels" and args.teacher is not None:
        raise UsageError("--teacher has no part in --features pixels", hint="leave one of the two out")
    spaces = [] if args.features == "teacher" else [pixel_source(bank.shape, resolve_device(args.device))]
    if args.features == "pixels":
        return spaces, []
    try:
        source, said = teacher_source(bank, args.teacher, args.device)
    except ModelError as error:
        if args.teacher is not None or args.features == "teacher":
            raise
        return spaces, [f"measured in pixels only: {error}"]
    return [*spaces, source], said


def _holdout(args: Namespace, train: RealData, bank: Bank, notes: list[str]) -> RealData | None:
    """The hold-out named, else the test part of the real data, else none (the audit says what that means)."""
    from synthkit.data.specs import load_data

    if args.holdout is not None:
        return load_data(args.holdout, args.holdout_split, size=bank.shape)
    if train.split != "train":
        return None  # the data are not divided, or another part than train was asked for
    try:
        found: Any = load_data(args.real, "test", size=bank.shape)
    except DataError as error:
        notes.append(f"no test part beside the training images ({error})")
        return None
    return found if found.split in ("test", "val") else None
