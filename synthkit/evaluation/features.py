"""Features of images from any network, or the pixels themselves: what the set metrics, dedup and the audit look at.

A distance means nothing without the space it was measured in. So every array of features travels with the name of its
source, and results print it; nothing here is called FID, which is a name for one network that is not this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from synthkit.bank.card import REAL_LABEL
from synthkit.errors import DataError, ModelError, NonFiniteError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from synthkit.bank import Bank
    from synthkit.data.real import RealData
    from synthkit.models.view import ModelView

Kind = Literal["teacher", "pixels"]
KINDS: tuple[Kind, ...] = ("teacher", "pixels")
PIXEL_SIDE = 32  # larger images are averaged down to this side before their pixels are compared
BATCH_BYTES = 8 << 20  # uint8 pixels per forward pass


@dataclass(frozen=True, kw_only=True)
class FeatureSource:
    """A map from images to vectors, with its name."""

    kind: Kind
    name: str
    """What results call it, e.g. `teacher lenet5_bn, penultimate layer`."""
    extract: Callable[[Tensor], Tensor]
    """uint8 (B,C,H,W) of `input_size` to float32 (B,D), on any device."""
    input_size: tuple[int, int, int]
    """(C,H,W) of the images; others are resized by `resize_images`."""
    device: torch.device
    unit: bool = False
    """Vectors are scaled to length 1, so that |a - b|^2 = 2 - 2 cos(a, b)."""
    about: dict[str, Any] | None = None
    """Facts for the result: architecture, sha256 of the weights, layer."""

    def normalised(self) -> FeatureSource:
        """The same source with vectors of length 1 (a vector of zeros stays as it is)."""
        return self if self.unit else replace(self, unit=True, name=f"{self.name}, scaled to length 1")

    def record(self) -> dict[str, Any]:
        """What a result file says about the space."""
        return {"kind": self.kind, "name": self.name, "unit_length": self.unit, **(self.about or {})}


@dataclass(frozen=True)
class Images:
    """Images that can be read by rows, whatever holds them."""

    name: str
    shape: tuple[int, int, int]
    rows: Callable[[np.ndarray], np.ndarray]
    """int64 (B,) to uint8 (B,C,H,W)."""
    count: int
    labels: np.ndarray | None = None
    """int64 (N,), where there are any."""
    real: bool = False
    """Whether these are, or contain, real images."""

    def __len__(self) -> int:
        return self.count

    @classmethod
    def of_bank(cls, bank: Bank) -> Images:
        """The images of a bank, read as they are asked for."""

        def rows(indices: np.ndarray) -> np.ndarray:
            images = bank.batch(indices, columns=("images",)).images
            assert images is not None  # the column was asked for
            return images

        labels = bank.column("labels").astype(np.int64) if bank.has("labels") and len(bank) else None
        real = bank.spec.contains_real
        name = f"{bank.path.resolve().name or 'bank'}{f' ({REAL_LABEL})' if real else ''}"
        return cls(name, bank.shape, rows, len(bank), labels, real)

    @classmethod
    def of_data(cls, data: RealData) -> Images:
        """The images of a data set in memory."""
        labels = data.labels.numpy()
        return cls(data.name, data.shape, lambda i: data.images.numpy()[i], len(data), labels, True)

    @classmethod
    def of_array(cls, images: np.ndarray, name: str = "images", *, real: bool = False) -> Images:
        """uint8 (N,C,H,W) in memory."""
        shape = (images.shape[1], images.shape[2], images.shape[3])
        return cls(name, shape, lambda i: images[i], len(images), None, real)

    @classmethod
    def noise(cls, count: int, shape: tuple[int, int, int], seed: int) -> Images:
        """Independent uniform pixels: the control that carries no knowledge. Row i depends on (seed, i) alone."""

        def rows(indices: np.ndarray) -> np.ndarray:
            made = [np.random.default_rng([seed, 0x6E6F, int(i)]).integers(0, 256, shape, np.uint8) for i in indices]
            return np.stack(made) if made else np.empty((0, *shape), np.uint8)

        return cls("noise", shape, rows, count)

    def batches(self, indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """uint8 (B,C,H,W) of `indices` in order."""
        for start in range(0, len(indices), size):
            yield self.rows(indices[start : start + size])


def sample(count: int, limit: int | None, seed: int) -> np.ndarray:
    """`limit` of the rows 0 to count - 1 without repetition, ascending (int64); all when there are no more."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, count]).permutation(count)[:limit])


