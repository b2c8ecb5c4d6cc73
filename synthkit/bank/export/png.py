"""PNG, losslessly, in threads.

Measured (PIL 13, 2 cores, level 1 / 3 / 6): 2,000 CIFAR images at 15.4 k / 14.7 k / 13.1 k images/s and 72 / 72 / 71 %
of their size; 40 images of 224x224 at 640 / 417 / 140 images/s and 44 / 42 / 41 %. Hence level 1.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator

import numpy as np

from synthkit.bank.export.base import FILE_BLOCK, need_range
from synthkit.bank.export.source import Source
from synthkit.errors import UsageError

LEVEL = 1
MAX_BYTES = 1 << 30  # of one image before PNG; Arrow and others hold less than 2 GiB in one piece
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_PIECE_BYTES, _PIECE_ROWS = 1 << 20, 256  # of one task of a thread
_SAMPLES, _SAMPLE_BYTES = 32, 32 << 20
_FLIGHT_BYTES = 512 << 20  # of pixels that all threads hold together
_PIL_LIMIT = 178_956_970  # pixels of one image, above which PIL refuses to open it


def check_png(source: Source, level: int, format: str, other: str) -> list[str]:
    """Refuse what PNG cannot hold; returns notes.

    Args:
        format: name of the format, for messages. other: what to use instead.
    """
    need_range("compress_level", level, 0, 9)
    source.require_small_rows(["images"], MAX_BYTES, format)
    channels = source.spec.shape[0]
    if channels not in MODES:
        raise UsageError(f"export: {format} stores PNG, which has 1 to 4 channels", got=channels, hint=f"use {other}")
    notes = []
    if channels in (2, 4):
        notes.append(f"the last of {channels} channels is stored as PNG's alpha; readers that convert to RGB drop it")
    if math.prod(source.spec.shape[1:]) > _PIL_LIMIT:
        notes.append(
            "PIL, and what reads with it, refuses images of so many pixels unless its MAX_IMAGE_PIXELS is raised"
        )
    if source.has("images_f16"):
        notes.append("PNG shows the images; the pixels to train on (images_f16) are in npz, safetensors and pt alone")
    return notes


def encode_png(image: np.ndarray, level: int = LEVEL) -> bytes:
    """One image as PNG; (C,H,W) uint8, 1 to 4 channels. PIL gives the GIL back while it compresses."""
    from PIL import Image

    channels, height, width = image.shape
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
    stream = io.BytesIO()
    Image.frombytes(MODES[channels], (width, height), pixels.tobytes()).save(stream, "PNG", compress_level=level)
    return stream.getvalue()


def png_rows(source: Source) -> int:
    """Images per task such that a task is about 1 MiB of pixels."""
    return max(1, min(_PIECE_ROWS, _PIECE_BYTES // source.spec.image_bytes))


def png_bytes(source: Source, level: int, *, per_file: bool = False) -> int:
    """Estimated bytes of all images as PNG, from a sample of 32, with 10 % to spare.

    Args:
        per_file: every image is a file of its own, which takes whole blocks.
    """
    count = max(1, min(_SAMPLES, _SAMPLE_BYTES // source.spec.image_bytes))
    sizes = [len(encode_png(image, level)) for image in source.sample("images", count)]
    if per_file:
        sizes = [-(-size // FILE_BLOCK) * FILE_BLOCK for size in sizes]
    return int(sum(sizes) / len(sizes) * source.count * 1.1) + FILE_BLOCK


def png_workers(source: Source, workers: int) -> int:
    """Threads that may work at a time: fewer for huge images, so that memory stays bounded."""
    return max(1, min(workers, _FLIGHT_BYTES // (3 * png_rows(source) * source.spec.image_bytes)))


Piece = tuple[int, dict[str, np.ndarray]]


def png_pieces(source: Source, columns: list[str]) -> Iterator[Piece]:
    """Pieces of a size that suits a thread, with the images first."""
    return source.pieces(["images", *(c for c in columns if c != "images")], png_rows(source))
