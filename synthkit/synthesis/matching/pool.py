"""Real images of a task on its device, and the space in which learnt pixels live."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthkit.errors import DataError
from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.data.real import RealData
    from synthkit.data.zca import ZCA
    from synthkit.synthesis.base import ImageSpec


class Space:
    """Training space: pixels in [0, 1] normalised per channel, or whitened by `zca`."""

    def __init__(self, spec: ImageSpec, device: torch.device, zca: ZCA | None = None):
        self.zca = zca
        self.mean = torch.tensor(spec.mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(spec.std, device=device).view(1, -1, 1, 1)

    def enter(self, images: Tensor) -> Tensor:
        """uint8 images (N, C, H, W) as training pixels, float32 of the same shape."""
        return self.zca.whiten(images) if self.zca else (images.float() / 255 - self.mean) / self.std

    def leave(self, pixels: Tensor) -> Tensor:
        """Training pixels as image values, which may leave [0, 1]."""
        return self.zca.unwhiten(pixels) if self.zca else pixels * self.std + self.mean


class RealPool:
    """All real images on the device, drawn class by class or batch by batch."""

    def __init__(self, data: RealData, space: Space, device: torch.device):
        self.space, self.data = space, data
        self.labels = data.labels.to(device)
        # whitening costs a matrix product per image, so that is done once; normalising is done as batches are taken
        self._stored = space.enter(data.images.to(device)) if space.zca else data.images.to(device)
        order = data.labels.cpu()
        self.rows = [(order == label).nonzero()[:, 0] for label in range(data.num_classes)]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def bytes(self) -> int:
        """What the images take on the device."""
        return self._stored.numel() * self._stored.element_size()

    def take(self, rows: Tensor) -> Tensor:
        """Training pixels (n, C, H, W) of these rows."""
        found = self._stored[rows.to(self.labels.device)]
        return found if self.space.zca else self.space.enter(found)

    def draw(self, label: int, count: int, generator: torch.Generator) -> Tensor:
        """Rows of up to `count` different images of class `label` (all of them where there are fewer)."""
        rows = self.rows[label]
        if not len(rows):
            raise DataError(f"the data has no image of class {self.data.class_names[label]!r}")
        return rows[torch.randperm(len(rows), generator=generator)[:count]]

    def balanced(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """One row per label of `labels` (N,), without repetition.

        Raises:
            DataError: a class has too few images; the message names it.
        """
        chosen = torch.empty_like(labels)
        for label in labels.unique().tolist():
            places = (labels == label).nonzero()[:, 0]
            rows = self.draw(label, len(places), generator)
            if len(rows) < len(places):
                raise DataError(
                    f"class {self.data.class_names[label]!r} has {len(rows)} images, {len(places)} are to start from",
                    hint="lower --ipc or --images, or start from noise (--method.init noise)",
                )
            chosen[places] = rows
        return chosen
