"""ZCA whitening of pixels, with the matrix at hand so that a bank can carry it.

    W = U diag((S + eps)^(-1/2)) U^T,  white = (x - mean) W,  x = white W^(-1) + mean

x: flattened images in [0, 1]; U, S: eigenvectors and eigenvalues of their covariance (divided by N - 1). Method card
`matching` 1.6; the same numbers as kornia's `ZCAWhitening(eps=0.1, compute_inv=True)`.

Differs from source: the covariance is summed in chunks in float64 and decomposed as a symmetric matrix, so that the
    memory does not grow with the number of images (kornia holds several float copies of the set); no autocast or TF32
    setting reaches fit or transform.
Cost: O(N D^2 + D^3) time, four matrices of D^2 float64 numbers; D = C H W.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from synthkit.errors import DataError

EPS = 0.1
_CHUNK = 2000


@dataclass(frozen=True)
class ZCA:
    """A fitted whitening.

    Attributes: `mean` (D,), `matrix` (D, D), `inverse` (D, D), float32; `eps` that was added to the eigenvalues. In a
    bank's transform of kind "zca" the arrays have these names, and `eps` is in its meta.
    """

    mean: Tensor
    matrix: Tensor
    inverse: Tensor
    eps: float = EPS

    @classmethod
    def fit(cls, images: Tensor, eps: float = EPS, device: torch.device | str | None = None) -> ZCA:
        """The whitening of `images` (N, C, H, W), uint8 or float in [0, 1]; computed on `device` or where they are.

        Raises:
            DataError: fewer than two images.
        """
        if images.ndim != 4 or len(images) < 2:
            raise DataError("zca: needs at least two images (N, C, H, W)", got=tuple(images.shape))
        device = images.device if device is None else torch.device(device)
        chunks = [images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK)]
        rows = (_unit(chunk.to(device), torch.float64).flatten(1) for chunk in chunks)
        mean = torch.stack([part.sum(0) for part in rows]).sum(0) / len(images)
        covariance = mean.new_zeros(len(mean), len(mean))
        for chunk in chunks:
            centred = _unit(chunk.to(device), torch.float64).flatten(1) - mean
            covariance.addmm_(centred.T, centred)
        values, vectors = torch.linalg.eigh(covariance / (len(images) - 1))
        root = (values.clamp(min=0.0) + eps).sqrt()  # rounding leaves tiny negative eigenvalues
        matrix, inverse = (vectors / root) @ vectors.T, (vectors * root) @ vectors.T
        return cls(mean.float(), matrix.float(), inverse.float(), eps)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], eps: float = EPS) -> ZCA:
        """The whitening that `arrays()` gave.

        Raises:
            DataError: an array is missing, of another shape, or not finite.
        """
        missing = [name for name in ("mean", "matrix", "inverse") if name not in arrays]
        if missing:
            raise DataError(f"zca: the transform has no array {missing[0]!r}", got=sorted(arrays))
        mean, matrix, inverse = (torch.from_numpy(arrays[n].astype(np.float32)) for n in ("mean", "matrix", "inverse"))
        size = mean.numel()
        if mean.ndim != 1 or matrix.shape != (size, size) or inverse.shape != (size, size):
            raise DataError(
                "zca: mean (D,), matrix (D, D) and inverse (D, D) do not fit each other",
                got=[tuple(mean.shape), tuple(matrix.shape), tuple(inverse.shape)],
            )
        if not all(bool(t.isfinite().all()) for t in (mean, matrix, inverse)):
            raise DataError("zca: the arrays of the transform are not finite")
        return cls(mean, matrix, inverse, eps)

    def arrays(self) -> dict[str, np.ndarray]:
        """{"mean", "matrix", "inverse"}, float32: what a bank stores as its transform."""
        return {name: getattr(self, name).cpu().numpy() for name in ("mean", "matrix", "inverse")}

    def to(self, device: torch.device | str) -> ZCA:
        """The same whitening on `device`."""
        return replace(self, **{name: getattr(self, name).to(device) for name in ("mean", "matrix", "inverse")})

    def whiten(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), uint8 or float in [0, 1], as whitened float32 (float64 stays float64)."""
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        return self._map(images, lambda part: (_unit(part, dtype) - self.mean.to(dtype)) @ self.matrix.to(dtype))

    def unwhiten(self, white: Tensor) -> Tensor:
        """The pixels behind whitened images (N, C, H, W); not clamped to [0, 1]."""
        dtype = torch.float64 if white.dtype == torch.float64 else torch.float32
        return self._map(white, lambda part: part.to(dtype) @ self.inverse.to(dtype) + self.mean.to(dtype))

    def _map(self, images: Tensor, rows: Callable[[Tensor], Tensor]) -> Tensor:
        if math.prod(images.shape[1:]) != self.mean.numel():
            raise DataError(f"zca: fitted on images of {self.mean.numel()} numbers", got=tuple(images.shape))
        with _full_precision(images.device.type):
            parts = [rows(images[i : i + _CHUNK].flatten(1)) for i in range(0, max(len(images), 1), _CHUNK)]
        return torch.cat(parts).view(images.shape)


@contextlib.contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """float32 products that are float32: neither autocast nor TF32, whose ten bits would show in whitened pixels."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def _unit(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels as `dtype` in [0, 1]."""
    return images.to(dtype).div_(255) if images.dtype == torch.uint8 else images.to(dtype)
