"""`teach`: a model with a card, exact resume, refusals that write nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from synthkit.config.schema import RuntimeConfig, TeachConfig
from synthkit.distillation import trainer as trainer_module
from synthkit.distillation.teach import channel_statistics, teach
from synthkit.errors import SynthkitError
from synthkit.models.card import ModelCard

CPU = RuntimeConfig(device="cpu")


def test_teach_writes_a_model(workshop):
    card = ModelCard.load(workshop.teacher / "card.yaml")
    assert card.arch == "lenet5_half" and card.input_size == (1, 32, 32) and card.num_classes == 4
    assert card.class_names == ["upper left", "upper right", "lower left", "lower right"]
    assert isinstance(card.accuracy, dict) and next(iter(card.accuracy.values())) >= 0.95
    with np.load(workshop.root / "data.npz") as data:
        values = data["images_train"] / 255.0
    assert card.mean == pytest.approx([values.mean()], abs=1e-4) and card.std == pytest.approx([values.std()], abs=1e-4)
    result = json.loads((workshop.teacher / "result.json").read_text())
    assert result["eval_images"] == 60 and result["steps"] == 36


def test_channel_statistics_by_hand():
    images = torch.tensor([[[[0, 255]], [[51, 51]]]], dtype=torch.uint8)
    assert channel_statistics(images) == ([0.5, 0.2], [0.5, 0.001])  # a constant channel is not divided by zero


def test_teach_resumes_exactly(workshop, tmp_path, monkeypatch):
    def run(out: str, **changes):
        values = {"arch": "lenet5_half_bn", "data": workshop.data, "epochs": 3, "batch_size": 32, "runtime": CPU}
        return teach(TeachConfig(**{**values, "out": str(tmp_path / out), "label_smoothing": 0.1, **changes}))

    whole = run("whole")
    original, calls = trainer_module.Trainer._train_step, iter(range(100))

    def dying(self):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_train_step", dying)
        with pytest.raises(KeyboardInterrupt):
            run("parts")
    again = run("parts", resume=True)
    assert (whole.path / "model.safetensors").read_bytes() == (again.path / "model.safetensors").read_bytes()
    assert again.metrics["top1"] == whole.metrics["top1"] == run("parts", resume=True).metrics["top1"]


def test_without_test_data_no_accuracy_is_claimed(workshop, tmp_path):
    with np.load(workshop.root / "data.npz") as data:
        np.savez(tmp_path / "all.npz", images=data["images_train"], labels=data["labels_train"])
    cfg = TeachConfig(
        arch="lenet5_half",
        data=f"npz:{tmp_path}/all.npz",
        epochs=1,
        batch_size=32,
        out=str(tmp_path / "t"),
        runtime=CPU,
    )
    result = teach(cfg)
    assert "top1" not in result.metrics and ModelCard.load(result.card).accuracy is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arch": "lenet55"}, "did you mean 'lenet5'"),
        ({"data": "mnst:x"}, "did you mean 'mnist'"),
        ({"batch_size": 500}, "192 training images"),
        ({"augment": "rotate"}, "not a known policy"),
        ({"lr": -1.0}, "lr must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"eval_data": "npz:nowhere.npz"}, "nowhere"),
    ],
)
def test_teach_refuses(workshop, tmp_path, changes, message):
    values = {"arch": "lenet5", "data": workshop.data, "out": str(tmp_path / "t"), "runtime": CPU}
    with pytest.raises(SynthkitError, match=message):
        teach(TeachConfig(**{**values, **changes}))
    assert not (tmp_path / "t").exists()
