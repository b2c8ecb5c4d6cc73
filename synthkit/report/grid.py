"""A picture of a bank: one row per class, columns from easy to hard. PIL only."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from synthkit.bank.card import REAL_LABEL, method_of
from synthkit.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    from synthkit.bank.reader import Bank

    Font = FreeTypeFont | ImageFont

CELL = 64  # pixels that an image takes on the page, about
GAP, ROW_GAP, MARGIN = 3, 7, 22
INK, FAINT, EMPTY = (32, 36, 44), (126, 132, 144), (240, 241, 244)
PLAIN = (206, 209, 216)
LOOKED_AT, BLOCKS = 1 << 17, 512
RAMP = ((38, 140, 132), (240, 180, 62), (206, 62, 54))  # easy, middle, hard


def grid_png(
    bank: Bank, per_class: int = 10, *, max_classes: int = 20, classes: Sequence[int] | None = None,
    title: str | None = None,
) -> bytes:  # fmt: skip
    """The class grid of `bank` as PNG bytes.

    Each row shows one class; its images are the mid-points of `per_class` equal parts of the class in order of stored
    difficulty (of the step that made them where there is no difficulty, else of storage).

    Args:
        max_classes: rows at most; from more classes evenly spaced ones are shown.
        classes: the rows to show instead.

    Raises:
        UsageError: a number is out of range. BankError: the bank is damaged or empty.
    """
    stream = io.BytesIO()
    image = grid_image(bank, per_class, max_classes=max_classes, classes=classes, title=title)
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def grid_html(bank: Bank, per_class: int = 10, *, max_classes: int = 20) -> str:
    """The grid as an HTML figure with the picture inside (for notebooks and reports)."""
    caption = html.escape(repr(bank))
    if not len(bank):
        return f"<pre>{caption}</pre>"
    data = base64.b64encode(grid_png(bank, per_class, max_classes=max_classes)).decode()
    image = f'<img alt="{caption}" style="max-width:100%" src="data:image/png;base64,{data}">'
    return f"<figure style='margin:0'>{image}<figcaption><code>{caption}</code></figcaption></figure>"


def grid_image(
    bank: Bank, per_class: int = 10, *, max_classes: int = 20, classes: Sequence[int] | None = None,
    title: str | None = None,
) -> Image:  # fmt: skip
    """The class grid as a PIL image; arguments as `grid_png`."""
    from PIL import Image, ImageDraw

    if not 1 <= per_class <= 100:
        raise UsageError("show: per_class must be 1 to 100", got=per_class)
    if max_classes < 1:
        raise UsageError("show: max_classes must be at least 1", got=max_classes)
    labelled = bank.has("labels") and bank.spec.label_kind != "none"
    counts = class_counts(bank) if labelled else np.array([len(bank)])
    rows = _rows(counts, classes, max_classes) if labelled else [0]
    picked, keys, meaning = _pick_rows(bank, rows, counts, per_class, labelled)
    per_class = max([1] + [len(p) for p in picked])  # no column stays empty

    big, small = font(15), font(12)
    names = [_middle(bank.class_names[r] if labelled else "all images", big, 150) for r in rows]
    left = MARGIN + int(max(*(big.getlength(n) for n in names), small.getlength("0,000,000"))) + 14
    width_cell, height_cell = _cell(bank.shape)
    top = MARGIN + 102
    size = (
        left + per_class * (width_cell + GAP) - GAP + MARGIN,
        top + len(rows) * (height_cell + ROW_GAP) + MARGIN + 10,
    )
    subtitle = _subtitle(bank, len(rows), labelled)
    size = (max(size[0], 480, min(720, int(small.getlength(subtitle)) + 2 * MARGIN + 1)), size[1])
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)

    heading = _title(bank) if title is None else title + (f" ({REAL_LABEL})" if bank.spec.contains_real else "")
    draw.text((MARGIN, MARGIN - 4), _shorten(heading, font(18), size[0] - 2 * MARGIN), INK, font(18))
    draw.text((MARGIN, MARGIN + 20), _shorten(subtitle, small, size[0] - 2 * MARGIN), FAINT, small)
    columns = [[k for key in keys for k in key[j : j + 1]] for j in range(per_class)]
    _scale(draw, left, top, width_cell, columns, meaning)
    for number, (row, chosen, name) in enumerate(zip(rows, picked, names, strict=True)):
        y = top + number * (height_cell + ROW_GAP)
        draw.text((MARGIN, y + height_cell / 2 - 9), name, INK, big, anchor="lm")
        count = f"{counts[row]:,}"
        draw.text((MARGIN, y + height_cell / 2 + 10), count, FAINT, small, anchor="lm")
        for column in range(per_class):
            x = left + column * (width_cell + GAP)
            if column >= len(chosen):
                draw.rectangle((x, y, x + width_cell - 1, y + height_cell - 1), fill=EMPTY)
        if len(chosen):
            for column, pixels in enumerate(bank.batch(chosen, columns=("images",)).images):  # type: ignore[arg-type]
                page.paste(picture(pixels, (width_cell, height_cell)), (left + column * (width_cell + GAP), y))
    return page


def class_counts(bank: Bank) -> np.ndarray:
    """Images per class, from the records of the shards where they tell."""
    histograms = [s.raw.get("label_histogram") for s in bank.sidecars]
    if all(h is not None for h in histograms):
        return np.sum(np.array(histograms, dtype=np.int64).reshape(-1, bank.num_classes), axis=0)
    return np.bincount(bank.column("labels"), minlength=bank.num_classes)


def looked_at(count: int) -> np.ndarray:
    """The rows that a picture is chosen from: all, or of more than 131,072 as many in blocks spread evenly."""
    if count <= LOOKED_AT:
        return np.arange(count)
    size = LOOKED_AT // BLOCKS
    starts = np.linspace(0, count - size, BLOCKS).astype(np.int64)
    return (starts[:, None] + np.arange(size)).reshape(-1)


def _pick_rows(
    bank: Bank, rows: list[int], counts: np.ndarray, per_class: int, labelled: bool
) -> tuple[list[np.ndarray], list[np.ndarray], str]:
    """Images of each class in `rows`, what they are ordered by, and its name; large banks are looked at in part."""
    seen = looked_at(len(bank))
    found = bank.batch(seen, columns=("labels",)).labels if labelled else None
    labels = np.zeros(len(seen), np.int32) if found is None else found
    if labelled and len(seen) < len(bank):
        present = np.bincount(labels, minlength=bank.num_classes)
        if any(counts[row] and present[row] < min(counts[row], per_class) for row in rows):
            seen = np.arange(len(bank))  # a rare class hides between the blocks
            labels = bank.column("labels")
    key, meaning = order_key(bank, seen)
    chosen = [pick(labels, key, row, per_class) for row in rows]
    return [seen[c] for c in chosen], [key[c] for c in chosen], meaning


def order_key(bank: Bank, rows: np.ndarray | None = None) -> tuple[np.ndarray, str]:
    """What a grid orders by, one number per image, and its name: difficulty, else step, else stored order.

    Args:
        rows: the images asked for; none takes all.
    """
    rows = np.arange(len(bank)) if rows is None else rows
    for column, name in (("difficulty", "difficulty"), ("origin_step", "step")):
        if bank.has(column):
            return np.asarray(getattr(bank.batch(rows, columns=(column,)), column), np.float64), name
    return rows.astype(np.float64), "stored order"


def pick(labels: np.ndarray, key: np.ndarray, label: int, count: int) -> np.ndarray:
    """Indices of up to `count` images of class `label`, spread evenly over the order of `key`, lowest first."""
    members = np.flatnonzero(labels == label)
    members = members[np.argsort(key[members], kind="stable")]
    if len(members) <= count:
        return members
    return members[((np.arange(count) + 0.5) / count * len(members)).astype(np.int64)]


def _rows(counts: np.ndarray, classes: Sequence[int] | None, max_classes: int) -> list[int]:
    if classes is not None:
        for label in classes:
            if not 0 <= label < len(counts):
                raise UsageError(f"show: the bank has classes 0 to {len(counts) - 1}", got=label)
        if not classes:
            raise UsageError("show: name at least one class", got=list(classes))
        return list(classes)
    if len(counts) <= max_classes:
        return list(range(len(counts)))
    full = np.flatnonzero(counts).tolist() or [0]  # with more classes than rows, no row is spent on an empty class
    shown = min(max_classes, len(full))
    return [full[i * len(full) // shown] for i in range(shown)]


def _cell(shape: tuple[int, int, int]) -> tuple[int, int]:
    """Width and height of an image on the page: a whole multiple for small images, a reduction for large ones."""
    _, height, width = shape
    side = max(height, width)
    if side <= CELL * 1.5:
        times = max(1, round(CELL / side))
        return width * times, height * times
    return max(1, width * 96 // side), max(1, height * 96 // side)


def picture(pixels: np.ndarray, size: tuple[int, int]) -> Image:
    """uint8 pixels (C, H, W) as an RGB picture of `size` (W, H); enlarged without smoothing."""
    from PIL import Image

    channels = pixels.shape[0]
    if channels in (1, 2):
        picture = Image.fromarray(np.ascontiguousarray(pixels[0]), mode=None)
    else:
        picture = Image.fromarray(np.ascontiguousarray(pixels[:3].transpose(1, 2, 0)))
    larger = size[0] >= picture.width
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


def _scale(draw: ImageDraw, left: int, top: int, cell: int, columns: list[list[float]], meaning: str) -> None:
    """The bar from easy to hard with the median of each column below it."""
    small = font(12)
    right = left + len(columns) * (cell + GAP) - GAP
    y = top - 34
    words = ("easy", "hard") if meaning == "difficulty" else ("first", "last")
    draw.text((left, y - 7), words[0], FAINT, small, anchor="ls")
    draw.text((right, y - 7), words[1], FAINT, small, anchor="rs")
    if right - left > 230:
        what = meaning if meaning == "stored order" else f"{meaning} (median of the column)"
        draw.text(((left + right) / 2, y - 7), what, FAINT, small, anchor="ms")
    if meaning == "stored order":  # no colours: nothing here is easy or hard
        draw.rectangle((left, y + 2, right - 1, y + 3), fill=PLAIN)
        return
    for x in range(left, right):
        draw.line((x, y, x, y + 5), fill=_ramp((x - left) / max(1, right - left - 1)))
    every = max(1, -(-44 // (cell + GAP)))
    for number in range(0, len(columns), every):
        if columns[number]:
            x = left + number * (cell + GAP) + cell / 2
            draw.text((x, y + 20), _short_number(float(np.median(columns[number]))), INK, small, anchor="mm")


def _ramp(share: float) -> tuple[int, int, int]:
    low, high = (RAMP[0], RAMP[1]) if share < 0.5 else (RAMP[1], RAMP[2])
    part = share * 2 if share < 0.5 else share * 2 - 1
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _short_number(value: float) -> str:
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(value) < 1e12:
            return f"{value / unit:.3g}{name}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _title(bank: Bank) -> str:
    real = f" ({REAL_LABEL})" if bank.spec.contains_real else ""
    return f"{bank.path.resolve().name or 'bank'}{real}"


def _subtitle(bank: Bank, rows: int, labelled: bool) -> str:
    parts = [f"{len(bank):,} image{'' if len(bank) == 1 else 's'}"]
    parts += [] if bank.complete else [f"unfinished ({len(bank):,} of {bank.spec.images:,})"]
    parts.append(" x ".join(str(v) for v in bank.shape))
    if labelled:
        parts.append(
            f"{bank.num_classes} class{'' if bank.num_classes == 1 else 'es'}"
            + (f", {rows} shown" if rows < bank.num_classes else "")
        )
    if len(bank) > LOOKED_AT:
        parts.append(f"{LOOKED_AT:,} of them looked at")
    teacher = bank.spec.teacher.get("name") or bank.spec.teacher.get("arch")
    parts.append(f"method {method_of(bank.spec)}")
    parts += [f"teacher {teacher}"] if teacher else []
    return "  ·  ".join(parts)


def font(size: int) -> Font:
    """The font of our pictures at `size` pixels."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _shorten(text: str, font: Font, width: int) -> str:
    text = "".join(c if c.isprintable() else " " for c in text)[:200]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _middle(text: str, font: Font, width: int) -> str:
    """`text` shortened in its middle: names of classes often differ only at the end."""
    text = "".join(c if c.isprintable() else " " for c in text)[:200]
    if font.getlength(text) <= width:
        return text
    kept = len(text) - 1
    while kept > 2 and font.getlength(f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}") > width:
        kept -= 1
    return f"{text[: kept - kept // 2].rstrip()}…{text[len(text) - kept // 2 :].lstrip()}"
