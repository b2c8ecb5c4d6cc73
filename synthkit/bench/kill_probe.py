"""Processes that are killed with SIGKILL, and what they tell of themselves until then through shared memory.

Forked from a warm parent, a process costs milliseconds. In the child every call that changes a name on the disk, or
waits for the disk, is counted; so a kill can be aimed at the n-th of them, and one at a moment of time says afterwards
where it hit.
"""

from __future__ import annotations

import mmap
import os
import re
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WATCHED = ("fsync", "sync", "rename", "replace", "link", "unlink", "mkdir", "rmdir", "copy_file_range")
_TEXT = 120
_KINDS = (
    (r"/state/claims|/state/mutex", "claim"), (r"/state/", "state"), (r"/generators/", "generator"),
    (r"/labels/[^/]+/\d+\.h5", "label shard"), (r"/labels/[^/]+/\d+\.json", "label record"), (r"/labels/", "label set"),
    (r"/quarantine/", "quarantine"), (r"/shards/\d+\.h5", "shard"), (r"/shards/\d+\.json", "record"),
    (r"bank\.json", "bank.json"), (r"manifest\.json", "manifest"), (r"README\.md", "card"),
    (r"/shards$", "folder of shards"), (r"\.(png|parquet|tar|npz|npy|csv|json|mds|bin)\b", "exported file"),
)  # fmt: skip


def kind_of(path: str) -> str:
    """What a path is in a bank or an export; temporaries count as what they become."""
    if re.search(r"/\.[^/]+\.tmp-[^/]+$", path):
        return "whole target"
    return next((kind for pattern, kind in _KINDS if re.search(pattern, path)), "other")


class Shared:
    """Shared memory of one victim: where it is, and which pieces of work it was told are done."""

    def __init__(self, pieces: int):
        self._text = mmap.mmap(-1, mmap.PAGESIZE)
        self._done = mmap.mmap(-1, max(1, pieces))

    def at(self, count: int, text: str) -> None:
        """Child: the `count`-th watched call, and its name."""
        data = text.encode()[:_TEXT]
        self._text[: 9 + _TEXT] = struct.pack("<QB", count, len(data)) + data.ljust(_TEXT, b"\0")

    def acknowledge(self, piece: int) -> None:
        """Child: the library has returned from making `piece`."""
        self._done[piece : piece + 1] = b"\1"

    @property
    def place(self) -> tuple[int, str]:
        """(number of watched calls begun, text of the last)."""
        count, length = struct.unpack("<QB", self._text[:9])
        return count, self._text[9 : 9 + length].decode(errors="replace") or "before it began"

    @property
    def acknowledged(self) -> set[int]:
        """The pieces that were acknowledged."""
        return {i for i, flag in enumerate(self._done[:]) if flag}


@dataclass(frozen=True)
class Order:
    """Die by SIGKILL right before, or right after, the `call`-th watched call."""

    call: int
    after: bool


def watch(shared: Shared, order: Order | None, trace: list[str]) -> None:
    """In the child: number the watched calls, put their names in `trace`, and carry out `order`."""

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            text = f"{name} {kind_of(_path(args))}"
            trace.append(text)
            number = len(trace)
            shared.at(number, f"in {text}")
            if order == Order(number, after=False):
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*args, **kwargs)
            finally:
                shared.at(number, f"after {text}")
                if order == Order(number, after=True):
                    os.kill(os.getpid(), signal.SIGKILL)

        return watched

    shared.at(0, "before the first file operation")
    for name in WATCHED:
        if hasattr(os, name):
            setattr(os, name, wrapped(name, getattr(os, name)))


def _path(args: tuple[Any, ...]) -> str:
    """The file that a call is about: its last path (of a rename: the new name is what it becomes)."""
    for value in reversed(args[:2]):
        if isinstance(value, (str, Path)):
            return str(value)
        if isinstance(value, int) and not isinstance(value, bool):
            try:
                return os.readlink(f"/proc/self/fd/{value}")
            except OSError:
                return ""
    return ""


class Victim:
    """A forked process that runs `work(shared)` and may be killed.

    Args:
        log: file for the traceback of a failure, or else for the names of the watched calls, one a line.
        order: when it kills itself; None: it does not.
    """

    def __init__(self, work: Callable[[Shared], None], log: Path, *, pieces: int = 1, order: Order | None = None):
        self.shared, self.log = Shared(pieces), log
        sys.stdout.flush()
        sys.stderr.flush()
        self.begun = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work, order)
        self.status: int | None = None
        self.seconds = 0.0

    def _run(self, work: Callable[[Shared], None], order: Order | None) -> None:
        code, trace = 1, []
        try:
            watch(self.shared, order, trace)
            work(self.shared)
            self.log.write_text("\n".join(trace))
            code = 0
        except BaseException:  # the child never returns into the parent's code; what went wrong is in the log
            self.log.write_text(traceback.format_exc())
        finally:
            os._exit(code)

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL at `seconds` of its life; False when it had ended before."""
        while (left := self.begun + seconds - time.perf_counter()) > 0:
            time.sleep(min(left, 0.005))
            if self.over():
                break
        if self.over():
            return False
        os.kill(self.pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
        return self.wait()

    def over(self) -> bool:
        """Whether it has ended."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._ended(status)
        return self.status is not None

    def wait(self) -> bool:
        """Wait for its end; True when SIGKILL ended it."""
        if self.status is None:
            self._ended(os.waitpid(self.pid, 0)[1])
        assert self.status is not None  # set just above
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL

    def _ended(self, status: int) -> None:
        self.status, self.seconds = status, time.perf_counter() - self.begun

    @property
    def failure(self) -> str | None:
        """Last line of the traceback when it failed by itself."""
        if self.status is None or os.WIFSIGNALED(self.status) or os.WEXITSTATUS(self.status) == 0:
            return None
        lines = self.log.read_text().strip().splitlines() if self.log.exists() else ["no traceback"]
        return lines[-1]
