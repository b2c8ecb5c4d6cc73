"""What a process can give up before it parses a stranger's file: memory, time, writing, files, processes, network.

Every step says whether it took hold, so that a report never claims a guard that is not there. POSIX limits hold on
Linux and macOS; the network namespace and Landlock (a Linux security module that any process may use on itself) only on
Linux kernels that have them. There is no system-call filter (seccomp).
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass

# Landlock (linux/landlock.h); the three system calls have these numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # ABI -> how many file-system rights it knows; later ones add none
_NET_TCP = 0b11  # bind, connect: from ABI 4
_SCOPES = 0b11  # abstract sockets, signals: from ABI 6
_NO_NEW_PRIVS, _CLONE_NEWUSER, _CLONE_NEWNET = 38, 0x10000000, 0x40000000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a confined process may use."""

    memory: int
    """Bytes of address space."""
    cpu_seconds: int
    """Processor time."""
    files: int = 32
    """Open files."""


def confine(limits: Limits, readable: Iterable[str]) -> list[str]:
    """Give up, for good, all that this process does not need; returns what is in force, in words.

    Args:
        limits: numbers for the kernel.
        readable: folders and files that may still be read (where Landlock exists; elsewhere all that the user may).
    """
    guards = _rlimits(limits)
    if not sys.platform.startswith("linux"):
        return guards
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        guards.append("no new privileges")
    # As root a network namespace is had at once; as a user only together with a user namespace.
    if libc.unshare(_CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
        guards.append("no network")
    guards += _landlock(libc, readable)
    return guards


def _rlimits(limits: Limits) -> list[str]:
    import resource

    wanted = {
        "RLIMIT_CORE": (0, "no core dump"),
        "RLIMIT_FSIZE": (0, "no file can grow"),
        "RLIMIT_NOFILE": (limits.files, f"{limits.files} open files"),
        "RLIMIT_CPU": (limits.cpu_seconds, f"{limits.cpu_seconds} s of processor time"),
        "RLIMIT_AS": (limits.memory, f"{limits.memory >> 20} MiB of memory"),
        "RLIMIT_NPROC": (0, "no new processes"),
    }
    guards = []
    for name, (value, words) in wanted.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        grace = 5 if name == "RLIMIT_CPU" and hard == resource.RLIM_INFINITY else 0  # first SIGXCPU, which names itself
        try:
            resource.setrlimit(kind, (value, value + grace))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS; what is not in force is not listed
            continue
        if name == "RLIMIT_NPROC" and os.geteuid() == 0:
            continue  # root is not bound by it
        guards.append(words)
    return guards


class _RulesetAttr(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def _landlock(libc: ctypes.CDLL, readable: Iterable[str]) -> list[str]:
    if platform.machine() not in ("x86_64", "aarch64"):
        return []
    abi = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if abi < 1:  # no Landlock in this kernel
        return []
    rights = (1 << _FS_BITS.get(abi, 16)) - 1
    attr = _RulesetAttr(rights, _NET_TCP if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(attr), size, 0)
    if ruleset < 0:
        return []
    try:
        for place in readable:
            _allow_reading(libc, ruleset, place)
        if libc.syscall(_RESTRICT_SELF, ruleset, 0) != 0:
            return []
    finally:
        os.close(ruleset)
    found = ["nothing can be written, made, renamed or removed", "only the bank and synthkit's libraries can be read"]
    return [*found, "no TCP"] if abi >= 4 else found


def _allow_reading(libc: ctypes.CDLL, ruleset: int, place: str) -> None:
    try:
        fd = os.open(place, getattr(os, "O_PATH", os.O_RDONLY) | os.O_CLOEXEC)
    except OSError:  # a folder on the module path that does not exist needs no right
        return
    try:
        rule = _PathBeneath(_READ_FILE | (_READ_DIR if os.path.isdir(place) else 0), fd)
        libc.syscall(_ADD_RULE, ruleset, 1, ctypes.byref(rule), 0)
    finally:
        os.close(fd)
