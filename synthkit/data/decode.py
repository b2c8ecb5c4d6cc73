"""Decoding of compressed images (PNG, JPEG, ...) into one uint8 tensor, with threads and without any cache on disk."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from synthkit.data.real import decode_threads, require_memory, resize_images
from synthkit.errors import DataError

MAX_PIXELS = 64 << 20
"""An image that claims more pixels is refused before it is decoded (decompression bombs)."""
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
# What PIL's readers raise for a broken or hostile file; UnidentifiedImageError is an OSError.
_BROKEN = (
    OSError, Image.DecompressionBombError, SyntaxError, ValueError, EOFError, struct.error, LookupError, TypeError,
    ArithmeticError, AttributeError, RuntimeError, MemoryError,
)  # fmt: skip
_DEEP = {"I", "F", "I;16", "I;16L", "I;16B"}

Source = Path | bytes


class _ColourFound(Exception):
    """A colour image among images that looked grey so far; decoding starts again with three channels."""


def open_image(source: Source, label: str) -> Image.Image:
    """The image behind `source`, its header read and checked, no pixel decoded; close it (`with`).

    Raises:
        DataError: unreadable, of more than 64 Mi pixels, or deeper than 8 bit.
    """
    try:
        image = Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=_FORMATS)
    except _BROKEN as error:
        raise DataError(f"{label}: not a readable image ({error})", hint="remove or repair the file") from error
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{label}: {image.width}x{image.height} pixels are above the limit of {MAX_PIXELS}")
    if image.mode in _DEEP:
        raise DataError(f"{label}: pixels of mode {image.mode} (16 or 32 bit)", hint="convert the files to 8 bit")
    return image


def _pixels(image: Image.Image, channels: int, label: str) -> Tensor:
    """uint8 (1,C,H,W)."""
    try:
        array = np.array(image.convert("L" if channels == 1 else "RGB"))  # a copy: PIL's buffer is read-only
    except _BROKEN as error:
        raise DataError(f"{label}: cannot be decoded ({error})", hint="remove or repair the file") from error
    return torch.from_numpy(array).reshape(1, image.height, image.width, channels).permute(0, 3, 1, 2)


def is_grey(image: Image.Image) -> bool:
    """Whether an opened image has no colour by its mode."""
    return image.mode in {"L", "1", "LA"}


def decode_images(
    sources: Sequence[Source], label: Callable[[int], str], size: tuple[int, int, int] | None, what: str
) -> tuple[Tensor, tuple[int, int, int]]:
    """Every source decoded: uint8 (N,C,H,W), and the (C,H,W) of the first one as stored.

    Args:
        sources: paths, or the bytes of image files.
        label: names source i in messages.
        size: (C,H,W) of the result by `resize_images`; none keeps the own size, which must then be the same for all,
            and one channel only when every image is grey.
        what: names the whole in messages.

    Raises:
        DataError: an image is unreadable, too large or of another size, or the whole does not fit into memory.
    """
    if not sources:
        raise DataError(f"{what}: no images")
    with open_image(sources[0], label(0)) as first:
        stored = (1 if is_grey(first) else 3, first.height, first.width)
    if size is not None:
        return _decode(sources, label, size, True, what), stored
    try:
        return _decode(sources, label, stored, False, what), stored
    except _ColourFound:
        stored = (3, *stored[1:])
        return _decode(sources, label, stored, False, what), stored


def _decode(
    sources: Sequence[Source], label: Callable[[int], str], shape: tuple[int, int, int], resize: bool, what: str
) -> Tensor:
    require_memory(what, len(sources), shape)
    out = torch.empty((len(sources), *shape), dtype=torch.uint8)

    def fill(span: range) -> None:
        for i in span:
            with open_image(sources[i], label(i)) as image:
                if not resize and (image.height, image.width) != shape[1:]:
                    raise DataError(
                        f"{what}: images differ in size: {label(0)} is {shape[2]}x{shape[1]}, "
                        f"{label(i)} is {image.width}x{image.height}",
                        hint="give size=(C,H,W), for example the model's input size",
                    )
                if not resize and shape[0] == 1 and not is_grey(image):
                    raise _ColourFound
                # an RGB image that shall become grey goes through our luma, as arrays do
                channels = 3 if resize and not is_grey(image) else shape[0]
                pixels = _pixels(image, channels, label(i))
            out[i] = (resize_images(pixels, shape) if resize else pixels)[0]

    spans = [range(start, min(start + 256, len(sources))) for start in range(0, len(sources), 256)]
    if len(spans) == 1:
        fill(spans[0])
        return out
    with ThreadPoolExecutor(decode_threads()) as pool:
        for future in [pool.submit(fill, span) for span in spans]:
            future.result()
    return out
