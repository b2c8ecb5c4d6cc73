"""Images one by one: compressed (PNG, JPEG, ...) or as raw arrays. Sizes from their headers first, pixels in chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank.imports.source import ImportOptions, chunk_rows, refuse_link
from synthkit.errors import DataError

MAX_FILE = 256 << 20
"""An image file of more bytes is refused before it is read."""
_ALPHA = {2: "LA", 4: "RGBA"}  # how our exports store 2 and 4 channels in a PNG

Encoded = Path | bytes | np.ndarray


class Survey:
    """What the headers of all images say: how many there are, one common size, grey or colour."""

    def __init__(self, what: str, options: ImportOptions, own: dict[str, Any] | None = None):
        self.count = 0
        self._what, self._size = what, options.size
        self._channels: int | None = own["shape"][0] if own else None  # our own export knows, and has 2 or 4 perhaps
        self._first: tuple[int, int, int, str] | None = None
        self._grey = True

    def add(self, image: Encoded, label: str) -> None:
        """Look at the header of one image.

        Raises:
            DataError: not an image, too large, or of another size than the first while no --size is given.
        """
        channels, height, width = self._look(image, label)
        self.count += 1
        if self._first is None:
            self._first = (channels, height, width, label)
        elif self._size is None and (height, width) != self._first[1:3]:
            raise DataError(
                f"{self._what}: images differ in size: {self._first[3]} is {self._first[2]}x{self._first[1]}, "
                f"{label} is {width}x{height}",
                hint="give --size C H W, for example --size 3 64 64",
            )

    def _look(self, image: Encoded, label: str) -> tuple[int, int, int]:
        from synthkit.data.decode import MAX_PIXELS, is_grey, open_image

        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.dtype != np.uint8 or image.size > 4 * MAX_PIXELS or not image.size:
                raise DataError(f"{label}: must be a uint8 array (C, H, W)", got=f"{image.dtype} {image.shape}")
            if self._first is not None and image.shape[0] != self._first[0]:
                raise DataError(f"{label}: has {image.shape[0]} channels, the first image {self._first[0]}")
            self._grey = False
            self._channels = self._channels or image.shape[0]
            return image.shape[0], image.shape[1], image.shape[2]
        refuse_large(image, label)
        with open_image(image, label) as opened:
            self._grey = self._grey and is_grey(opened)
            mode = _ALPHA.get(self._channels or 0)
            if mode is not None and opened.mode != mode:
                raise DataError(f"{label}: is {opened.mode}, not {mode} as the export says")
            return 3, opened.height, opened.width

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image. Raises `DataError` when there were none."""
        if self._first is None:
            raise DataError(f"{self._what}: holds no images")
        if self._size is not None:
            return self._size
        return (self._channels or (1 if self._grey else 3), self._first[1], self._first[2])


def refuse_large(image: Path | bytes, label: str) -> None:
    """Raise `DataError` for a file above 256 MiB, a link, or something that is no file."""
    if isinstance(image, bytes):
        size = len(image)
    else:
        if not refuse_link(image).is_file():
            raise DataError(f"{label}: not a file")
        size = image.stat().st_size
    if size > MAX_FILE:
        raise DataError(f"{label}: {size:,} bytes for one image", hint=f"cap: {MAX_FILE:,} bytes")


def decode(images: Sequence[Encoded], labels: Sequence[str], shape: tuple[int, int, int], what: str) -> np.ndarray:
    """uint8 (N, *shape) of one chunk; an image of another size is scaled and cropped (`resize_images`)."""
    if isinstance(images[0], np.ndarray):
        return _arrays(images, shape)
    if shape[0] in _ALPHA:
        return _with_alpha(images, labels, shape)
    from synthkit.data.decode import decode_images

    compressed = [image for image in images if not isinstance(image, np.ndarray)]
    return decode_images(compressed, lambda i: labels[i], shape, what)[0].numpy()


def _arrays(images: Sequence[Any], shape: tuple[int, int, int]) -> np.ndarray:
    stacked = np.stack(images) if len({i.shape for i in images}) == 1 else None
    if stacked is not None and stacked.shape[1:] == shape:
        return stacked
    import torch

    from synthkit.data.real import resize_images

    parts = [resize_images(torch.from_numpy(np.ascontiguousarray(image))[None], shape) for image in images]
    return torch.cat(parts).numpy()


def _with_alpha(images: Sequence[Encoded], labels: Sequence[str], shape: tuple[int, int, int]) -> np.ndarray:
    from synthkit.data.decode import open_image

    found = []
    for image, label in zip(images, labels, strict=True):
        assert not isinstance(image, np.ndarray)
        try:
            with open_image(image, label) as opened:
                found.append(np.asarray(opened).reshape(*shape[1:], shape[0]).transpose(2, 0, 1))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{label}: cannot be decoded ({error})", hint="remove or repair the file") from error
    return np.stack(found)


def decode_rows(shape: tuple[int, int, int]) -> int:
    """Images per chunk."""
    return chunk_rows(2 * math.prod(shape))
