"""Which diffusion model lies in a folder, a file or on the hub; what it needs to be told; its networks.

Only networks named here are built, and weights come from safetensors files alone: nothing in a checkpoint is ever
executed. What a checkpoint is decided by its network: `UNet2DModel` (pixels), `DiTTransformer2DModel` with an
`AutoencoderKL` (latents), a `UNet2DModel` under a consistency scheduler, or a text-conditioned `UNet2DConditionModel`.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from synthkit.errors import ModelError, RequirementError, WeightsError
from synthkit.lazy import torch
from synthkit.synthesis.diffusion.card import CARD, DiffusionCard

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["unet", "dit", "consistency", "text"]
_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_FETCHED = [
    "model_index.json", CARD, "config.json", "scheduler_config.json", "diffusion_pytorch_model*.safetensors",
    "*/*.json", "*/*.txt", "*/diffusion_pytorch_model*.safetensors", "*/model*.safetensors",
]  # fmt: skip
_NOT_FETCHED = ["*.fp16.safetensors", "*.non_ema.*", "safety_checker/*", "feature_extractor/*"]
_NETWORKS = {
    "UNet2DModel": "UNet2DModel",
    "DiTTransformer2DModel": "DiTTransformer2DModel",
    "Transformer2DModel": "DiTTransformer2DModel",  # its name in checkpoints of older releases
    "UNet2DConditionModel": "UNet2DConditionModel",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a checkpoint's configuration files say, read without its weights."""

    folder: Path
    """Where it lies."""
    kind: Kind
    """What it is."""
    part: str
    """Sub-folder of the network ("" where it lies in the folder itself)."""
    weights: Path | None
    """The weights file that was named, if a file was."""
    network: dict[str, Any]
    """Configuration of the network."""
    scheduler: dict[str, Any]
    """Configuration of the noise schedule that it was trained with."""
    vae: dict[str, Any] | None
    """Configuration of its autoencoder; None paints pixels."""
    card: DiffusionCard | None
    """What `synthkit teach` wrote about it."""
    names: list[str] | None
    """Class names, where it has some."""

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network denoises: pixels or latents."""
        side = self.network["sample_size"]
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return int(self.network["in_channels"]), int(height), int(width)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what it paints."""
        channels, height, width = self.state_shape
        if self.vae is None:
            return channels, height, width
        scale = 2 ** (len(self.vae["block_out_channels"]) - 1)
        return int(self.vae["out_channels"]), height * scale, width * scale

    @property
    def null_class(self) -> int | None:
        """The label that means "no class", where it has one (a hard-coded 1000 would be wrong for all but ImageNet)."""
        if self.kind == "dit":
            return int(self.network["num_embeds_ada_norm"])  # its embedding has one row more than classes
        return self.card.null_class if self.card else None

    @property
    def num_classes(self) -> int | None:
        """Number of classes that it can be asked for; None where it knows none (unconditional, or text)."""
        if self.kind == "dit":
            return int(self.network["num_embeds_ada_norm"])
        if self.kind == "text" or self.network.get("num_class_embeds") is None:
            return None
        return len(self.card.class_names) if self.card else int(self.network["num_class_embeds"])


def find(model: str | None, *, offline: bool = False) -> Layout:
    """The checkpoint that `model` names: a folder, a .safetensors file beside its config.json, or OWNER/NAME[@REV].

    Raises:
        ModelError: there is no such checkpoint, or it is none that can be sampled here; says what it is.
    """
    if not model:
        raise RequirementError(
            "diffusion needs a diffusion model",
            hint="--method.model DIR (made by synthkit teach --arch unet), or a hub repository OWNER/NAME",
        )
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError("method.model: only .safetensors files are read", got=str(path))
        return _layout(path.parent, "", path)
    if not path.is_dir():
        if not _HUB.fullmatch(model):
            raise ModelError("method.model: no such folder or file", got=model)
        path = _download(model, offline)
    if not (path / "model_index.json").is_file():
        return _layout(path, "", None)
    parts = [name for name in ("unet", "transformer") if (path / name / "config.json").is_file()]
    if not parts:
        raise ModelError(f"{path}: the pipeline has neither unet/ nor transformer/", hint="name another checkpoint")
    return _layout(path, parts[0], None)


