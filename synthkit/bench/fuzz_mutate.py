"""Mutators of the fuzzer: pure functions of (random generator, seed files) to bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

EDGES = (0, 1, 2, 7, 8, 255, 256, 4095, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1,
         2**63, 2**64 - 1, 2**64, 10**30, 10**99, 10**120)  # fmt: skip
TEXTS = (
    "", "\0", "\n", "../../etc/passwd", "/etc/passwd", "\ud800", "é" * 40, "<script>", "a" * 3000, "0" * 64, "f" * 64,
    "nan", "<i4", "|u1", "<f2", "O", "|V8", "images", "labels", "__class__", "\x1b[2J", "=1+1", "2", "null",
)  # fmt: skip
RAW = (
    b"NaN",
    b"-Infinity",
    b"1e400",
    b"-1e999",
    b"0x10",
    b"9" * 5000,
    b"1.5",
    b"-0",
    b"01",
    b"\xff\xfe",
    b"\\ud800",
    b"[" * 5000 + b"]" * 5000,
)


def hostile_value(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value of any kind, of the sort that readers forget."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return rng.choice(EDGES) * rng.choice((1, -1)) + rng.choice((0, 0, 1, -1))
    if kind == 1:
        return rng.choice((0.0, -0.0, 0.5, 1.0, -1.5, 1e-320, 1e300, 1e308, -1e308, 2.0**63))
    if kind == 2:
        return rng.choice((None, True, False))
    if kind in (3, 4):
        return rng.choice(TEXTS)
    if kind == 5:
        return rng.choice(([], {}, [[]], {"": {}}, [None] * 100, list(range(300))))
    if kind == 6:
        return [hostile_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    if kind == 7:
        return {rng.choice(TEXTS): hostile_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    value: Any = hostile_value(rng, 3)
    for _ in range(rng.choice((1, 5, 60, 70, 200))):
        value = [value]
    return value


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside of `value`."""
    found: list[tuple[Any, Any]] = []
    front = [value]
    while front:
        node = front.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            front.append(node[key])
    return found


def mutate_json(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A record with one to three places changed: replaced, nudged, moved, removed, doubled or renamed."""
    record = json.loads(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spots = places(record)
        if not spots:
            break
        holder, key = rng.choice(spots)
        act = rng.randrange(7)
        if act <= 1:
            holder[key] = hostile_value(rng)
        elif act == 2 and isinstance(holder[key], (int, float)):
            holder[key] = _nudged(rng, holder[key])
        elif act == 3:
            other, where = rng.choice(spots)
            holder[key] = copy.deepcopy(other[where])  # a copy: a record that holds itself cannot be written
        elif act == 4:
            del holder[key]
        elif act == 5 and isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = holder.pop(key)
        elif isinstance(holder, list):
            holder.extend([holder[key]] * rng.choice((1, 3, 200)))
        else:
            holder[key] = hostile_value(rng)
    data = json.dumps(record).encode()
    if rng.random() < 0.1:  # what no serialiser writes: doubled keys, numbers that overflow
        data = data[:1] + b'"schema": 1, ' + data[1:] if rng.random() < 0.3 else _spliced(rng, data)
    return data


def _nudged(rng: random.Random, value: float) -> Any:
    step = rng.choice((1, -1, 2, 8, 64, 4096, 2**31, 2**32))
    return rng.choice(
        (value + step, value - step, -value, value * 2, value * 2**32, float(value), bool(value), str(value))
    )


def _spliced(rng: random.Random, data: bytes) -> bytes:
    """A number of the text exchanged for something that is none."""
    digits = [i for i, c in enumerate(data) if 48 <= c <= 57]
    if not digits:
        return data
    at = rng.choice(digits)
    return data[:at] + rng.choice(RAW) + data[at + 1 :]


def flip_bits(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One to eight bits anywhere."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Cut, or padded with what need not be there."""
    data = rng.choice(seeds)
    if rng.random() < 0.2:
        return data + rng.choice((b"\0", b"\n", b"x", data[:64])) * rng.choice((1, 16, 512))
    return data[: rng.randrange(len(data))]


def splice(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Pieces of two files, or one with a piece moved, doubled or taken out."""
    one, two = rng.choice(seeds), rng.choice(seeds)
    a, b = sorted(rng.randrange(len(one) + 1) for _ in range(2))
    kind = rng.randrange(4)
    if kind == 0:
        return one[:a] + two[rng.randrange(len(two)) :]
    if kind == 1:
        return one[:a] + one[b:]
    if kind == 2:
        return one[:b] + one[a:b] * rng.choice((1, 2, 9)) + one[b:]
    return one[:a] + two[a:b] + one[b:]


def edge_numbers(spans: Callable[[bytes], Sequence[range]]) -> Callable[[random.Random, Sequence[bytes]], bytes]:
    """A mutator that knows byte classes: it overwrites 1 to 8 bytes in one of `spans(data)` with edge numbers."""

    def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        data = bytearray(rng.choice(seeds))
        regions = [span for span in spans(bytes(data)) if len(span)]
        for _ in range(rng.choice((1, 1, 2, 4))):
            span = rng.choice(regions)
            at, size = rng.choice(span), rng.choice((1, 2, 4, 8))
            if rng.random() < 0.4:
                number = int.from_bytes(data[at : at + size], "little") + rng.choice((1, -1, 8, -8, 256, -256))
            else:
                number = rng.choice(EDGES)
            data[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "little")[: len(data) - at]
        return bytes(data)

    return mutate
