"""The idx files of MNIST (plain or gzip)."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from synthkit.data.real import require_memory
from synthkit.errors import DataError

FILES = {
    "train": ("train-images", "train-labels"),
    "test": ("t10k-images", "t10k-labels"),
}
FOLDERS = ("", "raw", "MNIST/raw")


def find_mnist(root: Path) -> Path | None:
    """The folder at or below `root` that holds the idx files, or none."""
    for below in FOLDERS:
        folder = root / below
        if any(_file(folder, name, rank) for names in FILES.values() for name, rank in zip(names, (3, 1), strict=True)):
            return folder
    return None


def _file(folder: Path, name: str, rank: int) -> Path | None:
    for spelling in (f"{name}-idx{rank}-ubyte", f"{name}.idx{rank}-ubyte"):
        for ending in ("", ".gz"):
            if (folder / (spelling + ending)).is_file():
                return folder / (spelling + ending)
    return None


def read_mnist(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """(images uint8 (N,1,28,28), labels int64 (N,)) of split train or test.

    Raises:
        DataError: a file is missing or damaged.
    """
    arrays = []
    for name, rank in zip(FILES[split], (3, 1), strict=True):
        path = _file(folder, name, rank)
        if path is None:
            raise DataError(f"mnist: {folder} has no {name}-idx{rank}-ubyte[.gz]", hint=f"split {split!r} needs it")
        arrays.append(read_idx(path, rank))
    images, labels = arrays
    if len(images) != len(labels):
        raise DataError(f"mnist: {len(images)} images but {len(labels)} labels in {folder}", hint="get the files again")
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def read_idx(path: Path, rank: int) -> np.ndarray:
    """A uint8 array of `rank` dimensions from an idx file.

    The sizes are checked against the file before memory is taken; of a gzip file not more than announced is unpacked.

    Raises:
        DataError: not an idx file of unsigned bytes with that rank, or shorter than it says.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as handle:
            head = handle.read(4 + 4 * rank)
            if len(head) < 4 + 4 * rank or head[:3] != b"\x00\x00\x08" or head[3] != rank:
                raise DataError(f"{path}: not an idx file of unsigned bytes with {rank} dimensions", got=head[:4].hex())
            shape = struct.unpack(f">{rank}I", head[4:])
            count = int(np.prod([int(side) for side in shape], dtype=object))
            if path.suffix != ".gz" and count > path.stat().st_size:
                raise DataError(f"{path}: shorter than its header says", got=shape, hint="get the file again")
            require_memory(str(path), shape[0], shape[1:])
            body = handle.read(count)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})", hint="get the file again") from error
    if len(body) != count:
        raise DataError(f"{path}: {len(body)} bytes of data instead of {count}", hint="get the file again")
    return np.frombuffer(body, np.uint8).reshape(shape).copy()
