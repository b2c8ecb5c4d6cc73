"""`synthkit bank import`: foreign data, or an export of ours, into a bank."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from synthkit.bank.imports import IMPORTERS, ImportOptions, import_bank
from synthkit.cli.arguments import Arguments, print_json
from synthkit.cli.bank.common import clean
from synthkit.errors import UsageError

if TYPE_CHECKING:
    from synthkit.bank.imports.source import Source


def configure(parser: Arguments) -> None:
    """Add the options."""
    add = parser.add_argument
    add("src", metavar="SRC", help="file or folder to import")
    add("--out", metavar="BANK", required=True, help="bank directory to make")
    add("--format", default="auto", choices=["auto", *IMPORTERS], help="what SRC is (auto: by its name)")
    add("--size", type=int, nargs=3, metavar=("C", "H", "W"), help="bring every image to this size")
    add("--class-names", nargs="+", metavar="NAME", help="names of the classes in label order, or one FILE.txt")
    add("--num-classes", type=int, metavar="K", help="classes, where the labels do not show them all")
    add("--mean", type=float, nargs="+", metavar="X", help="channel means in [0,1], of the teacher or of float images")
    add("--std", type=float, nargs="+", metavar="X", help="channel standard deviations, like --mean")
    add("--teacher", metavar="SPEC", help="take mean, std and class names from the card of this model")
    add("--layout", default="auto", choices=["auto", "nchw", "nhwc"], help="axes of image arrays")
    add("--values", default="auto", choices=["auto", "unit", "byte", "normalised"],
        help="what float images hold: 0 to 1, 0 to 255, or (pixel - mean) / std")  # fmt: skip
    add("--split", default="all", choices=["all", "train", "test"], help="the part of a divided source (all)")
    real = parser.add_mutually_exclusive_group()
    real.add_argument("--real", action="store_true", help="the images are, or start from, real ones (the default)")
    real.add_argument("--synthetic", action="store_true", help="no image is, or starts from, a real one")
    add("--data-free", action="store_true", help="with --synthetic: made without looking at any real image")
    add("--unlabelled", action="store_true", help="take the images without labels")
    add("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    """Import and say what was made."""
    mean, std, names = args.mean, args.std, _names(args.class_names)
    if args.teacher:
        if mean or std:
            raise UsageError("import: --teacher gives mean and std; leave --mean and --std out")
        mean, std, theirs = _from_card(args.teacher)
        names = names or theirs
    options = ImportOptions(
        size=tuple(args.size) if args.size else None, class_names=names, num_classes=args.num_classes,
        mean=mean, std=std, layout=args.layout, values=args.values, split=args.split,
        real=True if args.real else False if args.synthetic else None, data_free=args.data_free,
        unlabelled=args.unlabelled,
    )  # fmt: skip
    show = _Show(quiet=args.json)
    try:
        bank = import_bank(args.src, args.out, args.format, options, said=show.said, progress=show.progress)
    finally:
        show.close()
    if args.json:
        print_json(bank.info())
        return 0
    for note in show.notes:
        print(f"note: {clean(note, 400)}")
    print(f"imported {len(bank):,} images into {args.out}: {bank.info()['origin']}")
    return 0


class _Show:
    """What is printed while an import runs."""

    def __init__(self, quiet: bool):
        self._quiet, self._source, self._bar = quiet, None, None

    @property
    def notes(self) -> list[str]:
        return self._source.notes if self._source else []

    def said(self, source: Source) -> None:
        """Print the estimate and begin the bar."""
        self._source = source
        if self._quiet:
            return
        from synthkit.bank.imports.write import estimate
        from synthkit.runtime import Progress

        size = " x ".join(map(str, source.shape))
        print(f"{source.kind}: {source.count:,} images {size}, {source.num_classes} classes; "
              f"the bank will take about {estimate(source) / 1e6:,.1f} MB", flush=True)  # fmt: skip
        self._bar = Progress(source.count, "import")

    def progress(self, count: int) -> None:
        """Advance."""
        if self._bar:
            self._bar.update(count)

    def close(self) -> None:
        """End the bar."""
        if self._bar:
            self._bar.close()


def _names(words: list[str] | None) -> list[str] | None:
    """The names themselves, or the lines of the one text file named."""
    from pathlib import Path

    if not words or len(words) > 1 or not words[0].endswith(".txt"):
        return words
    path = Path(words[0])
    if not path.is_file() or path.stat().st_size > 64 << 20:
        raise UsageError("import: --class-names names no file of names", got=words[0])
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not a text file") from None


def _from_card(spec: str) -> tuple[list[float], list[float], list[str] | None]:
    """(mean, std, class names) of a model's card; its weights are not needed."""
    from synthkit.models.sources import resolve

    card = resolve(spec).card
    if card is None:
        raise UsageError("import: this model has no card that tells its mean and std", got=spec,
                         hint="write a card (see recipes/teachers), or give --mean and --std")  # fmt: skip
    return card.mean, card.std, card.class_names
