"""Publishing files so that a reader sees a whole file or none: temp, fsync, rename, fsync of the folder.

Its companion `jsonfile` reads and writes the JSON records; its names can be had from here too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from synthkit.bank.disk.jsonfile import MAX_JSON_BYTES as MAX_JSON_BYTES
from synthkit.bank.disk.jsonfile import canonical_hash as canonical_hash
from synthkit.bank.disk.jsonfile import dump_json as dump_json
from synthkit.bank.disk.jsonfile import parse_json as parse_json
from synthkit.bank.disk.jsonfile import plain as plain
from synthkit.bank.disk.jsonfile import read_json as read_json
from synthkit.bank.disk.jsonfile import regular_size as regular_size
from synthkit.bank.errors import BankNotFoundError
from synthkit.errors import BankError, OutputExistsError, StorageError

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    getattr(errno, "EDQUOT", -1): "the disk quota is used up; free some space",
    errno.EFBIG: "the file size limit is reached (see `ulimit -f`)",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "no permission to write there; choose another folder",
    errno.EPERM: "no permission to write there; choose another folder",
    errno.ENOENT: "the folder vanished while the run was writing",
}
_DISK = (errno.ENOSPC, getattr(errno, "EDQUOT", -1), errno.EFBIG, errno.EROFS, errno.EIO)
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, getattr(errno, "EOPNOTSUPP", -1))
MANY_FILES = 200
_mine: set[str] = set()  # temporaries that this very process is writing


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


def publish(path: Path, data: bytes | memoryview, *, new: bool = False, keep: bool = False, make: bool = True) -> int:
    """Write `data` to a temporary, fsync it and rename it to `path`. The caller syncs the folder.

    Its folder is made if need be, unless `make` is off. With `new` an existing `path` is never replaced. With `keep`
    the file is left open and its descriptor returned (-1 otherwise): while it is open, no other file has its inode.

    Raises:
        FileExistsError: `new`, and there is a `path`.
        OSError: as the system said it; the temporary is gone then.
    """
    if make:
        make_folder(path.parent)
    temp, kept = temp_path(path), -1
    _mine.add(str(temp.absolute()))
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            kept = os.dup(stream.fileno()) if keep else -1
        if new:
            publish_new(temp, path)
        else:
            os.rename(temp, path) if os.name == "posix" else os.replace(temp, path)
    except BaseException:  # also Ctrl-C: a temporary never stays behind while the process can still remove it
        if kept >= 0:
            os.close(kept)
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise
    finally:
        _mine.discard(str(temp.absolute()))
    return kept


def make_folder(path: Path) -> None:
    """Make the folder `path` and its parents; each new name is fsynced, so that a power cut cannot take it back."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def staged(target: str | Path, *, folder: bool = True) -> Iterator[Path]:
    """Make `target` whole or not at all: the body fills the yielded path, which is renamed to `target` at the end.

    The path is a hidden sibling `.<name>.tmp-<host>-<pid>`. With `folder` it is an empty folder already; without,
    it does not exist yet and the body must write one file there. Everything in it is fsynced before the rename, and
    the parent after it. When the body raises anything (Ctrl-C too) it is removed; what a killed process left is removed
    by the next call.

    Raises:
        OutputExistsError: `target` exists (an empty folder may, when a folder is made), before or after the body.
        StorageError: disk full, no permission and the like, also in the body.
    """
    target = Path(target)
    require_free(target, folder=folder)
    target = Path(os.path.realpath(target)) if target.is_symlink() else target.absolute()
    staging = target.with_name(f".{target.name}.tmp-{host()}-{os.getpid()}")
    if str(staging) in _mine:
        raise OutputExistsError(f"{target}: is being made by this process already", hint="choose another --out")
    with storage_errors("output", target):
        make_folder(target.parent)
        clean_stale_temps(target.parent, f".{target.name}")
        if folder:
            staging.mkdir()
    _mine.add(str(staging))
    try:
        with _disk_errors(target, staging):
            yield staging
        with storage_errors("output", target):
            sync_tree(staging)
            _move_into_place(staging, target)
            sync_folder(target.parent)
    finally:
        _mine.discard(str(staging))
        _remove(staging)


def require_free(target: Path, *, folder: bool = True) -> None:
    """Refuse a `target` that exists; an empty folder may when a folder is to be made. Raises `OutputExistsError`."""
    hint = "choose another --out; nothing is overwritten"
    if not os.path.lexists(target):
        return
    if not target.exists():
        raise OutputExistsError(f"{target}: is a link to nothing", hint=hint)
    if not target.is_dir():
        raise OutputExistsError(f"{target}: is a file that exists already", hint=hint)
    if not folder:
        raise OutputExistsError(f"{target}: is a folder; a file is written", hint=hint)
    if os.path.ismount(target):
        raise OutputExistsError(
            f"{target}: is a mounted disk, which cannot be replaced", hint="name a folder inside it"
        )
    with storage_errors("output", target):
        inside = next(target.iterdir(), None)
    if inside is not None:
        raise OutputExistsError(f"{target}: is not empty (it holds {inside.name})", hint=hint)


