"""adi: the tests of every method, and what it alone promises: a student that learns between its rounds."""

from __future__ import annotations

import pytest
import torch
from contract import SynthesizerContract

from synthkit.errors import ConfigError
from synthkit.synthesis.inversion import adi

SMALL = {"iterations": 3, "batch_size": 8, "bn": 1.0, "plain": 2, "student_steps": 3, "student_batch": 8}


class TestADI(SynthesizerContract):
    name = "adi"
    options = {**SMALL, "student": "convnet_d1_w8_bn", "flip": True, "memory": 20}
    engine_options = {**SMALL, "batch_size": 6, "iterations": 2, "student_steps": 2, "student": "lenet5_half"}
    arrivals = (3, 2, 2)
    safe_points = (3, 2, 2)
    longer = {"iterations": 5, "batch_size": 12, "plain": 1, "student_steps": 40, "student_lr": 0.02, "T": 4.0}

    @pytest.fixture(autouse=True)
    def many_safe_points(self, monkeypatch):
        monkeypatch.setattr(adi, "SAFE", 1)

    def test_loss_falls(self):
        records: list[dict[str, float]] = []
        list(self.build(settings=self.longer, log=records.append).generate())
        learnt = [record["kd"] for record in records if "kd" in record]
        assert len(learnt) == 4 and learnt[-1] < learnt[0]

    def test_the_plain_images_are_deepinversions(self):
        """Without competition adi is deepinversion, batch for batch."""
        from synthkit.synthesis.inversion.deepinversion import DeepInversion, DeepInversionConfig

        from .tiny import task

        shared = {"iterations": 3, "batch_size": 8, "bn": 1.0, "flip": True}
        plain = DeepInversion(DeepInversionConfig(**shared), task(images=self.images)).generate()
        mine = [batch for batch in self.build(settings={"plain": 3}).generate() if batch is not None]
        same = [torch.equal(a.images, b.images) for a, b in zip(plain, mine, strict=True)]
        assert same == [True, True, True, False, False]

    def test_rounds(self):
        method = self.build(settings={"plain": 2, "round": 2}, images=8 * 7)
        assert [method.learns_after(i) for i in range(7)] == [False, True, False, True, False, True, True]
        assert self.build(settings={"plain": 9}, images=16).learns_after(1)

    def test_the_memory_is_bounded_and_keeps_the_newest(self):
        method = self.build(settings={"memory": 10})
        batches = [batch for batch in method.generate() if batch is not None]
        newest = torch.cat([batch.images for batch in batches])[-10:]
        assert torch.equal(method.learner.memory, newest)

    def test_competition_finds_what_the_student_does_not_know(self):
        """Against the student as it stands, the competing images differ more from it than plain ones do."""
        gaps = {}
        for weight in (0.0, 30.0):
            settings = {"competition": weight, "iterations": 60, "batch_size": 32, "plain": 1, "bn": 0.1, "jitter": 0}
            method = self.build(settings=settings, images=64)
            batches = [batch for batch in method.generate() if batch is not None]
            gaps[weight] = float(batches[1].difficulty.mean())
        assert gaps[30.0] > 1.2 * gaps[0.0]

    @pytest.mark.parametrize(
        "settings", [{"plain": 0}, {"student_steps": 0}, {"T": 0}, {"augment": "mix"}, {"memory": 0}]
    )
    def test_wrong_settings(self, settings):
        with pytest.raises(ConfigError):
            self.config(**settings)
