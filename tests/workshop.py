"""Small things that many tests need: a teacher on disk, a run config, bytes of a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from synthkit.bank import Bank
from synthkit.config.parse import parse_config
from synthkit.models.build import build_model
from synthkit.models.card import ModelCard
from synthkit.models.weights import save_weights

MEAN, STD = [0.1307], [0.3081]


def save_teacher(
    folder: Path, arch: str = "lenet5_bn", *, classes: int = 10, channels: int = 1, side: int = 32, seed: int = 0
) -> Path:
    """A card and weights in `folder`: seeded, untrained, with lived-in BN statistics and clear opinions."""
    module = build_model(arch, num_classes=classes, in_channels=channels, image_size=side, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    module.train()
    with torch.no_grad():
        for _ in range(20):
            coarse = torch.randn(32, channels, 4, 4, generator=draw)
            module(torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear"))
        last = [m for m in module.modules() if isinstance(m, torch.nn.Linear)][-1]
        last.weight.mul_(8)
    save_weights(module.eval(), folder / "teacher.safetensors")
    card = ModelCard(
        arch=arch,
        num_classes=classes,
        input_size=(channels, side, side),
        mean=MEAN * channels,
        std=STD * channels,
        weights="teacher.safetensors",
        class_names=[f"class {i}" for i in range(classes)],
    )
    return card.save(folder / "card.yaml")


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` by its relative path; empty where there is nothing."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def shard_hashes(bank: str | Path) -> dict[int, str]:
    """sha256 of every committed shard, by its number, as the bank's records say."""
    return {s.index: s.sha256 for s in Bank(bank).sidecars}


def config_words(values: dict[str, Any]) -> list[str]:
    """Command-line words of flat config values; the key `method` (or `loss`) is the name."""
    return [
        word for key, value in values.items() for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
    ]


def config_of(command: str, values: dict[str, Any]) -> Any:
    """The parsed config of flat values, the way the command line makes it."""
    return parse_config(command, config_words(values))
