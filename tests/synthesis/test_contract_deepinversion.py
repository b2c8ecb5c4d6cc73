"""deepinversion: the tests of every method, in the ways that change how a batch is made."""

from __future__ import annotations

from contract import SynthesizerContract

SMALL = {"iterations": 4, "batch_size": 8, "bn": 1.0}


class TestDeepInversion(SynthesizerContract):
    name = "deepinversion"
    options = {**SMALL, "flip": True, "crop": 0.3, "clamp": True, "schedule": "cosine", "warmup": 1}
    engine_options = {**SMALL, "batch_size": 4, "iterations": 2}
    falling = ("loss", "ce", "bn")
    longer = {"iterations": 60, "batch_size": 64, "crop": None, "flip": False, "jitter": 0}


class TestOneViewPerImage(SynthesizerContract):
    name = "deepinversion"
    options = {**SMALL, "coarse_iterations": 2, "per_image": True, "flip": True, "crop": 0.5}
    engine_options = {**SMALL, "batch_size": 4, "iterations": 2, "per_image": True}
