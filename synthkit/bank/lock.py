"""One run per bank: a lock file that names its holder and that a dead holder cannot keep."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synthkit.bank.errors import BankBusyError
from synthkit.bank.storage import host, pid_alive, process_start, storage_errors
from synthkit.errors import BankError

try:
    import fcntl
except ImportError:  # Windows: the pid in the file decides alone
    fcntl = None


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for the duration of the block.

    The kernel releases the advisory lock with the process, so a killed run never blocks its successor; the text in
    the file says who holds it, and guards file systems that do not share advisory locks between machines.

    Raises:
        BankBusyError: another run holds it; the message names its pid and host.
        StorageError: the file cannot be written.
    """
    with storage_errors("lock", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        held = _take(fd)
        holder = _read(fd)
        if not held or _lives(holder, path):
            _refuse(path, holder)
        mine = {"pid": os.getpid(), "host": host(), "boot": _boot_id(), "started": process_start(os.getpid()),
                "since": time.time()}  # fmt: skip
        with storage_errors("lock", path):
            _write(fd, json.dumps(mine).encode())
        try:
            yield
        finally:
            # Emptied, not removed: removing would race with a run that has just opened the same file.
            with contextlib.suppress(OSError):
                _write(fd, b"")
    finally:
        os.close(fd)


def _take(fd: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without advisory locks: the text decides
        return True
    return True


def _read(fd: int) -> dict[str, Any]:
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        holder = json.loads(os.read(fd, 4096) or b"{}")
    except ValueError:  # a run died while it wrote its name
        return {}
    return holder if isinstance(holder, dict) else {}


def _write(fd: int, data: bytes) -> None:
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, data)
    os.fsync(fd)


def _lives(holder: dict[str, Any], path: Path) -> bool:
    """Whether the holder named in the file may still run, given that the advisory lock was free."""
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return False
    if holder.get("host") != host():
        return True  # another machine: cannot be known from here
    boot = _boot_id()
    if holder.get("boot") is not None and boot is not None and holder["boot"] != boot:
        return False
    if fcntl is not None:
        return False  # same machine, and the kernel gave us the lock: the holder is gone
    return pid_alive(pid)


def _refuse(path: Path, holder: dict[str, Any]) -> None:
    pid, name = holder.get("pid", "unknown"), holder.get("host", "unknown")
    if name == host() or not holder:
        hint = "wait for it, or stop it and use --resume"
    else:
        hint = f"if that run is gone, delete {path}"
    bank = path.parent.parent
    error: BankError = BankBusyError(f"{bank}: another run holds this bank (pid {pid} on host {name})", hint=hint)
    raise error
