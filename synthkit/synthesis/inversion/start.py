"""Where inversion starts: noise, real images or mosaics of them. Every row is a pure function of (seed, row)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthkit.errors import DataError, RequirementError
from synthkit.lazy import F, np, torch
from synthkit.synthesis.inversion.views import crop_boxes

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.synthesis.base import Task

CROP_AREA = 0.08
"""Smallest area share of a mosaic's crops (as in RDED)."""


def noise_start(task: Task, start: int, labels: Tensor, std: float) -> Tensor:
    """N(0, std^2) pixels (B, C, H, W) for the rows from `start` on: already in normalised space."""
    shape = (len(labels), *task.image_spec.shape)
    drawn = task.numpy_rng("start", start).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(drawn).mul_(std)


class RealStart:
    """Starts from real pixels: row r of class c takes image r // K of c's shuffled images, round and round."""

    def __init__(self, task: Task, mosaic: int | None):
        if task.data is None:
            raise RequirementError("method.init real and mosaic need real images", hint="give them: --data cifar10:DIR")
        self.task, self.data, self.mosaic = task, task.data, mosaic
        labels = task.data.labels.cpu().numpy()
        self.of_class = []
        for label, name in enumerate(task.data.class_names):
            found = np.flatnonzero(labels == label)
            if not len(found):
                raise DataError(f"method.init: class {name!r} has no image in the data to start from")
            self.of_class.append(task.numpy_rng("start", label).permutation(found))

    def __call__(self, start: int, labels: Tensor) -> Tensor:
        """[0, 1] pixels (B, C, H, W) of the classes `labels` (B,) for the rows from `start` on."""
        classes = len(self.of_class)
        if self.mosaic is None:
            return self._images([(int(y), (start + i) // classes) for i, y in enumerate(labels.tolist())])
        tiles = self.mosaic**2
        images = self._images(
            [
                (int(y), (start + i) // classes * tiles + tile)
                for i, y in enumerate(labels.tolist())
                for tile in range(tiles)
            ]
        )
        return self._mosaics(images, start, len(labels))

    def _images(self, places: list[tuple[int, int]]) -> Tensor:
        rows = [self.of_class[label][turn % len(self.of_class[label])] for label, turn in places]
        return self.data.images[torch.from_numpy(np.array(rows))].float() / 255

    def _mosaics(self, images: Tensor, start: int, count: int) -> Tensor:
        """Tile random crops of f x f images into one; the first tiles are a pixel larger where f does not divide."""
        assert self.mosaic is not None  # asked by __call__
        height, width = images.shape[2:]
        boxes = crop_boxes(self.task.numpy_rng("mosaic", start), len(images), (height, width), CROP_AREA)
        rows, columns = (np.array_split(np.arange(side), self.mosaic) for side in (height, width))
        out = torch.empty(count, *images.shape[1:])
        for k, (image, (top, left, h, w)) in enumerate(zip(images, boxes.tolist(), strict=True)):
            row, column = rows[k % self.mosaic**2 // self.mosaic], columns[k % self.mosaic]
            crop = image[None, :, top : top + h, left : left + w]
            tile = F.interpolate(crop, (len(row), len(column)), mode="bilinear", antialias=True)
            out[k // self.mosaic**2, :, row[0] : row[-1] + 1, column[0] : column[-1] + 1] = tile[0]
        return out
