"""Who makes which shards: claims that name their holder, that no dead holder keeps, and that can be lost.

A claim is a file in state/claims/ which its holder keeps open under an advisory lock and in which a daemon thread
counts up every few seconds. Whether a holder lives is told by

- the kernel, on one machine (the lock of a killed process is free at once), and
- the counter, between machines: it is watched for a while on the monotonic clock. No wall clock is compared anywhere.

A holder that was suspended for long may thus lose its claim to another machine; `Claim.check`, called before every
publication, tells it so.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkit.bank.disk.ranges import as_ranges, describe, overlap
from synthkit.bank.disk.storage import (
    clean_stale_temps,
    host,
    make_folder,
    names_in,
    pid_alive,
    storage_errors,
    temp_path,
)
from synthkit.bank.errors import BankBusyError
from synthkit.errors import StorageError

try:
    import fcntl
except ImportError:  # Windows: pid and counter decide
    fcntl = None

HEARTBEAT = 5.0  # seconds between two counts
PATIENCE = 30.0  # seconds without a count after which a holder on another machine is taken for dead
MUTEX_WAIT = 30.0
MAX_CLAIM_BYTES, MAX_RANGES = 1 << 20, 10_000
_POLL = 0.25
_held: weakref.WeakSet[Claim] = weakref.WeakSet()


@dataclass(frozen=True)
class Holder:
    """What a claim file says."""

    path: Path
    data: bytes
    """The file as it was read; unlike a time, it can be compared between machines."""
    facts: dict[str, Any]

    @property
    def shards(self) -> tuple[range, ...] | None:
        """The claimed shards; None is the whole bank (also where a file cannot be understood)."""
        rows = self.facts.get("shards")
        if not isinstance(rows, list) or len(rows) > MAX_RANGES:
            return None
        with contextlib.suppress(TypeError, ValueError):  # from a stranger's file: then it counts as the whole bank
            parts = tuple(range(a, b, c) for a, b, c in rows)
            if all(0 <= part.start <= part.stop < 2**40 and part.step > 0 for part in parts):
                return parts
        return None

    @property
    def name(self) -> str:
        """ "pid 12 on host a"."""
        return f"pid {self.facts.get('pid', 'unknown')} on host {self.facts.get('host', 'unknown')}"

    @property
    def on_this_machine(self) -> bool:
        """Whether it runs under this very kernel boot: two machines may share a host name."""
        boot = _boot_id()
        if boot is not None and self.facts.get("boot") is not None:
            return self.facts["boot"] == boot
        return self.facts.get("host") == host()


class Claim:
    """Some shards (or the whole bank) that this process alone makes, until it is released or lost."""

    def __init__(self, bank: Path, shards: Sequence[int] | None):
        self.bank = bank
        self.shards = None if shards is None else as_ranges(shards)
        self.label = "the whole bank" if self.shards is None else describe(self.shards)
        self.token = uuid.uuid4().hex
        self.path = _folder(bank) / f"{self.token}.json"
        self._count, self._fd, self._stop = 0, -1, threading.Event()
        self._thread: threading.Thread | None = None

    def covers(self, index: int) -> bool:
        """Whether shard `index` belongs to it."""
        return self.shards is None or any(index in part for part in self.shards)

    def check(self) -> None:
        """Raise `BankBusyError` when another run has taken the claim over, `StorageError` when the bank is gone."""
        with contextlib.suppress(FileNotFoundError):
            # opened, not looked up: a network file system may remember for a minute that a file was there
            os.close(os.open(self.path, os.O_RDONLY))
            return
        if not any((self.bank / record).exists() for record in ("bank.json", "labels.json")):  # a label set has claims
            raise StorageError(f"{self.bank}: the bank's folder vanished while the run was writing")
        heirs = [h.name for h in read_claims(self.bank) if overlap(self.shards, h.shards)]
        taker = f"by {heirs[0]}" if heirs else "by a run that has ended since"
        raise BankBusyError(
            f"{self.bank}: the claim on {self.label} was taken over {taker} while this process stood still",
            hint="nothing was overwritten; go on with --resume when that run is done",
        )

    def publish(self) -> None:
        """Put the claim file in place, locked before anyone can see it, and begin to count."""
        facts = {
            "beat": f"{0:012d}", "pid": os.getpid(), "host": host(), "boot": _boot_id(), "namespace": _namespace(),
            "token": self.token, "label": self.label,
            "shards": None if self.shards is None else [[r.start, r.stop, r.step] for r in self.shards],
        }  # fmt: skip
        temp = temp_path(self.path)
        with storage_errors("claim", self.path):
            self._fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o644)
            try:
                _try_flock(self._fd)
                os.write(self._fd, json.dumps(facts).encode())
                os.fsync(self._fd)
                os.rename(temp, self.path)
            except BaseException:
                temp.unlink(missing_ok=True)
                self.release()
                raise
        _held.add(self)
        self._thread = threading.Thread(target=self._beat, name="synthkit-claim", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            self._count += 1
            # In place, at a fixed offset: readers see the old count or the new. A disk that refuses even this does not
            # stop the run: another machine may then take the claim over, which `check` finds before anything is lost.
            with contextlib.suppress(OSError):
                os.lseek(self._fd, len('{"beat": "'), os.SEEK_SET)
                os.write(self._fd, b"%012d" % self._count)
                os.fsync(self._fd)  # a network file system shows it to others only now

    def release(self) -> None:
        """Give the shards free."""
        if self._fd < 0:
            return  # not taken, or a forked child's copy
        self._stop.set()
        if self._thread is not None and self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        with contextlib.suppress(OSError):  # the folder may be gone or read-only by now; a dead claim blocks no one
            self.path.unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """Close the file without touching what it says (in a forked child, which does not hold the claim)."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        _held.discard(self)


