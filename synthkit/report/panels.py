"""Several banks side by side in one picture: a panel each, a row of images per class. PIL only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from synthkit.errors import UsageError
from synthkit.report.grid import FAINT, INK, font, looked_at, order_key, pick, picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from synthkit.bank.reader import Bank

CELL, GAP, BETWEEN, MARGIN, HEAD = 36, 2, 22, 14, 44


def panels(banks: Mapping[str, Bank], per_class: int = 6, *, max_classes: int = 10) -> Image:
    """One panel per bank: its name, its size, and `per_class` images of every class from easy to hard.

    Raises:
        UsageError: there is no bank. BankError: one is damaged.
    """
    from PIL import Image, ImageDraw

    if not banks:
        raise UsageError("panels: no bank was given")
    rows = min(max_classes, max(bank.num_classes for bank in banks.values()))
    width = per_class * (CELL + GAP) - GAP
    size = (2 * MARGIN + len(banks) * (width + BETWEEN) - BETWEEN, 2 * MARGIN + HEAD + rows * (CELL + GAP) - GAP)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for number, (name, bank) in enumerate(banks.items()):
        left = MARGIN + number * (width + BETWEEN)
        draw.text((left, MARGIN - 2), name, INK, font(15))
        real = ", from real images" if bank.spec.contains_real else ""
        draw.text((left, MARGIN + 18), f"{len(bank):,} images{real}", FAINT, font(12))
        seen = looked_at(len(bank))
        labels = bank.batch(seen, columns=("labels",)).labels
        key, _ = order_key(bank, seen)
        assert labels is not None  # asked for by name
        for row in range(min(rows, bank.num_classes)):
            chosen = seen[pick(labels, key, row, per_class)]
            if not len(chosen):
                continue
            images = bank.batch(chosen, columns=("images",)).images
            assert images is not None
            for column, pixels in enumerate(images):
                place = (left + column * (CELL + GAP), MARGIN + HEAD + row * (CELL + GAP))
                page.paste(picture(pixels, (CELL, CELL)), place)
    return page
