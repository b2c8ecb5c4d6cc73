"""The .pt files of the dataset-distillation repositories, read back with torch.load(weights_only=True)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from synthkit.bank.export import export
from synthkit.errors import UsageError

from .exports import make, same, stored


def load(folder: Any, name: str) -> torch.Tensor:
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_images_and_class_numbers(tmp_path, channels):
    bank = make(tmp_path / "b", shape=(channels, 6, 5), rate=0.0125)
    rows, out = stored(bank), export(tmp_path / "b", "pt", tmp_path / "o")
    images = load(out, "images_best")
    assert images.dtype == torch.float32 and images.is_contiguous()
    mean, std = (np.array(v, np.float64)[:, None, None] for v in (bank.mean, bank.std))
    np.testing.assert_allclose(images.numpy(), (rows["images"] / 255 - mean) / std, rtol=0, atol=2e-6)
    back = np.rint((images.numpy() * std + mean) * 255)
    assert np.array_equal(back, rows["images"])  # no pixel is lost
    same(load(out, "labels_best").numpy(), rows["labels"], np.int64)
    rate = load(out, "lr_best")
    assert rate.shape == () and rate.item() == pytest.approx(0.0125)  # of the last shard, not 77 of the others


def test_pixels(tmp_path):
    rows = stored(make(tmp_path / "b"))
    images = load(export(tmp_path / "b", "pt", tmp_path / "o", space="pixels", suffix="100"), "images_100")
    same(images.numpy(), (rows["images"].astype(np.float32) / np.float32(255)))


def test_training_pixels_and_their_transform(tmp_path):
    bank = make(tmp_path / "b", f16=True, rate=0.5)
    out = export(bank, "pt", tmp_path / "o")
    same(load(out, "images_best").numpy(), stored(bank)["images_f16"], np.float32)
    transform = bank.transform()
    assert transform is not None
    for name, value in transform[0].items():
        same(load(out, "transform")[name].numpy(), value)
    record = json.loads((out / "synthkit.json").read_text(encoding="utf-8"))
    assert record["files"]["space"] == "training" and record["transform"]["kind"] == "zca"


def test_soft_labels(tmp_path):
    rows = stored(make(tmp_path / "b"))
    out = export(tmp_path / "b", "pt", tmp_path / "o", labels="soft", learning_rate=3)
    same(load(out, "labels_best").numpy(), rows["logits"], np.float32)
    assert load(out, "lr_best").item() == 3


def test_what_is_absent_is_told(tmp_path):
    rows = stored(make(tmp_path / "b", images=1, labels=False, logits=False))
    out = export(tmp_path / "b", "pt", tmp_path / "o", space="pixels")
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "images_best.pt", "synthkit.json"]
    assert load(out, "images_best").shape == rows["images"].shape
    notes = " ".join(json.loads((out / "synthkit.json").read_text(encoding="utf-8"))["notes"])
    assert "no step size" in notes and "no labels" in notes


@pytest.mark.parametrize(
    "options, message",
    [({"space": "training"}, "images_f16"), ({"space": "zca"}, "space"), ({"labels": "soft"}, "without logits"),
     ({"learning_rate": float("nan")}, "positive"), ({"learning_rate": -1}, "positive"),
     ({"suffix": "../x"}, "suffix")],
)  # fmt: skip
def test_impossible_wishes_are_refused(tmp_path, options, message):
    make(tmp_path / "b", logits=False)
    with pytest.raises(UsageError, match=message):
        export(tmp_path / "b", "pt", tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()
