"""What every export format is: a class with its options, an estimate, a writer, and how its files are read."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from synthkit.bank import card
from synthkit.bank.export.source import Source
from synthkit.errors import UsageError

A = TypeVar("A")
B = TypeVar("B")
FILE_BLOCK = 4096  # bytes that a small file takes at least


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """A format without options of its own."""


class Format:
    """One export format. A subclass sets the class variables and implements the four methods.

    Args:
        source: the rows.
        options: an instance of `Options`.
        workers: threads that encode.
    """

    Options: ClassVar[type] = NoOptions
    """Frozen keyword-only dataclass; its fields are the options of the command line, their docstrings the help."""
    carries: ClassVar[tuple[str, ...]] = ()
    """Columns of a bank that the format can hold; what a bank has beyond them is named in the notes."""

    def __init__(self, source: Source, options: Any, workers: int = 1):
        self.source, self.options, self.workers = source, options, workers
        self.notes: list[str] = []
        """What the user should know about this export; filled by `check`."""

    @property
    def columns(self) -> list[str]:
        """Columns that this export holds."""
        return [c for c in self.source.columns if c in self.carries]

    @property
    def file_count(self) -> int:
        """Files that are made, about; to be refused where the file system has no room for so many."""
        return 1

    title: str | None = None
    """Title of README.md; None makes one from method and teacher."""
    hub_files: str | None = None
    """Pattern of the files that Hugging Face's `load_dataset` reads as rows; None: it cannot read this format."""
    hub_split = "train"
    """Name of the split that those files make."""

    def front(self) -> dict[str, Any]:
        """Metadata block of README.md. Without its `configs`, `load_dataset` may take synthkit.json for the rows."""
        source = self.source
        block = card.front_matter(source.spec, source.bank.record, source.bank.sidecars, name=self.title)
        if self.hub_files is None:
            return {**block, "viewer": False}
        files = [{"split": self.hub_split, "path": self.hub_files}]
        return {**block, "configs": [{"config_name": "default", "data_files": files}]}

    def check(self) -> None:
        """Refuse what cannot be exported, before anything is written. Raises `UsageError`."""

    def estimate(self) -> int:
        """Bytes of the export (and of what it needs beside it while it is made), rather too many than too few."""
        raise NotImplementedError

    def write(self, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
        """Write the files into the empty `folder`.

        Args:
            advance: called with the number of rows done since the last call; all calls sum to `passes` x rows.

        Returns:
            Facts for synthkit.json; the same for the same bank and options.
        """
        raise NotImplementedError

    def usage(self) -> str:
        """Python lines that read the export, asked for after `write`; nothing from a bank may stand in them."""
        raise NotImplementedError

    def passes(self) -> int:
        """How often the rows are gone through."""
        return 1


def in_order(pieces: Iterable[A], work: Callable[[A], B], workers: int) -> Generator[B, None, None]:
    """`work` of every piece, in order, from `workers` threads; at most 2 x workers + 1 pieces are in flight.

    Close it (`contextlib.closing`) when it is left early: it waits for the threads, which may still be writing.
    One worker is this thread itself, with one piece at a time.
    """
    if workers == 1:
        yield from map(work, pieces)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="export") as pool:
        waiting: deque[Future[B]] = deque()
        try:
            for piece in pieces:
                waiting.append(pool.submit(work, piece))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def worked(pieces: Iterable[A], work: Callable[[A], B], workers: int) -> contextlib.closing[Generator[B, None, None]]:
    """`in_order` as a context, so that no thread outlives the block."""
    return contextlib.closing(in_order(pieces, work, workers))


def need_range(name: str, value: int, low: int, high: int) -> None:
    """Raise `UsageError` unless `low` <= `value` <= `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"export: {name} must be {low:,} to {high:,}", got=value)
