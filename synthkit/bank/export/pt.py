"""The (images, labels, lr) .pt files of the dataset-distillation repositories (MTT, TESLA, FTD, DATM, ...).

They read float32 images in the space that the network sees (normalised, or ZCA-whitened), labels as int64 class
numbers or float32 logits, and the learned step size as a scalar (methods/matching.md, 1.2 and 1.6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from synthkit.bank.export.base import Format
from synthkit.bank.export.torchfile import TensorPlan, write_torch
from synthkit.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PtOptions:
    """What the tensors hold."""

    space: Literal["auto", "normalised", "pixels", "training"] = "auto"
    """Numbers of the images: normalised with the bank's mean and std; plain pixels in [0, 1]; the training pixels that
    a distilled bank keeps (images_f16: normalised or ZCA space). auto: training where the bank has them, else
    normalised, as those repositories expect."""
    labels: Literal["hard", "soft"] = "hard"
    """Class numbers (int64), or the logits (float32, N x classes) as TESLA and DATM store them."""
    learning_rate: float | None = None
    """Step size to store; none takes the one that the bank learned."""
    suffix: str = "best"
    """Last part of the file names: images_SUFFIX.pt."""


class Pt(Format):
    """`images_best.pt`, `labels_best.pt` and `lr_best.pt`: plain tensors, loaded with `weights_only=True`."""

    Options = PtOptions
    carries = ("images", "labels", "images_f16", "logits")

    @property
    def space(self) -> str:
        """The space of the images: normalised, pixels or training."""
        if self.options.space != "auto":
            return self.options.space
        return "training" if self.source.has("images_f16") else "normalised"

    @property
    def columns(self) -> list[str]:
        """Columns that this export holds."""
        image = "images_f16" if self.space == "training" else "images"
        label = "logits" if self.options.labels == "soft" else "labels"
        return [c for c in self.source.columns if c in (image, label)]

    def check(self) -> None:
        """See `Format.check`."""
        options = self.options
        if not options.suffix.replace("_", "").replace("-", "").isalnum() or len(options.suffix) > 40:
            raise UsageError("export: suffix must be letters, digits, - and _", got=options.suffix)
        if self.space == "training" and not self.source.has("images_f16"):
            raise UsageError("export: space training", got="a bank without images_f16", hint="use normalised or pixels")
        if options.labels == "soft" and not self.source.has("logits"):
            raise UsageError("export: labels soft", got="a bank without logits", hint="use --labels hard")
        rate = options.learning_rate
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise UsageError("export: learning_rate must be a positive number", got=rate)
        if self._rate() is None:
            self.notes.append("the bank learned no step size: there is no lr file (give one with --learning-rate)")
        if options.labels == "hard" and not self.source.has("labels"):
            self.notes.append("the bank has no labels: there is no labels file")
        if self.space == "training":
            kind = self.source.spec.transform.get("kind", "no recorded transform")
            self.notes.append(f"the images are training pixels ({kind}), stored by the bank as float16"
                              + ("; transform.pt holds its arrays" if self.source.spec.transform else ""))  # fmt: skip
        elif self.space == "normalised":
            self.notes.append("the images are normalised: (pixels / 255 - mean) / std, with the bank's mean and std")

    def _rate(self) -> float | None:
        given = self.options.learning_rate
        return float(given) if given is not None else self.source.learning_rate()

    @property
    def _label(self) -> str | None:
        return next((c for c in self.columns if c in ("labels", "logits")), None)

    def passes(self) -> int:
        """See `Format.passes`."""
        return len(self.columns)

    def estimate(self) -> int:
        """See `Format.estimate`."""
        label = (4 * self.source.spec.num_classes if self._label == "logits" else 8) if self._label else 0
        return self.source.count * (4 * self.source.spec.image_bytes + label) + (1 << 16)

    def write(self, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
        """See `Format.write`."""
        source, suffix, label, rate = self.source, self.options.suffix, self._label, self._rate()
        image = "images_f16" if self.space == "training" else "images"
        pixels = (self._floats(piece) for piece in self._pieces(image, advance))
        shape = (source.count, *source.spec.shape)
        write_torch(folder / f"images_{suffix}.pt", TensorPlan(np.dtype("<f4"), shape, pixels))
        if label:
            dtype = np.dtype("<i8" if label == "labels" else "<f4")
            plan = TensorPlan(dtype, (source.count, *source.row_shape(label)), self._pieces(label, advance))
            write_torch(folder / f"labels_{suffix}.pt", plan)
        if rate is not None:
            write_torch(folder / f"lr_{suffix}.pt", TensorPlan.of(np.array(rate, np.float32)))
        found = source.bank.transform() if self.space == "training" else None
        if found:
            write_torch(folder / "transform.pt", {k: TensorPlan.of(v) for k, v in sorted(found[0].items())})
        tensors = sorted(entry.name for entry in folder.glob("*.pt"))
        return {"tensors": tensors, "space": self.space, "learning_rate": rate, "labels": label}

    def _pieces(self, column: str, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
        for _, piece in self.source.pieces([column]):
            yield piece[column]
            advance(len(piece[column]))

    def _floats(self, rows: np.ndarray) -> np.ndarray:
        """Stored pixels (n,C,H,W) as float32 in the space asked for."""
        if self.space == "training":
            return rows.astype(np.float32)
        pixels = rows.astype(np.float32) / np.float32(255)
        if self.space == "pixels":
            return pixels
        mean = np.array(self.source.spec.mean, np.float32)[:, None, None]
        return (pixels - mean) / np.array(self.source.spec.std, np.float32)[:, None, None]

    def usage(self) -> str:
        """See `Format.usage`."""
        lines = ["import torch", ""]
        names = ["images"] + (["labels"] if self._label else [])
        names += ["lr"] if self._rate() is not None else []
        lines += [f'{name} = torch.load("DIR/{name}_{self.options.suffix}.pt", weights_only=True)' for name in names]
        return "\n".join(lines)
