"""`synthkit.json`: what an export of ours says about the bank that it came from. A stranger may have written it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank.imports.columns import Column, small
from synthkit.bank.spec import LABEL_KINDS, MAX_CLASSES, MAX_IMAGES, MAX_SIDE
from synthkit.bank.storage import parse_json, read_json
from synthkit.errors import BankError, DataError

FILE = "synthkit.json"
_FACTS = ("shape", "num_classes", "class_names", "mean", "std", "label_kind", "top_k", "contains_real",
          "real_data_used", "left_out")  # fmt: skip


def record_beside(path: Path) -> dict[str, Any] | None:
    """The record of the export at `path` (a folder with synthkit.json, or a file with FILE.synthkit.json beside it).

    Raises:
        DataError: it is there, but malformed.
    """
    where = path / FILE if path.is_dir() else path.with_name(f"{path.name}.{FILE}")
    if not where.is_file() and not path.is_dir() and _names_file(path.with_name(FILE), path.name):
        where = path.with_name(FILE)
    if not where.is_file():
        return None
    try:
        return check(read_json(where), str(where))
    except BankError as error:
        raise DataError(str(error)) from error


def _names_file(where: Path, name: str) -> bool:
    """Whether a synthkit.json beside a file is about that very file."""
    if not where.is_file():
        return False
    try:
        return name in (read_json(where).get("files") or {})
    except (BankError, TypeError):
        return False


def record_in_arrays(arrays: Mapping[str, Column], where: str) -> dict[str, Any] | None:
    """The record in an array `synthkit` (text, or its UTF-8 bytes). Raises `DataError`."""
    if "synthkit" not in arrays:
        return None
    value = small(arrays["synthkit"], f"{where}: synthkit")
    if value.dtype == np.uint8:
        return record_in_text(value.tobytes(), where)
    if value.dtype.kind not in "US" or value.size != 1:
        raise DataError(f"{where}: the array synthkit must be one text", got=f"{value.dtype} {value.shape}")
    return record_in_text(value.reshape(()).item(), where)


def record_in_text(text: Any, where: str) -> dict[str, Any] | None:
    """The record in a JSON text; None for none. Raises `DataError`."""
    if text is None:
        return None
    data = text.encode() if isinstance(text, str) else text
    if isinstance(data, dict):
        return check(data, where)
    if not isinstance(data, bytes):
        raise DataError(f"{where}: the record synthkit must be text", got=type(text).__name__)
    try:
        return check(parse_json(data, f"{where}: synthkit"), where)
    except BankError as error:
        raise DataError(str(error)) from error


def check(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a synthkit.json (bank/export/provenance.py, version 1) that an import uses, each of them checked.

    Returns:
        uuid, root, shape, num_classes, class_names, mean, std, label_kind, top_k, transform, contains_real,
        real_data_used, left_out of the export; images_per_shard, seed, recipe, teacher, extra of its bank.

    Raises:
        DataError: a field has the wrong form, or a newer synthkit wrote it.
    """
    if raw.get("format") != "synthkit-export":
        raise DataError(f"{where}: is not the record of a synthkit export", got=str(raw.get("format"))[:80])
    if raw.get("version") != 1:
        raise DataError(f"{where}: written by a newer synthkit (export version {raw.get('version')})",
                        hint="upgrade: pip install -U synthkit")  # fmt: skip
    bank = _object(raw, "bank", where)
    record = _object(bank, "record", where)
    plan = _object(record, "plan", where)
    found: dict[str, Any] = {key: raw.get(key) for key in _FACTS}
    found |= {"uuid": bank.get("uuid"), "root": bank.get("root"), "transform": _object(raw, "transform", where)}
    found |= {key: plan.get(key) for key in ("seed", "images_per_shard")}
    found |= {key: _object(record, key, where) for key in ("recipe", "teacher", "extra")}
    sides, names = found["shape"], found["class_names"]
    checks = {
        "uuid": isinstance(found["uuid"], str) and re.fullmatch(r"[0-9a-fA-F-]{1,64}", found["uuid"]) is not None,
        "root": found["root"] is None or _is_hash(found["root"]),
        "shape": isinstance(sides, list) and len(sides) == 3 and all(_is_int(v, 1, MAX_SIDE) for v in sides),
        "num_classes": _is_int(found["num_classes"], 1, MAX_CLASSES),
        "class_names": names is None or _is_list(names, str) and len(names) == found["num_classes"],
        "label_kind": found["label_kind"] in LABEL_KINDS,
        "top_k": found["top_k"] is None or _is_int(found["top_k"], 1, MAX_CLASSES),
        "images_per_shard": _is_int(found["images_per_shard"], 1, MAX_IMAGES),
        "seed": _is_int(found["seed"], 0, 2**64 - 1),
        "left_out": _is_list(found["left_out"], str),
        "contains_real": isinstance(found["contains_real"], bool),
        "real_data_used": isinstance(found["real_data_used"], bool),
    }
    for key in ("mean", "std"):
        value = found[key]
        checks[key] = _is_list(value, (int, float)) and len(value) == (sides[0] if checks["shape"] else -1)
    for key, fine in checks.items():
        if not fine:
            raise DataError(f"{where}: {key} is malformed", got=str(found[key])[:80])
    return found


def _object(raw: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = raw.get(key)
    if not isinstance(value, dict):
        raise DataError(f"{where}: {key} must be an object", got=str(value)[:80])
    return value


def _is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_list(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None
