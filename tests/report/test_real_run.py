"""A report of what distill really writes: its keys must not drift away from those the report reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthkit.report.page import build

from .makers import charts, tree, words


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from synthkit.bank.make import bank_from_arrays
    from synthkit.config.schema import DistillConfig, RuntimeConfig
    from synthkit.distillation.distill import distill
    from synthkit.models.build import build_model
    from synthkit.models.card import ModelCard
    from synthkit.models.weights import save_weights

    root = tmp_path_factory.mktemp("real")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (96, 1, 32, 32), dtype=np.uint8), rng.integers(0, 4, 96)
    data = root / "data.npz"
    np.savez(data, images_train=images, labels_train=labels, images_test=images[:40], labels_test=labels[:40])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = build_model("lenet5_half", num_classes=4, in_channels=1)
    save_weights(teacher, root / "teacher.safetensors")
    common = {"num_classes": 4, "mean": [0.5], "std": [0.5]}
    ModelCard(arch="lenet5_half", input_size=(1, 32, 32), weights="teacher.safetensors", **common).save(
        root / "teacher.yaml"
    )
    bank_from_arrays(root / "bank", images, labels, images_per_shard=48, **common)
    distill(DistillConfig(
        bank=str(root / "bank"), student="lenet5_half", teacher=str(root / "teacher.yaml"), out=str(root / "run"),
        epochs=3, batch_size=16, seeds=2, control="noise", eval_data=f"npz:{data}", eval_every=1, holdout=0.25,
        runtime=RuntimeConfig(device="cpu", threads=1),
    ))  # fmt: skip
    return root / "run"


def test_every_part_is_filled(run):
    page = build(run)
    text = words(tree(page))
    assert "lenet5_half, trained from synthetic images, reaches " in text and "over 2 seeds; its teacher " in text
    assert "the control, trained on noise" in text
    assert {
        "Training loss", "Top-1 on real test data", "Agreement while training", "Agreement on held-out images",
        "KL on held-out images", "Learning rate", "Accuracy of each class",
    } <= set(charts(page))  # fmt: skip
    for word in (
        "top-1",
        "retention",
        "calibration error",
        "images held out",
        "peak memory",
        "plan.optimizer",
        "torch",
    ):
        assert word in text, word
    assert "trained on 72 images of the bank" in text and "24 of the bank, kept out of training" in text


def test_a_single_seed_and_the_control_alone(run):
    assert "one seed only" in words(tree(build(run / "seed1")))
    assert "trained on noise" in words(tree(build(run / "control")))
