"""Images that are, pixel for pixel, a given image: also mirrored, or moved by up to two pixels.

A moved image keeps the middle of the original but for its border, whatever fills the border. So the middle of every
real image is looked up among all positions in the synthetic one. All positions are hashed in one matrix product with
whole-number weights that float64 holds exactly; every hit is then compared pixel by pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from synthkit.evaluation.features import Images

MAX_SHIFT = 2
WEIGHT_BYTES = 400 << 20
KINDS = ("exact", "shifted", "mirrored", "mirrored and shifted")


@dataclass(frozen=True, kw_only=True)
class Copies:
    """What was found; one entry per copied image of the first set, ascending."""

    rows: np.ndarray
    """int64 (M,): rows of the set that was searched."""
    sources: np.ndarray
    """int64 (M,): the lowest row of the real set that it equals."""
    kinds: np.ndarray
    """int64 (M,): index into `KINDS`; the simplest that fits."""
    blank: int
    """Images of one colour in the middle: they equal each other without being copies, and were left out."""
    shift: int
    """The largest shift that was looked for, in pixels."""

    def counts(self) -> dict[str, int]:
        """Number of copies of each kind."""
        return {name: int((self.kinds == i).sum()) for i, name in enumerate(KINDS)}


def find_copies(made: Images, real: Images, *, max_shift: int = MAX_SHIFT, mirror: bool = True) -> Copies:
    """The images of `made` that equal an image of `real`, as they are, mirrored left-right, or moved.

    A moved image counts when it equals the real one in the middle, a border of `max_shift` pixels left out (images
    below 12 pixels: 1, below 8: 0; above about a million values: 0). An image equal but for that border counts as
    shifted too.

    Cost: 50 products per pixel of `made`, one per pixel of `real`; memory: blocks, and 8 bytes per real image.
    """
    side = min(made.shape[1:])
    margin = min(max_shift, 2 if side >= 12 else 1 if side >= 8 else 0)
    if 8 * math.prod(made.shape) * 2 * (2 * margin + 1) ** 2 > WEIGHT_BYTES:
        margin = 0
    weights, views = _weights(made.shape, margin, mirror)
    table = _hashes(real, weights[:, :1])[:, 0]
    order = np.argsort(table, kind="stable")
    table = table[order]
    rows, sources, kinds, blank = [], [], [], 0
    size = _block(made)
    for start in range(0, len(made), size):
        images = made.rows(np.arange(start, min(start + size, len(made))))
        hashes = _product(images, weights)
        left = np.searchsorted(table, hashes)
        hits = table[np.minimum(left, len(table) - 1)] == hashes
        for row in np.flatnonzero(hits.any(axis=1)):
            middle = _view(images[row], 0, 0, margin, False)
            if middle.min() == middle.max():
                blank += 1
                continue
            found = _confirm(images[row], hashes[row], np.flatnonzero(hits[row]), views, table, order, real, margin)
            if found is not None:
                rows.append(start + int(row))
                sources.append(found[0])
                kinds.append(found[1])
    as_array = [np.array(values, np.int64) for values in (rows, sources, kinds)]
    return Copies(rows=as_array[0], sources=as_array[1], kinds=as_array[2], blank=blank, shift=margin)


View = tuple[int, int, bool]


def _weights(shape: tuple[int, int, int], margin: int, mirror: bool) -> tuple[np.ndarray, list[View]]:
    """(pixels, views) float64 of whole numbers: column j hashes what view j sees; and the views, simplest first."""
    channels, height, width = shape
    inner = (channels, height - 2 * margin, width - 2 * margin)
    largest = min(2**31, 2**53 // (256 * math.prod(inner)))  # so that every sum is a whole number below 2^53
    pattern = np.random.default_rng(0x636F7079).integers(1, largest, inner).astype(np.float64)
    moves = [(dy, dx) for dy in range(-margin, margin + 1) for dx in range(-margin, margin + 1)]
    moves.sort(key=lambda m: (abs(m[0]) + abs(m[1]), m))
    views = [(dy, dx, flip) for flip in ((False, True) if mirror else (False,)) for dy, dx in moves]
    table = np.zeros((len(views), *shape))
    for plane, (dy, dx, flip) in zip(table, views, strict=True):
        _view(plane, dy, dx, margin, flip)[...] = pattern
    return table.reshape(len(views), -1).T, views


def _view(image: np.ndarray, dy: int, dx: int, margin: int, flip: bool) -> np.ndarray:
    """The middle of an image (C,H,W), mirrored first, moved by (dy, dx)."""
    image = image[:, :, ::-1] if flip else image
    height, width = image.shape[1:]
    return image[:, margin + dy : height - margin + dy, margin + dx : width - margin + dx]


def _block(images: Images) -> int:
    return max(1, (32 << 20) // (8 * math.prod(images.shape)))


def _product(images: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64) @ weights


def _hashes(images: Images, weights: np.ndarray) -> np.ndarray:
    size = _block(images)
    return np.concatenate([_product(block, weights) for block in images.batches(np.arange(len(images)), size)])


def _confirm(
    image: np.ndarray, hashes: np.ndarray, hit: np.ndarray, views: list[View], table: np.ndarray, order: np.ndarray,
    real: Images, margin: int,
) -> tuple[int, int] | None:  # fmt: skip
    """(row of the real image, kind) of the simplest view that truly equals a real image."""
    best: tuple[int, int] | None = None
    for number in hit:
        dy, dx, flip = views[number]
        seen = _view(image, dy, dx, margin, flip)
        low, high = np.searchsorted(table, hashes[number], "left"), np.searchsorted(table, hashes[number], "right")
        for row in np.sort(order[low:high])[:1000]:
            other = real.rows(np.array([row]))[0]
            if not np.array_equal(seen, _view(other, 0, 0, margin, False)):
                continue
            whole = np.array_equal(image[:, :, ::-1] if flip else image, other)
            kind = (2 if flip else 0) + (0 if whole else 1)
            if best is None or kind < best[1]:
                best = (int(row), kind)
            if whole:
                break
        if best is not None and best[1] == 0:
            break
    return best
