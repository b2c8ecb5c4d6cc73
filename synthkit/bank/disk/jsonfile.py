"""The JSON records of a bank: written readably and in one canonical form, read as if they came from a stranger.

Caps on size, depth and parts, no NaN, no duplicate keys, regular files only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from synthkit.errors import BankError, UsageError

MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 64
MAX_JSON_PARTS = 500_000
MAX_JSON_DIGITS = 100  # a random generator's state in a checkpoint has 39


def plain(value: Any, where: str = "value") -> Any:
    """`value` as plain JSON data: paths to strings, tuples to lists, numpy scalars to numbers, dataclasses to dicts.

    Raises:
        UsageError: something in it has no JSON form (the message names the place).
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if abs(value) >= 10**MAX_JSON_DIGITS:  # the reader refuses it
            raise UsageError(f"{where}: a whole number of more than {MAX_JSON_DIGITS} digits cannot be stored")
        return value
    if isinstance(value, str):
        return _unicode(value, where)
    if isinstance(value, float):
        if value - value != 0:  # NaN and the infinities have no JSON form
            raise UsageError(f"{where}: must be finite", got=value)
        return float(value)
    if isinstance(value, Path):
        return _unicode(str(value), where)
    if isinstance(value, dict):
        return {_unicode(str(k), where): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name), f"{where}.{name}") for name in value.__dataclass_fields__}
    if hasattr(value, "tolist"):
        return plain(value.tolist(), where)
    raise UsageError(f"{where}: cannot be stored as JSON", got=type(value).__name__)


def _unicode(text: str, where: str) -> str:
    """`text` if UTF-8 can hold it; names of files on Linux may be any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where}: holds characters that are no Unicode text", got=ascii(text)) from None
    return text


def dump_json(data: Any) -> bytes:
    """Readable, key-sorted UTF-8 JSON."""
    return (json.dumps(plain(data), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def canonical_hash(data: Any) -> str:
    """sha256 of the canonical JSON of `data`: equal data, equal hash."""
    text = json.dumps(plain(data), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def regular_size(path: Path) -> int:
    """Bytes of the regular file `path`.

    Raises:
        BankError: it is missing, a link, a device or a folder.
    """
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise BankError(f"{path}: the file is missing", hint=f"run: synthkit bank verify {_bank_of(path)}") from None
    except OSError as error:
        raise BankError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BankError(f"{path}: not a regular file", hint="a bank holds plain files only, no links or devices")
    return status.st_size


def _bank_of(path: Path) -> Path:
    return path.parent if path.name == "bank.json" else path.parent.parent


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, which may come from a stranger.

    Raises:
        BankError: missing, not a regular file, over 16 MiB, not JSON, nested too deeply, or not an object.
    """
    size = regular_size(path)
    if size > MAX_JSON_BYTES:
        raise BankError(f"{path}: {size} bytes is too large for a record", hint=f"cap: {MAX_JSON_BYTES} bytes")
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise BankError(f"{path}: cannot be read: {error.strerror}") from error


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`; `where` names it in messages.

    Memory stays within some 20 times the bytes. Refused besides what is no JSON: NaN and numbers that overflow to it,
    whole numbers of more than 100 digits, a key that stands twice (two readers could see two records), lone
    surrogates (text that cannot be written again), more than 500,000 objects and lists, more than 64 levels.

    Raises:
        BankError: any of these, or the value is no object.
    """
    if data.count(b"{") + data.count(b"[") > MAX_JSON_PARTS:
        raise BankError(f"{where}: holds too many objects and lists", hint=f"cap: {MAX_JSON_PARTS}")
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_no_constant, parse_int=_int, parse_float=_float, object_pairs_hook=_unique_keys,
        )  # fmt: skip
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BankError(f"{where}: is not readable JSON ({_short(error)})") from error
    if not isinstance(value, dict):
        raise BankError(f"{where}: must be a JSON object", got=type(value).__name__)
    if _depth(value) > MAX_JSON_DEPTH:
        raise BankError(f"{where}: is nested too deeply", hint=f"cap: {MAX_JSON_DEPTH} levels")
    if re.search(rb"\\u[dD][89a-fA-F]", data) and _lone_surrogate(value):
        raise BankError(f"{where}: holds text that is no Unicode (half a surrogate pair)")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not allowed")


def _int(text: str) -> int:
    if len(text) > MAX_JSON_DIGITS:  # nothing in a bank needs more, and 10,000 digits cost time and break float()
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"the number {text[:20]} is not finite")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _short(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text[:120]


def _depth(value: Any) -> int:
    level, front = 0, [value]
    while front and level <= MAX_JSON_DEPTH:
        level += 1
        front = [
            v
            for node in front
            for v in (node.values() if isinstance(node, dict) else node)
            if isinstance(v, (dict, list))
        ]
    return level
