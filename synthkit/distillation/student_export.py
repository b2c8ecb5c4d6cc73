"""A trained classifier for use elsewhere: safetensors, `torch.export` or ONNX, each with its card, checked first.

Normalisation is part of the exported graph: whoever runs it gives [0, 1] images and needs no constants.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from synthkit.bank.disk.storage import require_free, staged
from synthkit.errors import ConfigError, ModelError, RequirementError, RunError
from synthkit.models.build import LoadedModel, load_model
from synthkit.models.weights import file_sha256, save_weights

if TYPE_CHECKING:
    from synthkit.models.card import ModelCard

OPSET = 18  # the oldest that torch's exporter writes without converting; runtimes since 2023 read it
TOLERANCE = 1e-4  # largest difference of a logit, relative to the largest logit where that is above one
_BATCHES = (1, 7)  # batch sizes of the check, neither of them the one that was traced
_FILES = {"safetensors": "student.safetensors", "torch-export": "student.pt2", "onnx": "student.onnx"}


class PixelClassifier(nn.Module):
    """[0, 1] images (B, C, H, W) float32 to logits (B, K) float32: normalisation and network in one graph."""

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.module = module
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.module((images - self.mean) / self.std)


def export_student(spec: str, format: str, out: str | Path) -> Path:
    """Write the classifier `spec` into the new folder `out` as `format`; the folder is there whole or not at all.

    It holds `student.safetensors` (weights alone; the folder is a model spec again), `student.pt2` or `student.onnx`,
    and `card.yaml`, whose `extra.export` says what goes in and out. Before the folder counts, a written graph is loaded
    again and must give the logits of the network for random images at batch sizes 1 and 7.

    Args:
        spec: a run directory, a card or any other model spec with weights.
        format: safetensors, torch-export (`torch.export.load`) or onnx.

    Returns:
        `out`.

    Raises:
        ConfigError: `format` is not known. ModelError: the spec is not, or the network cannot be exported so.
        RequirementError: a package for ONNX is missing. OutputExistsError: `out` is not empty.
        RunError: the written file gives other logits; nothing is left then.
    """
    if format not in _FILES:
        raise ConfigError("export --student: not a known format", got=format, allowed=_FILES)
    if format == "onnx":
        _require_onnx()
    require_free(Path(out))
    loaded = load_model(spec)
    size = tuple(loaded.card.input_size)
    network = PixelClassifier(loaded.module, loaded.card.mean, loaded.card.std).eval().requires_grad_(False)
    _require_pure(spec, network, size, format)
    with staged(out) as folder:
        file = folder / _FILES[format]
        run, facts = _WRITERS[format](network, size, file)
        if run is not None:
            facts["checked_to"] = _check(network, run, size, format)
        _card(loaded, file, {"format": format, **facts}).save(folder / "card.yaml")
    return Path(out)


def _images(size: tuple[int, ...], count: int) -> Tensor:
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def _require_pure(spec: str, network: nn.Module, size: tuple[int, ...], format: str) -> None:
    """Refuse a network that draws random numbers: no graph could be compared with it."""
    if format == "safetensors":
        return
    images = _images(size, 2)
    state = torch.random.get_rng_state()
    first = network(images)
    if not torch.equal(state, torch.random.get_rng_state()) or not torch.equal(first, network(images)):
        torch.random.set_rng_state(state)
        raise ModelError(
            f"export: {spec} draws random numbers for every image, so {format} cannot be checked against it",
            hint="use --format safetensors",
        )


Logits = Callable[[Tensor], Tensor]
Written = tuple[Logits | None, dict[str, Any]]


def _write_safetensors(network: PixelClassifier, size: tuple[int, ...], file: Path) -> Written:
    save_weights(network.module, file)
    return None, {"input": "images: normalised by mean and std of this card (a model spec does it by itself)"}


def _write_torch_export(network: PixelClassifier, size: tuple[int, ...], file: Path) -> Written:
    with _refusal("torch-export"):
        program = torch.export.export(network, (_images(size, 2),), dynamic_shapes=_dynamic())
    torch.export.save(program, file)
    return torch.export.load(file).module(), {**_interface(size), "torch": str(torch.__version__)}


def _write_onnx(network: PixelClassifier, size: tuple[int, ...], file: Path) -> Written:
    import onnx
    import onnxruntime

    with _refusal("onnx"):
        torch.onnx.export(
            network, (_images(size, 2),), file, dynamo=True, dynamic_shapes=_dynamic(), opset_version=OPSET,
            input_names=["images"], output_names=["logits"], external_data=False, verbose=False,
        )  # fmt: skip
    onnx.checker.check_model(str(file))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns of what its own optimiser removes
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return run, {**_interface(size), "opset": OPSET, "torch": str(torch.__version__)}


_WRITERS: dict[str, Callable[[PixelClassifier, tuple[int, ...], Path], Written]] = {
    "safetensors": _write_safetensors,
    "torch-export": _write_torch_export,
    "onnx": _write_onnx,
}


def _dynamic() -> dict[str, Any]:
    return {"images": {0: torch.export.Dim("batch", min=1)}}


def _interface(size: tuple[int, ...]) -> dict[str, Any]:
    channels, height, width = size
    return {
        "input": f"images: float32 (batch, {channels}, {height}, {width}) in [0, 1]; the graph normalises them",
        "output": "logits: float32 (batch, classes)",
    }


@contextmanager
def _refusal(format: str) -> Iterator[None]:
    """Quiet tracing; what the tracer says about a network that it cannot take becomes a typed error."""
    chatty = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in chatty]
    try:
        for log in chatty:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise
    except Exception as error:  # tracer and converter raise dozens of classes, private ones among them
        lines = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"export: this network cannot be written as {format}", got=f"{type(error).__name__}: {lines[0]}",
            hint="use --format safetensors",
        ) from error  # fmt: skip
    finally:
        for log, level in zip(chatty, levels, strict=True):
            log.setLevel(level)


@torch.no_grad()
def _check(network: nn.Module, run: Logits, size: tuple[int, ...], format: str) -> float:
    """The largest difference found; raises `RunError` above the tolerance."""
    differences = []
    for count in _BATCHES:
        images = _images(size, count)
        expected, found = network(images), run(images)
        if found.shape != expected.shape or found.dtype != torch.float32:
            raise RunError(f"export: the {format} file gives {found.dtype} of {tuple(found.shape)} for {count} images")
        scale = expected.abs().max().clamp(min=1)
        differences.append((found - expected).abs().max() / scale)
    largest = float(torch.stack(differences).max())  # NaN when one is, unlike Python's max
    if not largest <= TOLERANCE:
        raise RunError(
            f"export: the logits of the {format} file differ from the network's by {largest:.2g}, "
            f"more than {TOLERANCE:g}; nothing was kept",
            hint="use --format safetensors, or another version of torch",
        )
    return largest


def _card(loaded: LoadedModel, file: Path, facts: dict[str, Any]) -> ModelCard:
    extra = {**loaded.card.extra, "export": {"of": loaded.spec, **facts}}
    return replace(loaded.card, weights=file.name, sha256=file_sha256(file), extra=extra)


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise RequirementError(
            f"export --format onnx: {', '.join(missing)} is not installed", hint="pip install 'synthkit[onnx]'"
        )
