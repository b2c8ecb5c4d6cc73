"""Tools of the attacker, and proofs that an attack did nothing."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bank.banks import make_bank

from synthkit.bank import Bank, BankWriter
from synthkit.bank.checking.verify import VerifyReport, verify
from synthkit.errors import BankError

SECRET = b"the secret of another user\n"
MEMORY = 96 << 20  # bytes by which a refusal may grow the process (the HDF5 library itself takes some on first use)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def edit_json(path: Path, **changes: Any) -> None:
    record = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            record.pop(key)
        else:
            record[key] = value
    path.write_text(json.dumps(record))


def unseal(bank: Path) -> None:
    """An attacker who makes a bank of his own need not seal it."""
    (bank / "manifest.json").unlink(missing_ok=True)


def vouch(writer: BankWriter, index: int, data: bytes, **record: Any) -> None:
    """Put `data` in the place of a shard, with a record whose size and hash are right: an attacker can."""
    writer.shard_path(index).write_bytes(data)
    edit_json(writer.sidecar_path(index), bytes=len(data), sha256=digest(data), **record)
    unseal(writer.path)


def small_bank(path: Path, **changes: Any) -> BankWriter:
    """A bank of two shards."""
    return make_bank(path, **{"images": 20, "images_per_shard": 10, **changes})


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Name -> (mode, what it holds) of everything below `folder`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = os.lstat(path)
        plain = path.is_file() and not path.is_symlink()
        readable = plain and os.access(path, os.R_OK) and not path.is_fifo()
        found[str(path.relative_to(folder))] = (status.st_mode, digest(path.read_bytes()) if readable else "")
    return found


@contextlib.contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    before = snapshot(folder)
    yield
    assert snapshot(folder) == before, "the attack changed a file"


@contextlib.contextmanager
def unread(*secrets: Path) -> Iterator[None]:
    """Nobody, in this process or another, opens one of the files meanwhile (told by inotify)."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    assert fd >= 0
    try:
        for path in secrets:
            assert libc.inotify_add_watch(fd, os.fsencode(path), 0x21) >= 0  # IN_ACCESS | IN_OPEN
        yield
        try:
            events = os.read(fd, 4096)
        except BlockingIOError:
            events = b""
        assert not events, f"a file outside of the bank was opened: {struct.unpack_from('iIII', events)}"
    finally:
        os.close(fd)


@contextlib.contextmanager
def memory_bounded(limit: int = MEMORY) -> Iterator[None]:
    """The resident memory of this process does not peak by more than `limit` bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
    before = _status("VmRSS")
    yield
    grown = _status("VmHWM") - before
    assert grown <= limit, f"memory grew by {grown >> 20} MiB"


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def assert_damaged(bank: Path, part: str, message: str, *, sandbox: bool = True) -> VerifyReport:
    """`verify` names `part` and says `message`, in this process and in the sandbox; nothing is written meanwhile."""
    with nothing_written(bank), memory_bounded():
        report = verify(bank, deep=True)
    assert message in "; ".join(report.problems.get(part, [])), report.problems
    try:
        report.raise_if_damaged()
    except BankError as error:
        assert error.exit_code == 3 and len(str(error)) < 5000
    if sandbox:
        with nothing_written(bank):
            boxed = verify(bank, deep=True, untrusted=True)
        assert boxed.problems == report.problems and boxed.notes == report.notes
    return report


def read_all(bank: Path) -> int:
    """Every row of every column through the reader, as a consumer would; the number of rows."""
    opened = Bank(bank)
    for name in opened.columns:
        assert len(opened.column(name)) == len(opened)
    opened.batch(range(len(opened)), columns=opened.columns)
    opened.info()
    return len(opened)
