"""Taking shards of one bank into another: byte for byte, or row by row, each file checked while it is read."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank.disk.storage import dump_json, make_folder, plain, publish, regular_size, temp_path
from synthkit.bank.shard import Sidecar, file_sha256, shard_file
from synthkit.errors import BankError

_PIECE = 64 << 20  # bytes for one call: Ctrl-C is heard between two


def copy_exact(source: Path, target: Path, sha256: str) -> None:
    """Copy a file; the copy's sha256 must be `sha256`.

    The kernel copies where it can (a reflink on file systems that share blocks: no data moves). The caller syncs.

    Raises:
        BankError: the source is missing, a link, or not what its record says; there is no target then.
        OSError: writing failed; there is no target then.
    """
    size = regular_size(source)
    make_folder(target.parent)
    temp = temp_path(target)
    try:
        if not _kernel_copy(source, temp, size):
            shutil.copyfile(source, temp)
        if file_sha256(temp) != sha256:
            raise BankError(
                f"{source}: its sha256 is not the recorded one", hint=f"run: synthkit bank verify {_bank(source)}"
            )
        os.replace(temp, target)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def _kernel_copy(source: Path, target: Path, size: int) -> bool:
    """`copy_file_range`, where the system and both file systems have it."""
    if not hasattr(os, "copy_file_range"):
        return False
    with open(source, "rb") as reader, open(target, "wb") as writer:
        left = size
        while left:
            try:
                moved = os.copy_file_range(reader.fileno(), writer.fileno(), min(left, _PIECE))
            except OSError:
                return False  # across file systems of old kernels, overlays, ...: a plain copy says what is wrong
            if not moved:
                return False
            left -= moved
    return True


def adopt_shard(bank: Path, index: int, sidecar: Sidecar, file: Path, meta: dict[str, Any]) -> None:
    """Make shard `index` of the bank at `bank` a copy of `file`, whose record is `sidecar`.

    The new record is the old one (who made it, when, in how many seconds) under the new index, `meta` added to its own.

    Raises:
        BankError: `file` is not what its record says. OSError: writing failed.
    """
    target = shard_file(bank, index)
    old = sidecar.raw.get("meta")
    record = {**sidecar.raw, "shard": index, "meta": {**(old if isinstance(old, dict) else {}), **plain(meta)}}
    copy_exact(file, target, sidecar.sha256)
    publish(target.with_suffix(".json"), dump_json(record))


class ShardRows:
    """Rows of the shards of a bank, one shard in memory at a time, every file checked against its record."""

    def __init__(self) -> None:
        self._held: tuple[Path, dict[str, np.ndarray]] | None = None

    def rows(self, file: Path, sidecar: Sidecar, start: int, stop: int) -> dict[str, np.ndarray]:
        """All columns of rows `start` to `stop` of the shard `file`. Raises `BankError` when it is damaged."""
        if self._held is None or self._held[0] != file:
            self._held = None  # not two shards at once
            self._held = (file, _read(file, sidecar))
        return {name: column[start:stop] for name, column in self._held[1].items()}


def _read(file: Path, sidecar: Sidecar) -> dict[str, np.ndarray]:
    if regular_size(file) != sidecar.bytes:
        raise BankError(
            f"{file}: is not {sidecar.bytes} bytes as recorded", hint=f"run: synthkit bank verify {_bank(file)}"
        )
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BankError(f"{file}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != sidecar.sha256:
        raise BankError(f"{file}: its sha256 is not the recorded one", hint=f"run: synthkit bank verify {_bank(file)}")
    return {
        name: np.frombuffer(data, place.dtype, math.prod(place.shape), place.offset).reshape(place.shape)
        for name, place in sidecar.datasets.items()
    }


def _bank(file: Path) -> Path:
    return file.parent.parent
