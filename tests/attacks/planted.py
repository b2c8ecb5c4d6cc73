"""Readers with planted faults, for the fuzzer to find (see test_fuzz.py)."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

from synthkit.bench.fuzz_mutate import flip_bits
from synthkit.bench.fuzz_targets import Broken, Target

_hoard: list[bytearray] = []


class Stage:
    """One target per fault; every one accepts 0, refuses 1, and has its fault at a byte of 0x2x."""

    def __init__(self, path: Path):
        self.path = path

    def targets(self) -> list[Target]:
        return [Target(name, 0.2, [b"\0\0\0\0"], [flip_bits], _reader(name))
                for name in ("honest", "untyped", "crash", "hang", "memory", "broken", "leak")]  # fmt: skip


def _reader(fault: str):
    def run(data: bytes) -> bool:
        if not any(byte & 0x20 for byte in data):
            return not data[0]
        if fault == "untyped":
            raise KeyError("not a BankError")
        if fault == "crash":
            ctypes.string_at(0)
        if fault == "hang":
            time.sleep(100)
        if fault == "memory":
            bytearray(8 << 30)
        if fault == "leak":
            _hoard.append(bytearray(b"x") * (1 << 20))
        if fault == "broken":
            raise Broken("accepted, but not harmless")
        return True

    return run
