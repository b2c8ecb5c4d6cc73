"""Arrays with a JSON record: engine states and generator snapshots. Safetensors and JSON, never pickle.

An entry exists when its JSON does; the JSON holds the sha256 of the arrays.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank.disk.storage import (
    dump_json,
    names_in,
    publish,
    read_json,
    regular_size,
    storage_errors,
    sync_folder,
)
from synthkit.errors import BankError, UsageError


@dataclass(frozen=True)
class GeneratorRecord:
    """A generator snapshot in a bank."""

    path: Path
    """The safetensors file."""
    meta: dict[str, Any]
    """What the synthesizer wrote about it (architecture, step, ...)."""
    sha256: str
    """sha256 of the file."""

    def load(self) -> dict[str, np.ndarray]:
        """The arrays, after checking the sha256. Raises `BankError` when the file is damaged."""
        return read_arrays(self.path, self.sha256)


def save_entry(folder: Path, index: int, arrays: Mapping[str, Any], meta: dict[str, Any]) -> None:
    """Commit `arrays` and `meta` as entry `index` of `folder`.

    Raises:
        UsageError: a value is no array that safetensors can hold, or `meta` has no JSON form.
        StorageError: writing failed; the entry does not exist then.
    """
    data = encode_arrays(arrays)
    record = {"index": index, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "meta": meta}
    text = dump_json(record)
    path = entry_path(folder, index)
    if path.with_suffix(".json").exists() and _same(path, text):
        return
    with storage_errors("state", path):
        # The old record goes first: an entry that is written anew must not be vouched for by its predecessor.
        path.with_suffix(".json").unlink(missing_ok=True)
        publish(path, data)
        publish(path.with_suffix(".json"), text)
        sync_folder(folder)


def encode_arrays(arrays: Mapping[str, Any]) -> bytes:
    """`arrays` as safetensors; equal arrays give equal bytes. Raises `UsageError` for what is no numeric array."""
    from safetensors.numpy import save

    ready = {}
    for name, value in arrays.items():
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise UsageError(f"state: {name} must be a numeric array", got=str(array.dtype))
        # safetensors stores the buffer as it lies: order and byte order must be settled here
        ready[name] = np.require(array.astype(array.dtype.newbyteorder("<"), copy=False), requirements="C")
    return save(ready)


def transform_entry(kind: str, arrays: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """What `BankSpec.transform` says of a transform with these `arrays` ("zca" or "affine"); `facts` is JSON data."""
    return {**facts, "kind": kind, "sha256": hashlib.sha256(encode_arrays(arrays)).hexdigest()}


def read_transform(bank: Path, transform: Mapping[str, Any]) -> GeneratorRecord:
    """The record of the transform that bank.json names by sha256; the arrays are not read. Raises `BankError`."""
    record = read_entry(bank / "transform", 0)
    if record.sha256 != transform.get("sha256"):
        raise BankError(f"{record.path}: is not the transform that bank.json names", got=record.sha256[:16] + "...")
    return record


def _same(path: Path, text: bytes) -> bool:
    """Whether the entry is there already, byte for byte (a resumed run makes its last snapshot again)."""
    try:
        return path.with_suffix(".json").read_bytes() == text and path.stat().st_size == json.loads(text)["bytes"]
    except OSError:
        return False


def entry_path(folder: Path, index: int) -> Path:
    """The safetensors file of entry `index`."""
    return folder / f"{index:05d}.safetensors"


def entries(folder: Path) -> list[int]:
    """Indices of the committed entries, ascending."""
    found = (re.fullmatch(r"([0-9]{5,12})\.json", name) for name in names_in(folder))
    return sorted(int(m[1]) for m in found if m and m[0] == f"{int(m[1]):05d}.json")


def read_entry(folder: Path, index: int) -> GeneratorRecord:
    """The record of entry `index`; the arrays are not read. Raises `BankError`."""
    path = entry_path(folder, index)
    where = path.with_suffix(".json")
    raw = read_json(where)
    meta, digest = raw.get("meta"), raw.get("sha256")
    if not isinstance(meta, dict) or not isinstance(digest, str):
        raise BankError(f"{where}: must hold meta and sha256")
    if regular_size(path) != raw.get("bytes"):
        raise BankError(f"{path}: is not {raw.get('bytes')} bytes as recorded", hint="it is truncated or replaced")
    return GeneratorRecord(path=path, meta=meta, sha256=digest)


def read_arrays(path: Path, sha256: str) -> dict[str, np.ndarray]:
    """The arrays of `path`, whose sha256 must be `sha256`. Raises `BankError`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        data = path.read_bytes()
    except OSError as error:
        raise BankError(f"{path}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BankError(f"{path}: does not have the recorded sha256", hint="the file is damaged")
    try:
        return dict(sorted(load(data).items()))  # the library returns them in random order
    except (SafetensorError, KeyError, ValueError) as error:
        raise BankError(f"{path}: is not readable safetensors ({error})") from error


def newest_state(folder: Path, limit: int) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
    """The newest whole entry with index <= `limit`; damaged ones are passed over with a warning."""
    for index in reversed([i for i in entries(folder) if i <= limit]):
        try:
            record = read_entry(folder, index)
            return index, record.load(), record.meta
        except BankError as error:
            warnings.warn(f"state {index} is damaged, an older one is used: {error}", stacklevel=3)
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` entries (record first, so that no record outlives its arrays).

    Arrays without a record, of an entry older than those, go too: a run was killed between the two steps.
    """
    if keep < 1:
        raise UsageError("prune_states: keep must be at least 1", got=keep)
    kept = entries(folder)[-keep:]
    found = (re.fullmatch(r"([0-9]{5,12})\.(json|safetensors)", name) for name in names_in(folder))
    for index in sorted({int(m[1]) for m in found if m and kept and int(m[1]) < kept[0]}):
        with storage_errors("state", folder):
            path = entry_path(folder, index)
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove all entries of `folder`, records first, and the folder."""
    with storage_errors("state", folder):
        for path in sorted(folder.iterdir(), key=lambda p: p.suffix != ".json"):
            path.unlink(missing_ok=True)
        folder.rmdir()