def _after_fork() -> None:
    """A forked child must not keep its parent's kernel lock alive."""
    for claim in list(_held):
        claim.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def claim(
    bank: Path, shards: Sequence[int] | None = None, *, say: Callable[[str], None] | None = None
) -> Iterator[Claim]:
    """Hold `shards` of the bank at `bank` (none: the whole bank) for the duration of the block.

    A claim of a dead process of this machine is removed at once. One of another machine is watched until its counter
    moves (then it is refused) or `PATIENCE` is over (then it is taken over); `say` (default: standard error) tells so.

    Raises:
        BankBusyError: a living run claims one of the shards; the message names its pid, host and shards.
        StorageError: nothing can be written there.
    """
    mine = Claim(bank, shards)
    with storage_errors("claim", mine.path):
        if not bank.is_dir():  # never made anew: it vanished
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(bank))
        for folder in (bank / "state", mine.path.parent):
            names_in(folder)  # refuses a link in a stranger's bank: nothing is written outside
        make_folder(mine.path.parent)
        clean_stale_temps(mine.path.parent)
    silent: dict[Path, bytes] = {}  # claims of other machines, and what they said when they were last seen to be still
    try:
        while True:
            with _mutex(bank):
                if mine._thread is None:
                    mine.publish()
                others = [h for h in read_claims(bank) if h.path != mine.path]
                rivals = [h for h in others if overlap(mine.shards, h.shards)]
                for holder in others:
                    if holder not in rivals and holder.on_this_machine and _probe(holder.path) == "free":
                        holder.path.unlink(
                            missing_ok=True
                        )  # dead and in nobody's way; else it would lie there for ever
                unknown = [h for h in rivals if not _settle(bank, h, silent)]
            if not unknown:
                break
            for holder in unknown:  # outside the mutex: others claim meanwhile
                _watch(bank, holder, say or _say)
                silent[holder.path] = holder.data
        yield mine
    finally:
        mine.release()


