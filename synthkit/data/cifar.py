"""CIFAR-10 and CIFAR-100 as their authors publish them: python pickle batches or the binary version.

Pickle files can run code; these are read by an unpickler that knows numpy arrays and nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from synthkit.data.real import require_memory
from synthkit.errors import DataError

MAX_BATCH_BYTES = 512 << 20


class _Layout(NamedTuple):
    folder: str
    train: list[str]
    test: list[str]
    labels: str  # key of the labels (python)
    head: int  # label bytes before the pixels of a row (binary)


_PYTHON = {
    "cifar10": _Layout("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], "labels", 0),
    "cifar100": _Layout("cifar-100-python", ["train"], ["test"], "fine_labels", 0),
}
_BINARY = {
    "cifar10": _Layout("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], "", 1),
    "cifar100": _Layout("cifar-100-binary", ["train.bin"], ["test.bin"], "", 2),
}
LAYOUTS = {"python": _PYTHON, "binary": _BINARY}
_PIXELS = 3 * 32 * 32


class _NDArray:
    """Stands for `numpy.ndarray` inside a pickle, where it may only be an argument of `_reconstruct`."""


def _reconstruct(kind: Any, shape: Any, _code: Any) -> np.ndarray:
    if kind is not _NDArray or tuple(shape) != (0,):
        raise pickle.UnpicklingError("an array is built in an unusual way")
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8)


def _dtype(code: Any, *_rest: Any) -> np.dtype:
    text = code.decode("ascii") if isinstance(code, bytes) else str(code)
    if text.lstrip("|<>=") not in {"u1", "i1", "i2", "i4", "i8", "b1"}:
        raise pickle.UnpicklingError(f"array of type {text!r}")
    return np.dtype(text)


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if encoding not in {"latin1", "latin-1"}:
        raise pickle.UnpicklingError(f"text in encoding {encoding!r}")
    return str(text).encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDArray,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numbers, text, lists, dicts and plain numpy arrays; everything else is refused before it is imported."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def read_pickle_batch(path: Path) -> dict[str, Any]:
    """The dict in a CIFAR batch file, keys as text.

    Raises:
        DataError: too large, damaged, or it holds anything but numbers, text, containers and plain arrays.
    """
    if path.stat().st_size > MAX_BATCH_BYTES:
        raise DataError(f"{path}: {path.stat().st_size >> 20} MiB are too large for a CIFAR batch")
    try:
        with path.open("rb") as handle:
            found = _ArrayUnpickler(handle, encoding="latin1").load()
    # a damaged pickle can fail in any of these ways inside the standard unpickler
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise DataError(
            f"{path}: refused as a CIFAR batch ({error})", hint="only plain arrays are read; get the official files"
        ) from error
    except (ImportError, UnicodeError, OverflowError, MemoryError) as error:
        raise DataError(f"{path}: damaged ({error})", hint="get the official files") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a {type(found).__name__} instead of a dict", hint="get the official files")
    return {(key.decode("latin1") if isinstance(key, bytes) else str(key)): value for key, value in found.items()}


def find_cifar(kind: str, root: Path) -> tuple[str, Path] | None:
    """("python" | "binary", folder) of the batch files at or below `root`, or none."""
    for form, table in LAYOUTS.items():
        layout = table[kind]
        for place in (root, root / layout.folder):
            # cifar100's "train" and "test" could be the folders of an ImageFolder: only files count
            if any((place / name).is_file() for name in (*layout.train, *layout.test)):
                return form, place
    return None


def read_cifar(kind: str, form: str, folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """(images uint8 (N,3,32,32), labels int64 (N,)) of split train or test.

    Raises:
        DataError: a batch file is missing, damaged or unsafe.
    """
    layout = LAYOUTS[form][kind]
    names = layout.train if split == "train" else layout.test
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{kind}: {folder} has no {', '.join(missing)}", hint=f"split {split!r} needs all of {names}")
    parts = []
    for name in names:
        if form == "python":
            parts.append(_python_batch(folder / name, layout.labels))
        else:
            parts.append(_binary_batch(folder / name, layout.head))
    images = np.concatenate([part[0] for part in parts]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.from_numpy(np.concatenate([part[1] for part in parts]))


def _python_batch(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    batch = read_pickle_batch(path)
    for needed in ("data", key):
        if needed not in batch:
            raise DataError(f"{path}: no {needed!r} inside", got=sorted(batch), hint="get the official files")
    data, labels = batch["data"], batch[key]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS:
        raise DataError(f"{path}: data is not uint8 (N, {_PIXELS})", hint="get the official files")
    if not isinstance(labels, list | np.ndarray) or len(labels) != len(data):
        raise DataError(f"{path}: {key} does not hold one label per image", hint="get the official files")
    return data, np.asarray(labels, dtype=np.int64)


def _binary_batch(path: Path, head: int) -> tuple[np.ndarray, np.ndarray]:
    row = head + _PIXELS
    size = path.stat().st_size
    if size == 0 or size % row:
        raise DataError(f"{path}: {size} bytes are not a multiple of {row}", hint="get the official files")
    require_memory(str(path), size // row, (row,))
    rows = np.fromfile(path, np.uint8).reshape(-1, row)
    return rows[:, head:], rows[:, head - 1].astype(np.int64)  # CIFAR-100: coarse label, then fine label
