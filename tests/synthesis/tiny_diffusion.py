"""Tiny random diffusion models, written to disk as diffusers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)

from synthkit.synthesis.base import seeded_init
from synthkit.synthesis.diffusion.card import DiffusionCard
from synthkit.synthesis.diffusion.training import save_pipeline, scheduler_for


def unet(size: int = 8, channels: int = 3, classes: int | None = 11) -> UNet2DModel:
    """A UNet of two levels with random weights."""
    return seeded_init(
        lambda: UNet2DModel(
            sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1,
            block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=4, attention_head_dim=8, num_class_embeds=classes, add_attention=False,
        ), 0,
    )  # fmt: skip


def save_unet(folder: Path, *, prediction: Any = "v_prediction", channels: int = 3, names: list[str] | None = None):
    """A class-conditional pixel model as `synthkit teach --arch unet` writes it; returns its folder as text."""
    card = DiffusionCard(
        image_size=(channels, 8, 8),
        class_names=names or [str(i) for i in range(10)],
        mean=[0.4] * channels,
        std=[0.3] * channels,
        null_class=10,
        source="made for a test",
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_pipeline(folder, unet(channels=channels), scheduler_for(prediction), card)
    return str(folder)


def save_unconditional(folder: Path) -> str:
    """An unconditional pixel model without a card."""
    DDPMPipeline(unet=unet(classes=None), scheduler=DDIMScheduler(beta_schedule="linear")).save_pretrained(folder)
    return str(folder)


def save_consistency(folder: Path) -> str:
    """A class-conditional consistency model."""
    ConsistencyModelPipeline(unet=unet(classes=10), scheduler=CMStochasticIterativeScheduler()).save_pretrained(folder)
    return str(folder)


def save_dit(folder: Path, classes: int = 10) -> str:
    """A latent DiT with learnt variances and an autoencoder that halves the side."""

    def build() -> DiTPipeline:
        transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
            patch_size=2, num_embeds_ada_norm=classes,
        )  # fmt: skip
        for parameter in transformer.parameters():  # its last layers begin at zero: nothing would be tested
            torch.nn.init.normal_(parameter, 0, 0.2)
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
            scaling_factor=0.5,
        )  # fmt: skip
        return DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler(clip_sample=False))

    seeded_init(build, 0).save_pretrained(folder)
    index = folder / "model_index.json"  # `save_pretrained` loses the class names that the public checkpoints have here
    names = {str(i): f"name {i}, another name" for i in range(classes)}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": names}))
    return str(folder)
