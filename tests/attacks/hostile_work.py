"""Parsers that misbehave, run by the sandbox's child in place of its real work (see test_sandbox.py)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import time
from pathlib import Path
from typing import Any

from synthkit.bank.checking.sandbox import Reporter
from synthkit.bank.checking.verify import Findings


def segfault(request: dict[str, Any], reporter: Reporter) -> None:
    """Dies in shard 3; the others are fine."""
    for name in ("shard 2", "shard 3", "shard 4"):
        if reporter.begin(name):
            if name == "shard 3":
                ctypes.string_at(0)
            reporter.end(name, Findings())


def segfault_at_once(request: dict[str, Any], reporter: Reporter) -> None:
    ctypes.string_at(0)


def abort(request: dict[str, Any], reporter: Reporter) -> None:
    if reporter.begin("shard 0"):
        os.abort()


def crash_everywhere(request: dict[str, Any], reporter: Reporter) -> None:
    for index in range(100):
        if reporter.begin(f"shard {index}"):
            ctypes.string_at(0)


def allocate(request: dict[str, Any], reporter: Reporter) -> None:
    if reporter.begin("shard 0"):
        hoard = []
        while True:
            hoard.append(bytearray(64 << 20))


def allocate_in_c(request: dict[str, Any], reporter: Reporter) -> None:
    """malloc says no and the parser uses the null pointer."""
    if reporter.begin("shard 0"):
        malloc = ctypes.CDLL(None).malloc
        malloc.restype = ctypes.c_void_p
        ctypes.memset(malloc(ctypes.c_size_t(1 << 40)), 1, 8)


def loop(request: dict[str, Any], reporter: Reporter) -> None:
    if reporter.begin("shard 0"):
        while True:
            pass


def sleep(request: dict[str, Any], reporter: Reporter) -> None:
    if reporter.begin("shard 0"):
        time.sleep(1000)


def untyped(request: dict[str, Any], reporter: Reporter) -> None:
    if reporter.begin("shard 0"):
        raise ZeroDivisionError("a bug of ours")


def leave(request: dict[str, Any], reporter: Reporter) -> None:
    if reporter.begin("shard 0"):
        os._exit(0)


def write_garbage(data: bytes) -> Any:
    def work(request: dict[str, Any], reporter: Reporter) -> None:
        if reporter.begin("shard 0"):
            with contextlib.suppress(BrokenPipeError):
                os.write(request["fd"], data)
                time.sleep(0.2)
            os._exit(0)

    return work


GARBAGE = {
    "bytes": b"\xff\xfe\x00garbage\n", "json": b"[1, 2]\n", "unknown": b'{"say": "hello"}\n',
    "other_end": b'{"say": "end", "part": "shard 7", "problems": {}, "notes": [], "bytes_read": 0}\n',
    "negative": b'{"say": "end", "part": "shard 0", "problems": {}, "notes": [], "bytes_read": -1}\n',
    "numbers": b'{"say": "opened", "planned": 1e9, "committed": []}\n',
    "ranges": b'{"say": "opened", "planned": 5, "committed": [[0, 1000000]]}\n',
    "shape": b'{"say": "end", "part": "shard 0", "problems": [], "notes": [], "bytes_read": 0}\n',
    "deep": b'{"say": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
}  # fmt: skip
globals().update({f"garbage_{name}": write_garbage(data) for name, data in GARBAGE.items()})


def endless_line(request: dict[str, Any], reporter: Reporter) -> None:
    if reporter.begin("shard 0"):
        with contextlib.suppress(BrokenPipeError):
            while True:
                os.write(request["fd"], b"x" * 65536)


def explore(request: dict[str, Any], reporter: Reporter) -> None:
    """Tries what an attacker who runs code would try, and reports what worked."""
    found = Findings()
    targets = request["path"]
    reporter.begin("tries")
    open_now = []
    for number in range(3, 1024):
        with contextlib.suppress(OSError):
            os.fstat(number)
            open_now.append(number)
    found.note(f"descriptors: {open_now} of which ours {request['fd']}")
    for name, act in {
        "write in the bank": lambda: Path(targets, "owned").write_bytes(b"x"),
        "write in /tmp": lambda: Path("/tmp/synthkit-owned").write_bytes(b"x"),
        "truncate": lambda: os.truncate(f"{targets}/bank.json", 0),
        "remove": lambda: os.unlink(f"{targets}/bank.json"),
        "rename": lambda: os.rename(f"{targets}/bank.json", f"{targets}/x"),
        "read outside": lambda: Path(targets, "../secret").read_bytes(),
        "read passwd": lambda: Path("/etc/passwd").read_bytes(),
        "connect": lambda: socket.create_connection(("127.0.0.1", int(Path(targets, "port").read_text())), 2),
        "many files": lambda: [os.open(f"{targets}/bank.json", os.O_RDONLY) for _ in range(100)],
        "more memory": lambda: __import__("resource").setrlimit(__import__("resource").RLIMIT_AS, (1 << 50, 1 << 50)),
    }.items():  # fmt: skip
        try:
            act()
        except (OSError, ValueError):
            continue
        found.problem("tries", name)
    found.note("environment: " + ",".join(sorted(os.environ)))
    found.note(f"folder: {os.getcwd()}")
    reporter.end("tries", found)