def _layout(folder: Path, part: str, weights: Path | None) -> Layout:
    network = _read(folder / part / "config.json")
    if network is None:
        raise ModelError(f"{folder}: no diffusion model lies here (no model_index.json, no config.json)")
    name = str(network.get("_class_name"))
    if name not in _NETWORKS:
        raise ModelError(f"{folder}: a network of this kind cannot be sampled here", got=name, allowed=_NETWORKS)
    scheduler = _read(folder / "scheduler" / "scheduler_config.json") or _read(folder / "scheduler_config.json")
    if scheduler is None:
        raise ModelError(
            f"{folder}: the noise schedule of the model is unknown",
            hint="put its scheduler_config.json beside it, or name the folder of the whole pipeline",
        )
    kind: Kind = "unet"
    if _NETWORKS[name] == "DiTTransformer2DModel":
        kind = "dit"
    elif name == "UNet2DConditionModel":
        kind = "text"
    elif scheduler.get("_class_name") == "CMStochasticIterativeScheduler":
        kind = "consistency"
    vae = _read(folder / "vae" / "config.json") if kind in ("dit", "text") else None
    if kind in ("dit", "text") and vae is None:
        raise ModelError(f"{folder}: a latent model needs its autoencoder in vae/")
    card = DiffusionCard.load(folder)
    index = _read(folder / "model_index.json") or {}
    return Layout(
        folder=folder, kind=kind, part=part, weights=weights, network=network, scheduler=scheduler, vae=vae,
        card=card, names=card.class_names if card else _names(index.get("id2label")),
    )  # fmt: skip


def _names(labels: Any) -> list[str] | None:
    """Class names of a DiT pipeline: the first synonym of every class, in order."""
    if not isinstance(labels, dict) or not all(str(key).isdigit() for key in labels):
        return None
    return [str(labels[key]).split(",")[0].strip() for key in sorted(labels, key=int)] or None


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: must be a mapping", got=type(found).__name__)
    return found


def _download(model: str, offline: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = model.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=_FETCHED, ignore_patterns=_NOT_FETCHED,
            local_files_only=offline,
        )  # fmt: skip
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "is not in the local cache" if offline else f"cannot be had ({reason})"
        raise ModelError(f"method.model: no such folder, and the hub repository {where}", got=model) from None
    return Path(folder)


def identity(layout: Layout) -> str:
    """sha256 over names and bytes of all files that decide what the model paints (not over where it lies)."""
    from synthkit.models.weights import file_sha256

    parts = {"": ["config.json", "scheduler_config.json"], "scheduler": ["scheduler_config.json"], "vae": ["*"]}
    parts |= {"text_encoder": ["*"], "tokenizer": ["*"]} if layout.kind == "text" else {}
    files = [layout.weights] if layout.weights else list((layout.folder / layout.part).glob("*.safetensors"))
    files += [layout.folder / layout.part / "config.json"]
    files += [file for part, names in parts.items() for name in names for file in (layout.folder / part).glob(name)]
    kept = sorted({file for file in files if file.suffix in (".json", ".txt", ".safetensors")})
    digest = hashlib.sha256()
    for file in kept:
        digest.update(f"{file.relative_to(layout.folder)}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def load_network(layout: Layout) -> nn.Module:
    """The network, frozen, in fp32 and eval mode.

    Raises:
        WeightsError: its weights are missing, damaged, no safetensors, or do not fit its configuration.
    """
    import diffusers

    kind = getattr(diffusers, _NETWORKS[layout.network["_class_name"]])
    if layout.weights is None:
        return _loaded(kind, layout.folder, layout.part)
    from synthkit.models.weights import read_state_dict

    state = read_state_dict(layout.weights)
    network = kind.from_config({k: v for k, v in layout.network.items() if not k.startswith("_")})
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"{layout.weights}: does not fit the config.json beside it ({_first(error)})") from None
    return network.eval().requires_grad_(False)


def load_vae(layout: Layout) -> nn.Module | None:
    """The autoencoder of a latent model, frozen; None for one that paints pixels.

    Raises:
        WeightsError: its weights are missing, damaged or no safetensors.
    """
    from diffusers import AutoencoderKL  # type: ignore[attr-defined]  # lazy module

    return None if layout.vae is None else _loaded(AutoencoderKL, layout.folder, "vae")


def _loaded(kind: Any, folder: Path, part: str) -> nn.Module:
    from safetensors import SafetensorError

    if not list((folder / part).glob("*.safetensors")):
        hint = "convert it: Pipeline.from_pretrained(DIR).save_pretrained(NEW_DIR) writes safetensors"
        raise WeightsError(f"{folder / part}: there are no safetensors weights, and no others are read", hint=hint)
    try:
        network = kind.from_pretrained(
            str(folder), subfolder=part or None, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{folder / part}: the weights cannot be loaded ({_first(error)})") from None
    return network.eval().requires_grad_(False)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