def pixel_source(shape: tuple[int, int, int], device: str | torch.device = "cpu") -> FeatureSource:
    """Pixels in [0,1], scaled so that a distance is the root mean square difference of a pixel (0 to 1).

    Images with a side above 32 are first averaged down to 32 x 32 (antialiased): at full size distances would measure
    noise and the features would not fit into memory.
    """
    import torch

    channels, height, width = shape
    side = (channels, min(height, PIXEL_SIDE), min(width, PIXEL_SIDE))
    scale = 1.0 / (255.0 * math.sqrt(math.prod(side)))

    def extract(images: Tensor) -> Tensor:
        values = images.float()
        if side != shape:
            values = torch.nn.functional.interpolate(values, side[1:], mode="bilinear", antialias=True)
        return values.flatten(1) * scale

    name = "pixels" if side == shape else f"pixels averaged to {side[1]} x {side[2]}"
    return FeatureSource(kind="pixels", name=name, extract=extract, input_size=shape, device=torch.device(device),
                         about={"distance": "root mean square difference of a pixel in [0,1]"})  # fmt: skip


def view_source(view: ModelView, *, sha256: str | None = None, name: str | None = None) -> FeatureSource:
    """The penultimate features of a classifier, float32, as the network gives them (not scaled)."""
    from synthkit.evaluation.metrics import device_of, evaluating

    def extract(images: Tensor) -> Tensor:
        with evaluating(view):
            return view.features(images)[1].float()

    return FeatureSource(
        kind="teacher", name=f"teacher {name or view.name}, penultimate layer", extract=extract,
        input_size=view.input_size, device=device_of(view),
        about={"teacher": name or view.name, "sha256": sha256, "layer": "input of the last linear layer"},
    )  # fmt: skip


def teacher_source(bank: Bank, spec: str | None, device: str = "auto") -> tuple[FeatureSource, list[str]]:
    """The features of the teacher `spec`, by default the one that the bank remembers; and what had to be said.

    Raises:
        ModelError: none is known or it cannot be loaded; the hint says what works without one.
    """
    from synthkit.models.build import load_model
    from synthkit.models.view import TeacherView
    from synthkit.runtime import resolve_device

    remembered, said = bank.spec.teacher, []
    without = "name one with --teacher SPEC, or compare pixels with --features pixels"
    wanted = spec or remembered.get("spec")
    if not isinstance(wanted, str) or not wanted:
        raise ModelError(f"{bank.path}: the bank remembers no teacher", hint=without)
    try:
        loaded = load_model(wanted, weights="required")
    except ModelError as error:
        if spec is not None:
            raise
        raise ModelError(f"{bank.path}: its teacher {wanted!r} cannot be loaded ({error})", hint=without) from error
    if spec is None and remembered.get("sha256") not in (None, loaded.sha256):
        said.append(f"{wanted} is not the file that made this bank (its sha256 differs)")
    assumed = loaded.card.extra.get("assumed")
    said += [f"the teacher has no card; {assumed} is assumed"] if assumed else []
    view = TeacherView.from_loaded(loaded).to(resolve_device(device), channels_last=True)
    name = loaded.card.arch if "/" in wanted or "\\" in wanted else wanted
    source = view_source(view, sha256=loaded.sha256, name=name)
    if view.input_size != bank.shape:
        said.append(f"images were resized from {bank.shape} to {view.input_size} for the teacher")
    return source, said


def features(source: FeatureSource, images: Images, indices: np.ndarray | None = None) -> np.ndarray:
    """Features of the rows `indices` (all by default) as float32 (N,D), in that order.

    Images are read and passed through in blocks of 8 MiB; only the result is held.

    Raises:
        DataError: the result does not fit into memory. NonFiniteError: a feature is not finite.
        ModelError: the images cannot be brought to the network's input size.
    """
    import torch

    from synthkit.data.real import require_bytes, resize_images

    rows = np.arange(len(images)) if indices is None else indices
    if not len(rows):
        raise DataError(f"{images.name}: no images to take features of")
    size = max(1, BATCH_BYTES // max(1, math.prod(images.shape), math.prod(source.input_size)))
    size = max(1, min(size, 512))
    out: np.ndarray | None = None
    done = 0
    for block in images.batches(rows, size):
        values = torch.from_numpy(np.ascontiguousarray(block))
        if tuple(values.shape[1:]) != source.input_size:
            values = resize_images(values, source.input_size)
        # float32 also on a GPU, where convolutions would else run in TF32
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            found = source.extract(values.to(source.device))
            if source.unit:
                found = found / found.norm(dim=1, keepdim=True).clamp_min(1e-12)
            part = found.cpu().numpy()
        if not np.isfinite(part).all():
            raise NonFiniteError(f"{source.name}: a feature of {images.name} is not finite",
                                 hint="the network's weights or its normalisation are broken")  # fmt: skip
        if out is None:
            require_bytes(f"features of {len(rows):,} images ({part.shape[1]} numbers each)",
                          4 * len(rows) * part.shape[1])  # fmt: skip
            out = np.empty((len(rows), part.shape[1]), np.float32)
        out[done : done + len(part)] = part
        done += len(part)
    assert out is not None  # there is at least one block
    return out