def _settle(bank: Path, holder: Holder, silent: dict[Path, bytes]) -> bool:
    """Remove the claim of a dead holder (True), refuse for a living one, or return False: it must be watched."""
    local, lock = holder.on_this_machine, _probe(holder.path)
    if lock == "gone":
        return True
    if lock == "held":
        raise busy(bank, holder)
    if (local and (lock == "free" or _process_gone(holder))) or silent.get(holder.path) == holder.data:
        with storage_errors("claim", holder.path):
            holder.path.unlink(missing_ok=True)
        return True
    return False


def busy(bank: Path, holder: Holder) -> BankBusyError:
    """The error that names who holds what."""
    what = "this bank" if holder.shards is None else f"{describe(holder.shards)} of this bank"
    hint = "wait for it, or stop it and use --resume"
    return BankBusyError(f"{bank}: another run holds {what} ({holder.name})", hint=hint)


def _watch(bank: Path, holder: Holder, say: Callable[[str], None]) -> None:
    """Return when the counter stood still for `PATIENCE` or the claim went away; raise when it moved."""
    what = "the bank" if holder.shards is None else describe(holder.shards)
    say(f"{bank}: {what} is claimed by {holder.name}, on another machine; watching for {PATIENCE:.0f} s whether that"
        " run still lives")  # fmt: skip
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(_POLL, PATIENCE / 4))
        now = _read(holder.path)
        if now is None:
            return
        if now.data != holder.data:
            raise busy(bank, now)
    say(f"{bank}: {holder.name} gave no sign for {PATIENCE:.0f} s; its claim is taken over")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- files ---------------------------------------------------------------------------------------------------------


def _folder(bank: Path) -> Path:
    return bank / "state" / "claims"


def read_claims(bank: Path) -> list[Holder]:
    """All claims on the bank at `bank`, dead or alive."""
    folder = _folder(bank)
    if not folder.is_dir():
        return []
    found = [_read(path) for path in sorted(folder.glob("*.json"))]
    return [holder for holder in found if holder is not None]


def _read(path: Path) -> Holder | None:
    """The claim in `path`; None where it has gone. What cannot be understood claims the whole bank."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        data = os.read(fd, MAX_CLAIM_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(fd)
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        facts = {}
    return Holder(path, data, facts if isinstance(facts, dict) else {})


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: a claim that cannot be read ({error.strerror})", hint="remove it, then try again")


def _probe(path: Path) -> str:
    """What the kernel says of the lock on a claim file: held, free, unknown (it keeps none here) or gone."""
    if fcntl is None:
        return "unknown"
    try:
        fd = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))  # NFS locks only what is open for writing
    except FileNotFoundError:
        return "gone"
    except PermissionError:  # another user's
        return "unknown"
    try:
        taken = _try_flock(fd)
    finally:
        os.close(fd)
    return {True: "free", False: "held", None: "unknown"}[taken]


def _try_flock(fd: int) -> bool | None:
    """Take the advisory lock: True; False where another holds it; None where there are no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without advisory locks: pid and counter decide
        return None
    return True


@contextlib.contextmanager
def _mutex(bank: Path) -> Iterator[None]:
    """Serialise claiming on one machine (and between machines where the file system carries locks over)."""
    path = bank / "state" / "lock"
    with storage_errors("lock", path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        end = time.monotonic() + MUTEX_WAIT
        while _try_flock(fd) is False:
            if time.monotonic() > end:
                raise BankBusyError(f"{bank}: another run has been claiming this bank for {MUTEX_WAIT:.0f} s",
                                    hint="is a run suspended (Ctrl-Z)? continue or stop it")  # fmt: skip
            time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def _process_gone(holder: Holder) -> bool:
    """Whether its process surely no longer exists here; a pid means nothing in another container."""
    pid, same = holder.facts.get("pid"), holder.facts.get("namespace") == _namespace()
    return same and isinstance(pid, int) and not pid_alive(pid)


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
