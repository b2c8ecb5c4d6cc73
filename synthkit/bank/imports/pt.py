"""`.pt`: a dict of tensors, an (images, labels, lr) tuple, or the files of the dataset-distillation repositories.

Understood: {"images": ..., "labels": ..., "lr": ...}; a tuple or list (images, labels[, lr]); {"data": [[images,
labels], ...]} as written by VICO-UoE/DatasetCondensation (the last entry is the last experiment); and a folder with
images_best.pt, labels_best.pt, lr_best.pt (or images.pt, labels.pt, lr.pt) as written by the trajectory-matching
repositories. Files are read with `weights_only=True`, always, and memory-mapped where torch can.
"""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank.imports.arrays import RATE_KEYS, source_from_arrays
from synthkit.bank.imports.columns import Column, MemoryColumn, SlicedColumn
from synthkit.bank.imports.own import record_of
from synthkit.bank.imports.source import ImportOptions, Source, Values, refuse_link
from synthkit.errors import DataError

SUFFIXES = (".pt", ".pth", ".th")
_ENDINGS = ("_best", "", "_last")  # of equal rank the best one is taken, as the papers report it


def folder_parts(folder: Path) -> dict[str, Path]:
    """The files images*.pt, labels*.pt and lr*.pt of `folder` that belong together; empty where there are none."""
    for ending in _ENDINGS:
        found = {
            key: folder / f"{key}{ending}.pt"
            for key in ("images", "labels", "lr", "learning_rate")
            if (folder / f"{key}{ending}.pt").is_file()
        }
        if "images" in found:
            return found
    return {}


def open_source(path: Path, options: ImportOptions) -> Source:
    """The tensors in the file, or in the files of the folder.

    Raises:
        DataError: pickled objects, a damaged file, or nothing that looks like images.
    """
    refuse_link(path)
    own = record_of(path, "pt")
    if path.is_dir():
        named, names = _of_folder(path, own), None
        if own is not None:
            options = replace(options, values=_values(own))
            own["left_out"] = [c for c in own["left_out"] if c != "images"]  # made anew from the training pixels
    else:
        named = _named(load(path), path)
        names = named.pop("class_names", None)
    class_names = list(names) if isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names) else None
    arrays: dict[str, Column] = {}
    for key, value in named.items():
        column = _column(value)
        if column is not None:
            arrays[str(key)] = column
    return source_from_arrays(
        arrays, options, kind="pt", what=str(path), name=path.name, own=own, class_names=class_names
    )


def _values(own: dict[str, Any]) -> Values:
    """What the numbers of our own export are, by the space that it names."""
    space, kind = own["files"].get("space"), own["transform"].get("kind")
    if space == "training":
        return "whitened" if kind == "zca" else "normalised" if kind == "affine" else "pixels"
    return "unit" if space == "pixels" else "normalised"


def _of_folder(path: Path, own: dict[str, Any] | None) -> dict[str, Any]:
    parts = folder_parts(path)
    if not parts:
        raise DataError(f"{path}: no images.pt or images_best.pt", hint="name the .pt file itself")
    named = {key: load(file) for key, file in parts.items()}
    if own is not None and (path / "transform.pt").is_file():
        transform = load(path / "transform.pt")
        if isinstance(transform, dict):
            named |= {f"transform.{key}": value for key, value in transform.items()}
    return named


def load(path: Path) -> Any:
    """The content of a torch file; never runs code from it.

    Raises:
        DataError: it holds pickled objects, or is damaged.
    """
    import torch

    refuse_link(path)
    try:
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: holds pickled Python objects or is damaged; loading it could run any code, so synthkit does not",
            hint="where you trust it: load it in the code that wrote it and save the plain tensors with torch.save",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, OSError,
            MemoryError) as error:  # fmt: skip
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: damaged or not a torch file ({reason})", hint="fetch the file again") from error


def _named(found: Any, path: Path) -> dict[str, Any]:
    if isinstance(found, dict) and isinstance(found.get("data"), (list, tuple)):
        experiments = found["data"]
        if not experiments:
            raise DataError(f"{path}: its list of experiments is empty")
        return _named(experiments[-1], path)
    if isinstance(found, dict):
        return {str(key): value for key, value in found.items()}
    if isinstance(found, (list, tuple)) and 1 <= len(found) <= 3:
        return dict(zip(("images", "labels", RATE_KEYS[0]), found, strict=False))
    if _column(found) is not None:
        return {"images": found}
    raise DataError(f"{path}: no images in it", got=type(found).__name__,
                    hint='expected {"images": ..., "labels": ...} or (images, labels, lr)')  # fmt: skip


def _column(value: Any) -> Column | None:
    """A tensor (or plain numbers) as a column; None for anything else, such as accuracies of the experiments."""
    import torch

    if isinstance(value, torch.nn.Parameter):
        value = value.detach()
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized or tensor.is_meta:
            return None
        wide = tensor.dtype == torch.bfloat16 or tensor.element_size() == 1 and tensor.is_floating_point()
        kind = np.dtype(np.float32) if wide else np.dtype(str(tensor.dtype).removeprefix("torch."))

        def read(rows: slice | None) -> np.ndarray:
            part = tensor if rows is None else tensor[rows]
            return (part.float() if wide else part).contiguous().numpy()

        return SlicedColumn(tuple(tensor.shape), kind, read)
    if isinstance(value, (bool, int, float)):
        return MemoryColumn(np.asarray(value))
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, (bool, int, float)) for v in value):
        return MemoryColumn(np.asarray(value))
    return None
