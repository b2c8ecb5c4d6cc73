"""`RealData`: a labelled image set held as one uint8 tensor, and the one resize rule of synthkit."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from synthkit.errors import DataError

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, what PIL's "L" uses
_CHUNK_BYTES = 64 << 20


def free_memory() -> int:
    """Bytes of RAM that this process may still take (the cgroup limit of a container counts)."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file():
        text = limit.read_text().strip()
        if text.isdigit():
            free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def require_memory(what: str, n: int, shape: Sequence[int]) -> None:
    """Refuse to load `n` uint8 images of `shape` when they do not fit into free RAM.

    Raises:
        DataError: the estimate is above 90 % of the free memory.
    """
    require_bytes(f"{what}: {n} images of {tuple(shape)}", math.prod([n, *shape]))


def require_bytes(what: str, need: int) -> None:
    """Refuse to take `need` bytes when they do not fit into free RAM.

    Raises:
        DataError: `need` is above 90 % of the free memory.
    """
    free = free_memory()
    if need > 0.9 * free:
        raise DataError(
            f"{what} need {need / 2**30:.2f} GiB, free memory is {free / 2**30:.2f} GiB",
            hint="give a smaller size=(C,H,W), or fewer files",
        )


def resize_images(images: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Images (N,C,H,W) uint8 as `size` = (C,H,W) uint8.

    Grey to RGB repeats the channel, RGB to grey is the ITU-R 601 luma. The image is scaled by antialiased bilinear
    interpolation so that it covers H x W and is then cropped in the centre, so the aspect ratio stays; a square image
    to a square size is a plain resize. Rounded to the nearest integer.

    Raises:
        DataError: the numbers of channels are not 1 or 3.
    """
    channels, height, width = size
    if images.shape[1:] == torch.Size(size):
        return images
    if min(size) < 1:
        raise DataError("size: (C, H, W) must be positive", got=size)
    if images.shape[1] != channels and (images.shape[1], channels) not in {(1, 3), (3, 1)}:
        raise DataError(
            f"size: cannot turn {images.shape[1]} channels into {channels}", hint="only 1 (grey) <-> 3 (RGB) is defined"
        )
    if images.shape[0] == 0:
        return images.new_empty((0, *size))
    scale = max(height / images.shape[2], width / images.shape[3])
    inner = (max(height, round(images.shape[2] * scale)), max(width, round(images.shape[3] * scale)))
    top, left = (inner[0] - height) // 2, (inner[1] - width) // 2
    step = max(1, _CHUNK_BYTES // (4 * max(1, images[0].numel(), 3 * inner[0] * inner[1])))
    out = images.new_empty((images.shape[0], *size))
    for start in range(0, images.shape[0], step):
        part = images[start : start + step].float()
        if part.shape[1] == 3 and channels == 1:
            part = (part * part.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        if part.shape[2:] != inner:
            part = F.interpolate(part, inner, mode="bilinear", antialias=True, align_corners=False)
        part = part[:, :, top : top + height, left : left + width].round_().clamp_(0, 255)
        out[start : start + step] = part.expand(-1, channels, -1, -1)
    return out


@dataclass(kw_only=True)
class RealData:
    """A labelled image set in memory.

    Attributes: `images` uint8 (N,C,H,W); `labels` int64 (N,), indices into `class_names`; `name` of the dataset;
    `root` where it was read; `split` that was really loaded ("all" when the source has no splits); `notes`, what the
    user should know about the loading; `label_source`: "real" unless it is a bank ("argmax", "target", ...);
    `stored_shape` (C,H,W) of the (first) image in the source, before any resize.
    """

    images: Tensor
    labels: Tensor
    class_names: list[str]
    name: str
    root: str
    split: str = "all"
    notes: tuple[str, ...] = ()
    label_source: str = "real"
    stored_shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError("images: must be uint8 (N,C,H,W)", got=f"{self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.shape != (self.images.shape[0],):
            raise DataError(
                f"{self.name}: {self.images.shape[0]} images but labels of shape {tuple(self.labels.shape)}",
                hint="there must be one label per image",
            )
        self.stored_shape = self.stored_shape or self.shape
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.num_classes:
            low, high = int(self.labels.min()), int(self.labels.max())
            raise DataError(
                f"{self.name}: labels run from {low} to {high}, but there are {self.num_classes} classes",
                hint="a label of -1 usually means an unlabelled split" if low < 0 else "check the class names",
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.images.shape[1], self.images.shape[2], self.images.shape[3])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def resized(self, size: tuple[int, int, int]) -> RealData:
        """The same data as (C,H,W) = `size`, by `resize_images`."""
        if self.shape == tuple(size):
            return self
        require_memory(self.name, len(self), size)
        return replace(self, images=resize_images(self.images, size))

    def subset(self, n: int, seed: int = 0) -> RealData:
        """A random sample of `n` images without repetition, in their old order; all of them when n >= len."""
        if n < 1:
            raise DataError("subset: n must be at least 1", got=n)
        if n >= len(self):
            return self
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self), generator=generator)[:n].sort().values
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def relabelled(self, mapping: Sequence[int], class_names: Sequence[str]) -> RealData:
        """Label i becomes `mapping[i]`, an index into the new `class_names` (see `check_classes`)."""
        table = torch.as_tensor(list(mapping), dtype=torch.int64)
        return replace(self, labels=table[self.labels], class_names=list(class_names))

    def to(self, device: torch.device | str) -> RealData:
        """Images and labels on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batches(self, batch_size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """(images uint8 (B,C,H,W), labels int64 (B,)) in order; the last one may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self.images[start : start + batch_size], self.labels[start : start + batch_size]


def decode_threads() -> int:
    """Threads for decoding images (PIL releases the interpreter lock while it decodes)."""
    return min(16, os.cpu_count() or 1)
