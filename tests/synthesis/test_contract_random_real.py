"""random_real: the tests of every method, and what it alone promises: real, balanced, without repetition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import SynthesizerContract

from synthkit.data.real import RealData
from synthkit.errors import DataError, RequirementError

from .tiny import task


def real_data(per_class: int = 12, size: int = 8, channels: int = 3, classes: int = 10) -> RealData:
    draw = torch.Generator().manual_seed(5)
    n = per_class * classes
    images = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=draw)
    labels = torch.arange(classes).repeat(per_class)[torch.randperm(n, generator=draw)]
    names = [f"class {i}" for i in range(classes)]
    return RealData(images=images, labels=labels, class_names=names, name="made", root="nowhere")


def save_npz(folder: Path, **changes: Any) -> str:
    data = real_data(**{"channels": 1, "size": 32, **changes})
    images = data.images.numpy().transpose(0, 2, 3, 1)
    np.savez(folder / "real.npz", images=images.squeeze(-1) if images.shape[-1] == 1 else images,
             labels=data.labels.numpy())  # fmt: skip
    return f"npz:{folder / 'real.npz'}"


class TestRandomReal(SynthesizerContract):
    name = "random_real"
    options = {"batch_size": 8}
    engine_options = {"batch_size": 4}
    of_task = {"data": real_data()}

    @pytest.fixture(autouse=True)
    def data_on_disk(self, tmp_path_factory, monkeypatch):
        spec = save_npz(tmp_path_factory.mktemp("data"))
        monkeypatch.setattr(type(self), "of_config", {"data": spec})

    def test_every_image_is_real_and_none_comes_twice(self, finished):
        data, (_, batches) = self.of_task["data"], finished
        known = {image.numpy().tobytes(): int(label) for image, label in zip(data.images, data.labels, strict=True)}
        made = [image.numpy().tobytes() for batch in batches for image in batch.images]
        labels = torch.cat([batch.labels for batch in batches]).tolist()
        assert len(set(made)) == len(made) == self.images
        assert [known[image] for image in made] == labels

    def test_every_stretch_is_balanced(self, finished):
        labels = torch.cat([batch.labels for batch in finished[1]])
        for start in range(0, self.images - 10):
            assert sorted(labels[start : start + 10].tolist()) == list(range(10))

    def test_a_small_class_is_named(self):
        with pytest.raises(DataError, match="class 'class .' has 3 images, 4 are asked for.*lower --ipc"):
            self.build(data=real_data(per_class=3), images=31)
        assert sum(len(b.images) for b in self.run(data=real_data(per_class=3), images=30)) == 30

    def test_needs_data(self):
        with pytest.raises(RequirementError, match="--data"):
            self.method(self.config(), task(images=5))
