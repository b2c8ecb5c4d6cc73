"""`synthkit teach --arch unet`: what is learnt, what is written, and that a killed run ends the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline

from synthkit.bank import Bank
from synthkit.cli.main import main
from synthkit.config.schema import RuntimeConfig, TeachConfig
from synthkit.distillation import trainer as trainer_module
from synthkit.distillation.teach import teach
from synthkit.errors import ConfigError, OutputExistsError
from synthkit.synthesis.base import seeded_init
from synthkit.synthesis.diffusion import training
from synthkit.synthesis.diffusion.card import DiffusionCard
from synthkit.synthesis.diffusion.checkpoints import find

SMALL = {"arch": "unet", "steps": 12, "batch_size": 8, "unet_channels": (16, 16)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Two classes of 8 x 8 images: bright above, bright below."""
    draw = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = draw.integers(0, 60, (40, 8, 8), dtype=np.uint8)
    images[labels == 0, :4] += 190
    images[labels == 1, 4:] += 190
    path = tmp_path_factory.mktemp("data") / "halves.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
    return f"npz:{path}"


def run(data: str, out: Path, **changes: Any):
    runtime = RuntimeConfig(device="cpu", threads=torch.get_num_threads())
    return teach(TeachConfig(**{**SMALL, "data": data, "out": str(out), "runtime": runtime, **changes}))


# ---- the objective by hand -----------------------------------------------------------------------------------


def test_noised_images_and_targets():
    images, noise, abar = torch.rand(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([0.64, 0.0])
    noisy, epsilon = training.noised(images, noise, abar, "epsilon")
    torch.testing.assert_close(noisy[0], 0.8 * images[0] + 0.6 * noise[0])
    torch.testing.assert_close(noisy[1], noise[1])
    assert torch.equal(epsilon, noise)
    _, velocity = training.noised(images, noise, abar, "v_prediction")
    torch.testing.assert_close(velocity[0], 0.8 * noise[0] - 0.6 * images[0])


def test_the_average_starts_right_and_follows():
    """After the first update it is nearly the weights, not nearly the initialisation."""
    denoiser = training.Denoiser(seeded_init(lambda: torch.nn.Linear(3, 3), 0))
    start = denoiser.average.weight.clone()  # type: ignore[union-attr]
    with torch.no_grad():
        denoiser.network.weight.add_(1.0)  # type: ignore[union-attr]
    denoiser.follow(1, 0.99)
    torch.testing.assert_close(denoiser.average.weight, start + (1 - 2 / 11))  # type: ignore[union-attr]
    denoiser.follow(10_000, 0.9)
    torch.testing.assert_close(denoiser.average.weight, start + 1 - 0.9 * 2 / 11)  # type: ignore[union-attr]
    assert not any(parameter.requires_grad for parameter in denoiser.average.parameters())


def test_presets_by_image_size():
    def channels(side: int, colours: int = 1) -> tuple[int, ...]:
        found = training.unet_config(TeachConfig(arch="unet", data=""), (colours, side, side), 10)
        assert found["num_class_embeds"] == 11 and found["sample_size"] == side
        assert len(found["down_block_types"]) == len(found["block_out_channels"])
        return found["block_out_channels"]

    assert channels(16) == channels(12) == (32, 64)
    assert channels(28) == channels(32) == (16, 32, 64)
    assert channels(32, colours=3) == (32, 64, 128)
    assert channels(64, colours=3) == (32, 64, 128, 256)


# ---- a run ---------------------------------------------------------------------------------------------------


def test_teach_writes_a_pipeline_that_paints(data, tmp_path, capsys):
    words = ["teach", "--arch", "unet", "--data", data, "--steps", "70", "--batch_size", "16"]
    settings = ["--unet_channels", "16,16", "--unet_ema", "0.9", "--lr", "0.004"]
    assert main([*words, *settings, "--out", str(tmp_path / "unet"), "--device", "cpu"]) == 0
    assert "--method.model" in capsys.readouterr().out
    card = DiffusionCard.load(tmp_path / "unet")
    assert card is not None and card.image_size == (1, 8, 8) and card.null_class == 2 and len(card.class_names) == 2
    metrics = [json.loads(line) for line in (tmp_path / "unet" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["loss"] < 0.75 * metrics[0]["loss"] and metrics[-1]["test_loss"] < 1
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "unet")
    assert pipeline.unet.config.num_class_embeds == 3
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    words = ["synthesize", "--method", "diffusion", "--method.model", str(tmp_path / "unet"), "--images", "20"]
    assert main([*words, "--method.steps", "8", "--out", str(tmp_path / "bank"), "--device", "cpu"]) == 0
    bank = Bank(tmp_path / "bank")
    images = bank.column("images").astype(float)
    upper, lower = images[:, :, :4].mean((1, 2, 3)), images[:, :, 4:].mean((1, 2, 3))
    right = (upper > lower) == (bank.column("labels") == 0)
    assert right.mean() >= 0.9


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_killed_and_resumed_equals_uninterrupted(data, tmp_path, monkeypatch, prediction):
    whole = run(data, tmp_path / "whole", unet_prediction=prediction)
    original, calls = trainer_module.Trainer._train_step, iter(range(100))

    def dying(self):
        if next(calls) == 8:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_train_step", dying)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "parts", unet_prediction=prediction)
    again = run(data, tmp_path / "parts", unet_prediction=prediction, resume=True)
    file = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (whole.path / file).read_bytes() == (again.path / file).read_bytes()
    assert again.metrics["loss"] == pytest.approx(whole.metrics["loss"])
    assert not (again.path / "state").exists()
    assert run(data, tmp_path / "parts", unet_prediction=prediction, resume=True).metrics == again.metrics, "only read"
    spacing = {"v_prediction": "trailing", "epsilon": "leading"}[prediction]
    assert find(str(whole.path)).scheduler["timestep_spacing"] == spacing


def test_all_labels_are_dropped_or_none(data, tmp_path, monkeypatch):
    seen: list[int] = []
    original = training.Job._error

    def spying(self, network, images, labels, draw):
        seen.extend(labels.tolist())
        return original(self, network, images, labels, draw)

    monkeypatch.setattr(training.Job, "_error", spying)
    run(data, tmp_path / "none", steps=2, unet_label_drop=0.0)
    assert set(seen) == {0, 1} and DiffusionCard.load(tmp_path / "none").null_class is None  # type: ignore[union-attr]
    seen.clear()
    run(data, tmp_path / "most", steps=2, unet_label_drop=0.99)
    assert 2 in seen[:16]


# ---- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"unet_label_drop": 1.0}, "unet_label_drop"),
        ({"unet_ema": -0.1}, "unet_ema"),
        ({"unet_channels": (20, 16)}, "multiples of 8"),
        ({"unet_channels": (16, 8)}, "at least 16"),  # one channel a group: the class would be lost
        ({"unet_channels": (16, 16, 16, 16, 16)}, "multiple of 16"),
        ({"epochs": 2}, "exclude each other"),
        ({"lr": -1.0}, "lr must be"),
    ],
)
def test_refusals(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(data, tmp_path / "unet", **changes)
    assert not (tmp_path / "unet").exists()


def test_nothing_is_overwritten(data, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputExistsError):
        run(data, tmp_path)
