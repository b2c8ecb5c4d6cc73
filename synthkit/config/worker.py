"""Which part of the shards a process makes: the option `--shards I/N`."""

from __future__ import annotations

import re

from synthkit.errors import ConfigError


def worker_of(text: str) -> tuple[int, int]:
    """(I, N) of "I/N", I from 1 to N. Raises `ConfigError`."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError("shards: must be I/N with I from 1 to N", got=text,
                          hint="for example --shards 3/8 for the third of eight workers")  # fmt: skip
    return int(found[1]), int(found[2])


def shards_of(worker: tuple[int, int] | None, total: int) -> range:
    """The shards of a worker (I, N), or all."""
    return range(total) if worker is None else range(worker[0] - 1, total, worker[1])
