"""noise: the tests of every method, and what it alone promises."""

from __future__ import annotations

import torch
from contract import SynthesizerContract

from synthkit.synthesis.base import ImageSpec

from .tiny import task


class TestNoise(SynthesizerContract):
    name = "noise"
    options = {"batch_size": 8}
    engine_options = {"batch_size": 4}

    def test_pixels_are_uniform(self):
        pixels = torch.cat([batch.images for batch in self.run(images=500)])
        counts = torch.bincount(pixels.flatten().long(), minlength=256).float()
        expected = pixels.numel() / 256
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < 350, "255 degrees of freedom: 350 is beyond the 99.99th percentile"
        flat = pixels.flatten(1).float()
        correlation = torch.corrcoef(torch.stack([flat[:, 0], flat[:, 1]]))[0, 1]
        assert abs(float(correlation)) < 0.2

    def test_without_a_teacher_there_are_no_labels(self):
        spec = ImageSpec(shape=(1, 4, 5), num_classes=3, mean=[0.5], std=[0.5])
        method = self.method(self.config(), task(teachers=[], images=9, spec=spec))
        batches = list(method.generate())
        assert [tuple(b.images.shape) for b in batches] == [(8, 1, 4, 5), (1, 1, 4, 5)]
        assert all(batch.labels is None and batch.logits is None for batch in batches)
