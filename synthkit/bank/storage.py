"""Publishing files so that a reader sees a whole file or none: temp, fsync, rename, fsync of the folder.

Also the guarded JSON reader: size cap, depth cap, no NaN, regular files only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synthkit.bank.errors import BankNotFoundError
from synthkit.errors import BankError, StorageError, UsageError

MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 64

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    getattr(errno, "EDQUOT", -1): "the disk quota is used up; free some space",
    errno.EFBIG: "the file size limit is reached (see `ulimit -f`)",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "no permission to write there; choose another folder",
    errno.EPERM: "no permission to write there; choose another folder",
    errno.ENOENT: "the folder vanished while the run was writing",
}


def host() -> str:
    """This machine's name, reduced to characters that are safe in a file name."""
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname()) or "unknown"


@contextlib.contextmanager
def storage_errors(what: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` of the body into a `StorageError` that names the cause and what stays valid."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, str(error))
        hint = "nothing was half written: what was committed before stays valid, and --resume goes on from there"
        raise StorageError(f"{what}: cannot write {path}: {reason}", hint=hint) from error


def temp_path(path: Path) -> Path:
    """Name of the temporary of `path` of this process."""
    return path.with_name(f"{path.name}.tmp-{host()}-{os.getpid()}")


def publish(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to a temporary, fsync it and rename it to `path`. The caller syncs the folder.

    Raises:
        OSError: as the system said it; the temporary is gone then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = temp_path(path)
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(temp, path) if os.name == "posix" else os.replace(temp, path)
    except BaseException:  # also Ctrl-C: a temporary never stays behind while the process can still remove it
        temp.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the renames in it survive a power cut (POSIX; a no-op elsewhere)."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def plain(value: Any, where: str = "value") -> Any:
    """`value` as plain JSON data: paths to strings, tuples to lists, numpy scalars to numbers, dataclasses to dicts.

    Raises:
        UsageError: something in it has no JSON form (the message names the place).
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if value - value != 0:  # NaN and the infinities have no JSON form
            raise UsageError(f"{where}: must be finite", got=value)
        return float(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name), f"{where}.{name}") for name in value.__dataclass_fields__}
    if hasattr(value, "tolist"):
        return plain(value.tolist(), where)
    raise UsageError(f"{where}: cannot be stored as JSON", got=type(value).__name__)


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
    """The JSON object in `data`; `where` names it in messages. Raises `BankError` on anything else."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BankError(f"{where}: is not readable JSON ({_short(error)})") from error
    if not isinstance(value, dict):
        raise BankError(f"{where}: must be a JSON object", got=type(value).__name__)
    if _depth(value) > MAX_JSON_DEPTH:
        raise BankError(f"{where}: is nested too deeply", hint=f"cap: {MAX_JSON_DEPTH} levels")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not allowed")


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


def clean_stale_temps(folder: Path) -> list[Path]:
    """Remove temporaries in `folder` whose writer on this machine is dead; returns what was removed.

    Another machine's temporaries are left alone: whether their writer lives cannot be known from here.
    """
    removed: list[Path] = []
    if not folder.is_dir():
        return removed
    for path in folder.iterdir():
        match = re.fullmatch(r".+\.tmp-(.+)-(\d+)", path.name)
        if match and match[1] == host() and not _writer_alive(int(match[2]), path):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _writer_alive(pid: int, path: Path) -> bool:
    if pid == os.getpid():
        # A container gives every run the same pid: what is older than this process is a dead namesake's.
        started = process_start(pid)
        try:
            return started is None or path.stat().st_mtime >= started - 1
        except FileNotFoundError:
            return False
    return pid_alive(pid)


def pid_alive(pid: int) -> bool:
    """Whether a process `pid` exists on this machine (True where that cannot be known)."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def process_start(pid: int) -> float | None:
    """Start of process `pid` in seconds since the epoch; None where /proc does not tell."""
    try:
        ticks = float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        return float(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, StopIteration, IndexError, ValueError):
        return None


def require_bank(path: Path) -> None:
    """Raise `BankNotFoundError` unless `path` holds a `bank.json`."""
    if not (path / "bank.json").is_file():
        what = "no such folder" if not path.exists() else "not a bank (it has no bank.json)"
        raise BankNotFoundError(f"{path}: {what}", hint="make one with: synthkit synthesize --teacher ... --out DIR")
