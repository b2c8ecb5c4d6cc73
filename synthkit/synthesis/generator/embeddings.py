"""One fixed vector per class: from a file, from a text encoder, or without either."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit.errors import ConfigError, RequirementError, WeightsError
from synthkit.lazy import np, torch

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.models.view import TeacherView

SUFFIXES = (".npy", ".npz", ".safetensors", ".pt", ".pth")
PROMPT = "a image of {}"  # as published
_SEED = 20240613  # of the label-only vectors: the same in every run, as a text encoder's would be


def class_embeddings(config: Any, teacher: TeacherView, warn: Any) -> Tensor:
    """(K, E) of what the config's `embeddings`, `text_encoder` and `embedding_width` ask for."""
    if config.embeddings:
        return load_embeddings(config.embeddings, teacher.num_classes)
    if config.text_encoder:
        return encoded_class_names(config.text_encoder, teacher.class_names)
    if warn:
        warn(
            "no text embeddings were given: this is the label-only form (fixed orthogonal class vectors);"
            " --method.embeddings FILE or --method.text_encoder DIR is the published one"
        )
    return orthogonal_embeddings(teacher.num_classes, config.embedding_width)


def embeddings_identity(config: Any, embeddings: Tensor) -> dict[str, Any]:
    """What the class vectors are, wherever their file lies: JSON data for the identity of a bank."""
    kind = "file" if config.embeddings else "text" if config.text_encoder else "label-only"
    digest = hashlib.sha256(embeddings.contiguous().numpy().tobytes()).hexdigest()
    return {"kind": kind, "width": embeddings.shape[1], "sha256": digest}


def orthogonal_embeddings(classes: int, width: int) -> Tensor:
    """(classes, max(width, classes)) orthonormal rows that know nothing of the classes but that they differ."""
    rng = torch.Generator().manual_seed(_SEED)
    draw = torch.randn(max(width, classes), classes, generator=rng, dtype=torch.float64)
    return torch.linalg.qr(draw)[0].T.float().contiguous()


def load_embeddings(path: str, classes: int) -> Tensor:
    """The (classes, E) float array in a file (numpy, safetensors, or torch read with weights_only).

    A file of several arrays is asked for `embeddings`.

    Raises:
        ConfigError: no such file, an unknown suffix, or another shape.
        WeightsError: the file cannot be read safely.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError("method.embeddings: not a kind of file that can be read", got=path, allowed=SUFFIXES)
    if not file.is_file():
        raise ConfigError("method.embeddings: no such file", got=path)
    found = _read(file)
    if isinstance(found, dict):
        if len(found) > 1 and "embeddings" not in found:
            raise ConfigError(f"{path} holds several arrays and none is called 'embeddings'", allowed=found)
        found = found["embeddings"] if len(found) > 1 else next(iter(found.values()), None)
    values = torch.as_tensor(found) if isinstance(found, torch.Tensor | np.ndarray) else None
    if values is None or values.ndim != 2 or len(values) != classes or not values.is_floating_point():
        raise ConfigError(
            f"{path}: the embeddings must be floats of shape ({classes}, E), one row per class",
            got=None if values is None else (tuple(values.shape), str(values.dtype)),
            hint="encode one sentence per class, in the teacher's class order",
        )
    values = values.float()
    if not torch.isfinite(values).all() or len(torch.unique(values, dim=0)) < classes:
        raise ConfigError(f"{path}: the embeddings must be finite, and different for every class")
    return values


def _read(file: Path) -> Any:
    try:
        if file.suffix.lower() in (".npy", ".npz"):
            found = np.load(file, allow_pickle=False)
            return dict(found) if file.suffix.lower() == ".npz" else found
        if file.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(file))
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what damaged files raise is not one type: pickle, zip, safetensors and numpy differ
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"method.embeddings: {file} cannot be read ({reason})") from None


def encoded_class_names(folder: str, class_names: list[str] | None) -> Tensor:
    """(K, E) text embeddings of "a image of {class}" by the CLIP model in `folder` (Hugging Face layout, safetensors).

    Raises:
        RequirementError: the class names are unknown, or transformers is not installed.
        WeightsError: the folder cannot be loaded.
    """
    if not class_names:
        raise RequirementError(
            "method.text_encoder needs the names of the classes", hint="add class_names to the teacher's card"
        )
    try:
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer  # type: ignore[import-not-found]  # extra
    except ImportError:
        raise RequirementError(
            "method.text_encoder needs the package transformers",
            hint="pip install 'synthkit[text]', or give --method.embeddings FILE, or neither",
        ) from None
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        encoder = CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"method.text_encoder: {folder} cannot be loaded ({reason})") from None
    tokens = tokenizer([PROMPT.format(name) for name in class_names], padding=True, return_tensors="pt")
    with torch.no_grad():
        return encoder.eval()(**tokens).text_embeds.float()