@contextlib.contextmanager
def _disk_errors(target: Path, staging: Path) -> Iterator[None]:
    """Turn disk trouble of the body into a `StorageError`; an `OSError` about another file (a source) passes."""
    try:
        yield
    except OSError as error:
        ours = isinstance(error.filename, str) and Path(error.filename).is_relative_to(staging)
        if error.errno not in _DISK and not ours:
            raise
        reason = _REASONS.get(error.errno or 0, str(error))
        raise StorageError(f"output: cannot write {target}: {reason}", hint="no part of it was left behind") from error


def _move_into_place(staging: Path, target: Path) -> None:
    try:
        if staging.is_dir():
            os.rename(staging, target)  # POSIX: replaces an empty folder, refuses anything else
        else:
            publish_new(staging, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            what = f"{target}: appeared while it was being made; it was not touched"
            raise OutputExistsError(what, hint="choose another --out") from error
        raise


def publish_new(temp: Path, path: Path) -> None:
    """Rename `temp` to `path` unless there is a `path` already.

    Raises:
        FileExistsError: there is; `temp` stays. OSError: as the system said it.
    """
    try:
        os.link(temp, path)  # unlike rename, it never replaces
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "exists already", str(path)) from None
        os.rename(temp, path)
    else:
        temp.unlink()


def sync_tree(path: Path) -> None:
    """fsync the file `path`, or every file and folder in the folder `path` and itself."""
    if not path.is_dir():
        _sync_file(path)
        return
    rows = list(os.walk(path, topdown=False))
    if sum(len(files) for _, _, files in rows) > MANY_FILES and sync_file_system(path):
        return
    for folder, _, files in rows:
        for name in files:
            file = Path(folder, name)
            if not file.is_symlink():
                _sync_file(file)
        sync_folder(Path(folder))


def sync_file_system(path: Path) -> bool:
    """Put the whole file system of `path` on disk with one call; False where that cannot be done or reports no errors.

    Measured on ext4: 20,000 files of 2.3 kB took 0.6 s so, and 34 to 51 s with an fsync for each (a journal commit
    each), whether a sweep went before them or not.

    Raises:
        OSError: something could not be written (Linux tells so since 5.8).
    """
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    if sys.platform != "linux" or not release or (int(release[1]), int(release[2])) < (5, 8):
        return False
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        return False
    fd = os.open(path, os.O_RDONLY)
    try:
        if syncfs(fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(fd)
    return True


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    """Take a temporary away as far as possible: never in the way of the error that led here."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the renames in it survive a power cut (POSIX; a no-op elsewhere)."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def clean_stale_temps(folder: Path, name: str | None = None) -> list[Path]:
    """Remove temporaries in `folder` (of the file `name` alone, if given) whose writer on this machine is dead.

    Another machine's temporaries are left alone: whether their writer lives cannot be known from here. Returns what
    was removed.
    """
    removed: list[Path] = []
    if not folder.is_dir():
        return removed
    for path in folder.iterdir():
        match = re.fullmatch(r"(.+)\.tmp-(.+)-(\d+)", path.name)
        ours = match and match[2] == host() and name in (None, match[1])
        if match and ours and not _writer_alive(int(match[3]), path):
            _remove(path)
            removed.append(path)
    return removed


def _writer_alive(pid: int, path: Path) -> bool:
    if pid == os.getpid():
        return str(path.absolute()) in _mine  # else a dead namesake's: a container gives every run the same pid
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


def names_in(folder: Path, *, follow: bool = False) -> list[str]:
    """Names in a folder of a bank, sorted; none when it does not exist. `follow`: it may be a link (the user's own).

    Raises:
        BankError: it is a link (which could lead anywhere) or no folder, or it cannot be read.
    """
    try:
        if not stat.S_ISDIR(os.stat(folder, follow_symlinks=follow).st_mode):
            raise BankError(f"{folder}: not a folder", hint="a bank holds plain folders and files only, no links")
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BankError(f"{folder}: cannot be read: {error.strerror}") from error


def require_bank(path: Path) -> None:
    """Raise `BankNotFoundError` unless `path` holds a `bank.json`."""
    try:
        found = os.path.lexists(path / "bank.json")  # a link or device is found here and refused when it is read
    except ValueError:  # a NUL in the path
        found = False
    if not found:
        what = "no such folder" if not os.path.exists(path) else "not a bank (it has no bank.json)"
        raise BankNotFoundError(f"{path}: {what}", hint="make one with: synthkit synthesize --teacher ... --out DIR")
