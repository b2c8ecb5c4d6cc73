"""DSA: gradient matching under differentiable siamese augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from synthkit.synthesis.matching.dc import DC, DCConfig


@dataclass(frozen=True, kw_only=True)
class DSAConfig(DCConfig):
    """DC's fields with DSA's defaults."""

    init: Literal["noise", "real"] = "real"
    """First images: normal noise, or random real images of their class."""
    strategy: str = "auto"
    """Siamese augmentation: families joined by _ (color_crop_cutout_flip_scale_rotate), none, or auto: all of them, but
    without the mirror for digits."""


class DSA(DC):
    """Gradient matching in which real and synthetic images of a class go through the same random transform.

    L = sum_c D(grad_theta l(A_w S_c), grad_theta l(A_w T_c)), w drawn per class and step, D as in DC; the network
    between two matching steps is trained with a transform of its own for every image.

    Shapes: as DC.
    Source: Zhao and Bilen, "Dataset condensation with differentiable siamese augmentation" (ICML 2021,
        arXiv 2102.08259); VICO-UoE/DatasetCondensation@53f63a6 main.py, utils.py.
    Differs from source: as DC; w is drawn once and applied to both batches, where the source seeds the global
        generator twice and relies on equal first draws.
    Cost: as DC, and two passes of one transform over each batch.
    """

    Config: ClassVar[type] = DSAConfig
    config: DSAConfig
