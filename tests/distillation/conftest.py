"""A tiny teacher and bank, made once: structured images, a teacher with clear opinions about them."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

CLASSES, SHAPE, COUNT = 4, (1, 32, 32), 192


def make_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (N, 1, 32, 32) of four classes (a bright quadrant each, on noise) and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    images = rng.integers(0, 90, (count, *SHAPE), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = 16 * (label // 2), 16 * (label % 2)
        image[0, top : top + 16, left : left + 16] += np.uint8(120)
    return images, labels.astype(np.int64)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Paths of a teacher (a run directory), banks with and without extras, and labelled data."""
    from synthkit.bank.make import bank_from_arrays
    from synthkit.config.schema import RuntimeConfig, TeachConfig
    from synthkit.distillation.teach import teach
    from synthkit.models.build import load_model
    from synthkit.models.view import TeacherView

    root: Path = tmp_path_factory.mktemp("workshop")
    names = ["upper left", "upper right", "lower left", "lower right"]
    parts = {}
    for split, count, seed in (("train", COUNT, 1), ("test", 60, 2)):
        parts[f"images_{split}"], parts[f"labels_{split}"] = make_images(count, seed)
    np.savez(root / "data.npz", class_names=np.array(names), **parts)
    teach(
        TeachConfig(
            arch="lenet5_half",
            data=f"npz:{root}/data.npz",
            epochs=6,
            batch_size=32,
            lr=0.02,
            augment="none",
            out=str(root / "teacher"),
            runtime=RuntimeConfig(device="cpu"),
        )
    )
    view = TeacherView.from_loaded(load_model(str(root / "teacher")))
    images, _ = make_images(COUNT, 3)
    with torch.no_grad():
        logits = view(torch.from_numpy(images))
    common = {"num_classes": CLASSES, "mean": view.mean, "std": view.std, "class_names": names, "images_per_shard": 64}
    difficulty = (-logits.max(dim=1).values).numpy()
    bank_from_arrays(
        root / "bank",
        images,
        logits.argmax(dim=1).numpy(),
        columns={"logits": logits.half().numpy(), "difficulty": difficulty},
        label_kind="argmax",
        teacher={"spec": str(root / "teacher"), "arch": "lenet5_half"},
        **common,
    )
    bank_from_arrays(root / "bare", images, **common)
    bank_from_arrays(root / "real", images, logits.argmax(dim=1).numpy(), label_kind="real", **common)
    return SimpleNamespace(
        root=root,
        bank=root / "bank",
        bare=root / "bare",
        real=root / "real",
        teacher=root / "teacher",
        data=f"npz:{root}/data.npz",
        images=images,
        logits=logits,
        difficulty=difficulty,
    )


@pytest.fixture
def generator_bank(workshop, tmp_path):
    """The bank with four snapshots; only those of the last half (shards 2 and on of 3: index 1, 2) may be drawn."""
    from synthkit.bank import Bank, BankWriter
    from synthkit.models.generators import build_generator

    path = tmp_path / "bank"
    shutil.copytree(workshop.bank, path)
    spec = {"name": "cud", "latent_dim": 6, "image_size": 32, "channels": 1, "depth": 2, "width": 4}
    writer = BankWriter.open(path)
    for index in range(3):
        state = build_generator(**spec, seed=index).half().state_dict()
        writer.write_generator(index, {k: v.numpy() for k, v in state.items()}, {"generator": spec, "step": index})
    return Bank(path)
