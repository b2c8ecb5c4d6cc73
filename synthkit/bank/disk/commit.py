"""The commit protocol: a data file and the record that makes it exist.

temp -> sha256 -> fsync -> rename -> fsync of the folder -> record temp -> fsync -> rename -> fsync of the folder. The
record is the commit point; a data file without one does not exist. Nothing that another run published is replaced, not
even by a run that stood still for an hour in the middle of this and then goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from synthkit.bank.disk.storage import make_folder, publish, publish_new, sync_folder, temp_path
from synthkit.bank.errors import BankBusyError
from synthkit.bank.shard import file_sha256


class Beaten(BankBusyError):
    """Another run committed the same file in the meantime; this run changed nothing."""


def commit(
    path: Path,
    data: bytes | memoryview,
    text: bytes,
    fence: Callable[[], None] = lambda: None,
    *,
    sha256: str | None = None,
) -> None:
    """Publish `data` as `path` and then `text` as its record (`path` with the suffix .json).

    `fence` is called before each of the two steps and raises when this run may no longer publish; `sha256` is that of
    `data` where the caller knows it already.

    Raises:
        Beaten: another run committed, or is committing, `path`; what it wrote stays.
        OSError: disk full and the like; then there is no record, and no data file of this run.
    """
    record = path.with_suffix(".json")
    digest = sha256 or hashlib.sha256(data).hexdigest()
    make_folder(path.parent)  # once: a folder that vanishes later is not made anew, without what was in it
    fence()
    mine = _place(path, data, record, digest)
    try:
        sync_folder(path.parent)  # the data's name is safe before the record can be
        fence()
        try:
            publish(record, text, new=True, make=False)
        except FileExistsError:
            if not _is(path, mine, digest):
                raise _beaten(path) from None
            publish(record, text, make=False)  # the record of a run whose bytes are no longer there: it described none
        sync_folder(path.parent)
        if not _is(path, mine, digest):
            raise _beaten(path)
    except BaseException:
        if not record.exists() and _is(path, mine, digest):
            with contextlib.suppress(OSError, Beaten):  # never in the way of the error that led here
                _take_away(path, record)
        raise
    finally:
        os.close(mine)


def _place(path: Path, data: bytes | memoryview, record: Path, digest: str) -> int:
    """Publish the data file, never over another one; returns its descriptor, which tells it from others."""
    for _ in range(3):
        if os.path.lexists(path):
            _take_away(path, record)
        try:
            return publish(path, data, new=True, keep=True, make=False)
        except FileExistsError:
            continue
        except BaseException:  # interrupted after the rename, before anyone could be told of it
            if not record.exists() and holds(path, digest):
                with contextlib.suppress(OSError, Beaten):
                    _take_away(path, record)
            raise
    raise _beaten(path)


def _take_away(path: Path, record: Path) -> None:
    """Remove a data file that has no record: what a killed run left. With a record, it stays: raises `Beaten`.

    It is moved aside before the record is looked for: a run that is suspended between looking and removing would
    otherwise remove what was committed in the meantime.
    """
    if record.exists():
        raise _beaten(path)
    aside = temp_path(path)
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if record.exists():
        with contextlib.suppress(FileExistsError):
            publish_new(aside, path)
        raise _beaten(path)
    aside.unlink(missing_ok=True)


def _is(path: Path, mine: int, digest: str) -> bool:
    """Whether `path` is still the file that is open as `mine` (or, where inodes are no guide, has its content)."""
    try:
        if os.path.samestat(os.lstat(path), os.fstat(mine)):
            return True
    except FileNotFoundError:
        return False
    return holds(path, digest)


def holds(path: Path, digest: str) -> bool:
    """Whether there is a file `path` with the sha256 `digest`."""
    try:
        return file_sha256(path) == digest
    except FileNotFoundError:
        return False


def _beaten(path: Path) -> Beaten:
    return Beaten(f"{path}: another run made it at the same time; its version stands, this one was not written",
                  hint="start runs of one bank with --shards I/N, each with its own I")  # fmt: skip
