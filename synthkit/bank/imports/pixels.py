"""What the numbers of an image array mean: axes, range, normalisation; and their way to uint8 (N,C,H,W)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from synthkit.bank.imports.columns import Column
from synthkit.bank.imports.source import ImportOptions, Values, chunk_rows
from synthkit.errors import DataError

GRID = 1e-4
"""Pixels in [0,1] at most this far from k/255 came from uint8: the uint8 image is exact, no float copy is kept."""


def axes_of(shape: tuple[int, ...], options: ImportOptions, what: str) -> str:
    """ "nchw", "nhwc" or "nhw".

    Raises:
        DataError: no image shape, or both (or neither) of axis 1 and 3 could be the channels.
    """
    if len(shape) == 3:
        return "nhw"
    if len(shape) != 4:
        raise DataError(f"{what}: images must have 3 or 4 axes", got=shape,
                        hint="reshape flat images to (N, C, H, W)")  # fmt: skip
    if options.layout != "auto":
        return options.layout
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first and last and shape[1:] != (1, 1, 1):
        raise DataError(f"{what}: of shape {shape} both axis 1 and axis 3 could be the channels",
                        hint="give --layout nchw or nhwc")  # fmt: skip
    if not first and not last:
        raise DataError(f"{what}: neither axis 1 nor axis 3 of {shape} has 1 or 3 channels",
                        hint="give --layout nchw or nhwc if it is an image array all the same")  # fmt: skip
    return "nchw" if first else "nhwc"


def to_nchw(array: np.ndarray, axes: str) -> np.ndarray:
    """(N,C,H,W), a view where possible."""
    if axes == "nhw":
        return array[:, None]
    return array.transpose(0, 3, 1, 2) if axes == "nhwc" else array


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """How stored numbers become pixels."""

    values: Values
    """"byte": 0 to 255; "unit": 0 to 1; "pixels": about that; "normalised": (pixel - mean) / std; "whitened": ZCA."""
    exact: bool
    """uint8 holds all there is; else the numbers are kept as images_f16 as well."""
    mean: list[float]
    std: list[float]


@dataclass
class _Extent:
    low: float = math.inf
    high: float = -math.inf
    whole: bool = True  # all numbers are whole
    grid: bool = True  # all of x * 255 are whole, about
    normal_grid: bool = True  # the same after undoing mean and std


def meaning_of(column: Column, axes: str, options: ImportOptions, what: str,
               mean: list[float] | None, std: list[float] | None) -> Meaning:  # fmt: skip
    """Look at every number once and decide what they are.

    Raises:
        DataError: not finite, no numbers, or outside [0,1] and [0,255] without mean and std.
    """
    kind = column.dtype.kind
    plain = Meaning(values="byte", exact=True, mean=[], std=[])
    if column.dtype == np.uint8:
        return plain
    if kind == "b":
        return Meaning(values="unit", exact=True, mean=[], std=[])
    if kind not in "iuf":
        raise DataError(f"{what}: images must be numbers", got=str(column.dtype))
    extent = _extent(column, axes, what, mean, std)
    if kind in "iu" or options.values == "byte":
        if not 0 <= extent.low <= extent.high <= 255:
            raise DataError(f"{what}: byte pixels must be 0 to 255", got=f"{extent.low:g} to {extent.high:g}")
        if not extent.whole:
            raise DataError(f"{what}: byte pixels must be whole numbers", hint="give --values unit or normalised")
        return plain
    values = options.values
    if values == "auto":
        unit, byte = 0 <= extent.low <= extent.high <= 1, 0 <= extent.low <= extent.high <= 255 and extent.whole
        values = "unit" if unit else "byte" if byte else "normalised"
    if values == "byte":
        return plain
    if values == "whitened":
        return Meaning(values=values, exact=False, mean=[], std=[])
    if values in ("unit", "pixels"):
        if values == "unit" and not 0 <= extent.low <= extent.high <= 1:
            raise DataError(f"{what}: --values unit needs 0 to 1", got=f"{extent.low:g} to {extent.high:g}")
        return Meaning(values=values, exact=extent.grid and column.dtype.itemsize >= 4, mean=[], std=[])
    if mean is None or std is None:
        raise DataError(f"{what}: the images run from {extent.low:.3g} to {extent.high:.3g}: they are normalised",
                        hint="give the --mean and --std they were normalised with, or --teacher")  # fmt: skip
    if max(abs(extent.low), abs(extent.high)) > 65504:
        raise DataError(f"{what}: pixels beyond the range of fp16", got=f"{extent.low:g} to {extent.high:g}")
    return Meaning(values="normalised", exact=extent.normal_grid and column.dtype.itemsize >= 4, mean=mean, std=std)


def _extent(column: Column, axes: str, what: str, mean: list[float] | None, std: list[float] | None) -> _Extent:
    found = _Extent()
    done = 0
    for part in column.chunks(chunk_rows(8 * math.prod(column.shape[1:]))):
        if not len(part):
            continue
        low, high = float(part.min()), float(part.max())
        if not math.isfinite(low) or not math.isfinite(high):  # one NaN makes both NaN
            raise DataError(f"{what}: a pixel is not finite", got=f"rows {done} to {done + len(part) - 1}")
        found.low, found.high = min(found.low, low), max(found.high, high)
        found.whole = found.whole and (part.dtype.kind in "iu" or bool((part == np.rint(part)).all()))
        if part.dtype.kind == "f":
            found.grid = found.grid and _on_grid(part)
            if mean is not None and std is not None and found.normal_grid:
                found.normal_grid = _on_grid(_undo(to_nchw(part, axes), mean, std))
        done += len(part)
    if not done:
        raise DataError(f"{what}: holds no images")
    return found


def _on_grid(pixels: np.ndarray) -> bool:
    scaled = pixels.astype(np.float32) * np.float32(255)
    rounded = np.rint(scaled)
    near = np.abs(scaled - rounded) <= 255 * GRID
    return bool((near & (rounded >= 0) & (rounded <= 255)).all())


def _undo(images: np.ndarray, mean: list[float], std: list[float]) -> np.ndarray:
    """(N,C,H,W) float32 pixels of normalised images."""
    scale, shift = (np.asarray(v, np.float32).reshape(1, -1, 1, 1) for v in (std, mean))
    return images.astype(np.float32) * scale + shift


def to_uint8(images: np.ndarray, meaning: Meaning) -> np.ndarray:
    """uint8 (N,C,H,W) of images (N,C,H,W) in their stored numbers: rounded, and cut to [0, 255]."""
    if meaning.values == "byte":
        return images.astype(np.uint8, copy=False)
    if meaning.values == "normalised":
        pixels = _undo(images, meaning.mean, meaning.std)
    else:
        pixels = images.astype(np.float32)
        if meaning.values == "whitened":  # without the inverse: three standard deviations fill the range, for the eye
            pixels = pixels / 6 + np.float32(0.5)
    return np.rint(np.clip(pixels, 0, 1) * np.float32(255)).astype(np.uint8)
