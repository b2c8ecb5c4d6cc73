"""A picture of pairs of images, such as duplicates or a synthetic image beside its nearest real one. PIL only."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from synthkit.bank.disk.storage import require_free, staged
from synthkit.errors import UsageError
from synthkit.report.grid import FAINT, INK, MARGIN, _cell, _shorten, font, picture

BETWEEN, COLUMN_GAP, ROW_GAP = 3, 26, 14
WIDTH = 1000


@dataclass(frozen=True)
class Pair:
    """Two images (C,H,W) uint8 and what stands below them."""

    left: np.ndarray
    right: np.ndarray
    caption: str
    marked: bool = False
    """Whether the caption is set in red: a finding, not only the nearest there is."""


def pairs_png(pairs: Sequence[Pair], *, title: str, subtitle: str = "") -> bytes:
    """The pairs side by side in rows, as PNG bytes. Raises `UsageError` without any pair."""
    from PIL import Image, ImageDraw

    if not pairs:
        raise UsageError("pairs: there is no pair to show")
    width, height = _cell((pairs[0].left.shape[0], pairs[0].left.shape[1], pairs[0].left.shape[2]))
    small = font(12)
    captions = max(small.getlength(_shorten(p.caption, small, 240)) for p in pairs)
    cell = max(2 * width + BETWEEN, int(captions) + 2)
    across = max(1, min(len(pairs), (WIDTH - 2 * MARGIN + COLUMN_GAP) // (cell + COLUMN_GAP)))
    down = -(-len(pairs) // across)
    top = MARGIN + 54
    size = (max(560, 2 * MARGIN + across * (cell + COLUMN_GAP) - COLUMN_GAP),
            top + down * (height + 18 + ROW_GAP) + MARGIN - ROW_GAP)  # fmt: skip
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN - 4), _shorten(title, font(18), size[0] - 2 * MARGIN), INK, font(18))
    draw.text((MARGIN, MARGIN + 22), _shorten(subtitle, small, size[0] - 2 * MARGIN), FAINT, small)
    for number, pair in enumerate(pairs):
        x = MARGIN + (number % across) * (cell + COLUMN_GAP)
        y = top + (number // across) * (height + 18 + ROW_GAP)
        page.paste(picture(pair.left, (width, height)), (x, y))
        page.paste(picture(pair.right, (width, height)), (x + width + BETWEEN, y))
        colour = (196, 40, 34) if pair.marked else FAINT
        draw.text((x, y + height + 3), _shorten(pair.caption, small, cell), colour, small)
    stream = io.BytesIO()
    page.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def require_new_file(path: Path, suffixes: Sequence[str], option: str) -> None:
    """Refuse a file that exists or has another ending, before any work. Raises `UsageError`, `OutputExistsError`."""
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{option} must name a {' or '.join(suffixes)} file", got=str(path))
    require_free(path, folder=False)


def write_new_file(path: Path, data: bytes) -> None:
    """Write a file that was not there, whole or not at all. Raises `OutputExistsError`, `StorageError`."""
    with staged(path, folder=False) as temporary:
        temporary.write_bytes(data)
