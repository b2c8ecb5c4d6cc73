"""`synthkit.json`: what an export of ours says about the bank that it came from. A stranger may have written it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synthkit.bank.disk.storage import read_json
from synthkit.bank.spec import LABEL_KINDS, MAX_CLASSES, MAX_IMAGES, MAX_SIDE
from synthkit.errors import BankError, DataError

FILE = "synthkit.json"
_FACTS = ("images", "shape", "num_classes", "class_names", "mean", "std", "label_kind", "top_k", "contains_real",
          "real_data_used", "left_out")  # fmt: skip


def export_format(folder: Path) -> str | None:
    """The format of the export of ours that `folder` is; None where it is none (or cannot be read as one)."""
    if not (folder / FILE).is_file():
        return None
    try:
        to = read_json(folder / FILE).get("to")
    except BankError:
        return None
    return to if isinstance(to, str) else None


def record_of(path: Path, kind: str) -> dict[str, Any] | None:
    """The checked record of the export that `path` is (a folder) or belongs to (one of the files of an export).

    A file counts only when the record names it: what merely lies beside an export is foreign.

    Args:
        kind: format that `path` is read as.

    Raises:
        DataError: there is a synthkit.json, but it is malformed.
    """
    folders = [path] if path.is_dir() else [path.parent, path.parent.parent]
    for folder in folders:
        if export_format(folder) == kind:
            break
    else:
        return None
    try:
        raw = read_json(folder / FILE)
    except BankError as error:
        raise DataError(str(error)) from error
    if not path.is_dir() and path.resolve().relative_to(folder.resolve()).as_posix() not in _texts(raw.get("files")):
        return None
    return check(raw, str(folder / FILE)) | {"whole": path.is_dir()}


def _texts(value: Any) -> Iterator[str]:
    """Every text inside `value`."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def require_fit(own: dict[str, Any] | None, count: int, shape: tuple[int, ...], what: str) -> None:
    """Raise `DataError` when an export does not hold what its record says: then the record says nothing of it."""
    if own is None:
        return
    if tuple(own["shape"]) != tuple(shape):
        raise DataError(f"{what}: holds images of {tuple(shape)}, its {FILE} says {tuple(own['shape'])}",
                        hint=f"for other data than the export, move {FILE} away")  # fmt: skip
    if count > own["images"] or (own["whole"] and count != own["images"]):
        hint = f"the export is damaged, or something was added; move {FILE} away to import it as it is"
        raise DataError(f"{what}: holds {count:,} images, its {FILE} says {own['images']:,}", hint=hint)


def check(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a synthkit.json (bank/export/provenance.py, version 1) that an import uses, each of them checked.

    Returns:
        uuid, root, images, shape, num_classes, class_names, mean, std, label_kind, top_k, transform, contains_real,
        real_data_used, left_out, files of the export; images_per_shard, seed, recipe, teacher, extra of its bank.

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
    found["files"] = _object(raw, "files", where)
    rate = raw.get("learning_rate")
    usable = isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 <= rate <= 1 << 53
    found["learning_rate"] = float(rate) if isinstance(rate, (int, float)) and usable else None
    found |= {key: _object(record, key, where) for key in ("recipe", "teacher", "extra")}
    sides, names = found["shape"], found["class_names"]
    checks = {
        "uuid": isinstance(found["uuid"], str) and re.fullmatch(r"[0-9a-fA-F-]{1,64}", found["uuid"]) is not None,
        "root": found["root"] is None or _is_hash(found["root"]),
        "images": _is_int(found["images"], 1, MAX_IMAGES),
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
