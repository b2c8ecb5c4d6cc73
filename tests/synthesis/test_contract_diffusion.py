"""diffusion under the contract of all methods, guided by the teacher, on a UNet made for the test."""

from __future__ import annotations

import pytest
import torch
from contract import SynthesizerContract

from synthkit.synthesis.curriculum import Curriculum

from .tiny_diffusion import save_unet


class TestDiffusion(SynthesizerContract):
    name = "diffusion"
    inner = {"predict": (7, 5, 2)}

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def models_on_disk(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("models")
        shared = {"steps": 2, "cfg": 2.0, "sampler": "ddpm"}
        cls.options = {**shared, "model": save_unet(folder / "colour"), "batch_size": 8, "diversity": 0.1}
        cls.engine_options = {**shared, "model": save_unet(folder / "grey", channels=1), "batch_size": 4}

    def test_labels_are_the_intended_classes(self, finished):
        labels = torch.cat([batch.labels for batch in finished[1]])
        assert labels.tolist() == [row % 10 for row in range(self.images)]

    def test_difficulty_is_the_teachers_cross_entropy(self, finished):
        for batch in finished[1]:
            expected = torch.nn.functional.cross_entropy(batch.logits, batch.labels, reduction="none")
            torch.testing.assert_close(batch.difficulty, expected)

    def test_easy2hard_lowers_guidance_and_raises_the_adversary(self):
        method = self.build(settings={"guidance": 0.2, "hard_guidance": 0.25})
        scales = method.guidance_scale(0, self.images)
        assert scales[0] == pytest.approx(0.2) and scales[-1] == pytest.approx(0.05)
        torch.testing.assert_close(scales, torch.linspace(0.2, 0.05, self.images))
        torch.testing.assert_close(method.guidance_scale(9, 5), scales[9:14])
        flat = self.build(settings={"guidance": 0.2}, curriculum=Curriculum.named("none"))
        assert flat.guidance_scale(0, self.images).tolist() == pytest.approx([0.2] * self.images)
