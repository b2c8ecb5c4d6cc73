"""What the stages of `bench kills` have in common: what is done, and what must be true after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from synthkit.bank import Bank
from synthkit.bank.checking.verify import verify
from synthkit.bench.kill_probe import Shared
from synthkit.bench.known_rows import numbers_in, wrong_rows


@dataclass
class Finding:
    """What is true of a folder at one moment."""

    problems: list[str] = field(default_factory=list)
    committed: set[int] = field(default_factory=set)
    """Shards that are there and whole."""
    images: int = 0
    """Images of these shards, each of which was compared with what it must be."""
    wrong: int = 0
    """Images that are not what they must be."""
    state: str = ""
    """For a target that is whole or absent: which."""


def bank_finding(path: Path) -> Finding:
    """Verify a bank of `columns_of` rows in depth, and compare every row."""
    found = Finding()
    if not (path / "bank.json").exists():
        return found
    report = verify(path, deep=True)
    found.problems = [f"{part}: {text}" for part, texts in report.problems.items() for text in texts]
    found.committed = set(report.committed) - set(report.damaged_shards)
    if found.committed and not found.problems:
        bank = Bank(path)
        found.images = len(bank)
        found.wrong = wrong_rows(bank, np.arange(len(bank)), numbers_in(bank))
    return found


def tree(folder: Path, keep: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """Relative name -> sha256 of every file below `folder` that is kept."""
    if not folder.exists():
        return {}
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if keep(name)}


def content(name: str) -> bool:
    """Files of a bank whose bytes depend on the content alone (records and card tell of times and hosts)."""
    return name.endswith((".h5", ".safetensors"))


class Stage:
    """One kind of work that is killed. A folder belongs to one trial; `setup` is made once and read by all."""

    name = ""
    roles: tuple[int, ...] = (0,)
    """Processes that work at the same time."""
    pieces = 1
    """What can be acknowledged."""
    watched = False
    """Whether a reader looks at `folder / "bank"` all the while."""

    def setup(self, shared: Path) -> None:
        """Make, once, what `prepare` copies."""

    def prepare(self, folder: Path) -> None:
        """Make the inputs of a trial."""
        folder.mkdir()

    def operate(self, folder: Path, role: int, shared: Shared) -> None:
        """The work; done again after a kill, it goes on or begins anew. Runs in a child."""
        raise NotImplementedError

    def check(self, folder: Path) -> Finding:
        """Look at everything after a kill."""
        raise NotImplementedError

    def result(self, folder: Path) -> dict[str, str]:
        """What the work has made, as name -> sha256; equal for equal results."""
        raise NotImplementedError
