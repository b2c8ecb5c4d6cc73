"""Text-conditioned models (Stable Diffusion and its kin): class names become prompts. Needs `transformers`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from synthkit.errors import RequirementError, WeightsError
from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.synthesis.diffusion.checkpoints import Layout
    from synthkit.synthesis.diffusion.config import DiffusionConfig


def embed_classes(layout: Layout, config: DiffusionConfig, class_names: list[str], device: Any) -> Tensor:
    """Text embeddings (K + 1, tokens, width): one per class, and behind them that of the negative prompt.

    Raises:
        RequirementError: transformers is not installed, or the model wants more than one embedding (SDXL).
        WeightsError: tokenizer or text encoder are missing or damaged.
    """
    _refuse_other(layout)
    tokenizer, encoder = load_encoder(layout)
    prompts = [config.prompt.replace("{}", name) for name in class_names] + [config.negative_prompt]
    return embed(tokenizer, encoder.to(device), prompts, device)


def embed(tokenizer: Any, encoder: Any, prompts: list[str], device: Any) -> Tensor:
    """Last hidden states (N, tokens, width) of the prompts, padded and cut to the encoder's length."""
    length = tokenizer.model_max_length
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return encoder(tokens.input_ids.to(device))[0].float()


def load_encoder(layout: Layout) -> tuple[Any, Any]:
    """(tokenizer, text encoder) of the pipeline, from safetensors alone.

    Raises:
        RequirementError: transformers is not installed.
        WeightsError: they cannot be loaded.
    """
    try:
        from transformers import CLIPTextModel, CLIPTokenizer  # type: ignore[import-not-found]  # an extra
    except ImportError:
        raise RequirementError(
            f"{layout.folder} is a text-conditioned model, which needs the package transformers",
            hint="pip install 'synthkit[text]', or use a class-conditional model (synthkit teach --arch unet, DiT)",
        ) from None
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(layout.folder), subfolder="tokenizer", local_files_only=True)
        encoder = CLIPTextModel.from_pretrained(
            str(layout.folder), subfolder="text_encoder", local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{layout.folder}: tokenizer/ or text_encoder/ cannot be loaded ({reason})") from None
    return tokenizer, encoder.eval().requires_grad_(False)


def _refuse_other(layout: Layout) -> None:
    network = layout.network
    if network.get("addition_embed_type") or (layout.folder / "text_encoder_2").is_dir():
        raise RequirementError(
            f"{layout.folder}: models with several text encoders (SDXL and later) are not supported",
            hint="use a Stable Diffusion 1.x or 2.x checkpoint, DiT, or a UNet of synthkit teach",
        )
    if network.get("time_cond_proj_dim"):
        raise RequirementError(
            f"{layout.folder}: the network wants the guidance scale as an embedding (a guidance-distilled LCM)",
            hint="use an LCM-LoRA merged into its base model, with --method.sampler lcm",
        )
