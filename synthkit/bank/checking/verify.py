"""Is every byte of a bank what its record says?

A bank is checked part by part (the manifest, every shard, every checkpoint, ...). Each part's problems are collected,
whatever they are, so that one hostile file neither hides the others nor ends the run. `verify(untrusted=True)` does all
of it in a child process with limits (see `sandbox`).
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from synthkit.bank import seal, state
from synthkit.bank.checking.structure import check_structure, check_values
from synthkit.bank.disk.storage import names_in, regular_size
from synthkit.bank.shard import committed_shards, file_sha256, read_sidecar, shard_file
from synthkit.bank.spec import BankSpec, read_record
from synthkit.errors import BankError

# Further kinds of parts, "module:function": function(context) yields `Part`s. Adding one is one line here.
PART_MAKERS: tuple[str, ...] = ("synthkit.bank.labels.check:label_parts",)

# What a bank's folder may hold; anything else is noted.
KNOWN_NAMES = {
    "bank.json", "manifest.json", "README.md", "shards", "labels", "state", "progress", "generators", "transform",
    "quarantine",
    "run.json", "metrics.jsonl", "workers", "student", "report.html", "assets",
}  # fmt: skip
MAX_NOTES = 50


@dataclass
class Findings:
    """What the check of one part (or of all) found."""

    problems: dict[str, list[str]] = field(default_factory=dict)
    """What is damaged ("shard 3", "state 7", ...) -> what is wrong with it."""
    notes: list[str] = field(default_factory=list)
    """Harmless things worth knowing."""
    bytes_read: int = 0

    def problem(self, part: str, what: object) -> None:
        """Record damage."""
        self.problems.setdefault(part, []).append(str(what))

    def note(self, text: str) -> None:
        """Record something harmless."""
        if len(self.notes) < MAX_NOTES:
            self.notes.append(text)

    def take(self, other: Findings) -> None:
        """Add what `other` found."""
        for part, problems in other.problems.items():
            for what in problems:
                if what not in self.problems.get(part, ()):
                    self.problem(part, what)
        for text in other.notes:
            self.note(text)
        self.bytes_read += other.bytes_read


@dataclass
class VerifyReport(Findings):
    """What `verify` found."""

    path: Path = Path()
    deep: bool = False
    planned: int = 0
    """Planned shards."""
    committed: list[int] = field(default_factory=list)
    """Shards that have a record."""
    guards: list[str] = field(default_factory=list)
    """Of an untrusted verification: what the child process was denied. Empty: everything ran in this process."""

    @property
    def ok(self) -> bool:
        """Nothing that was committed is damaged or lost. An unfinished bank can be ok."""
        return not self.problems

    @property
    def missing(self) -> list[int]:
        """Planned shards that do not exist."""
        return sorted(set(range(self.planned)) - set(self.committed))

    @property
    def complete(self) -> bool:
        """Every planned shard exists."""
        return len(self.committed) == self.planned

    @property
    def damaged_shards(self) -> list[int]:
        """Shards with a problem, ascending."""
        return sorted(int(name.split()[1]) for name in self.problems if re.fullmatch(r"shard [0-9]+", name))

    def raise_if_damaged(self) -> None:
        """Raise `BankError` with the first problems unless `ok`."""
        if not self.ok:
            first = "; ".join(f"{name}: {what[0][:500]}" for name, what in list(self.problems.items())[:3])
            raise BankError(f"{self.path}: {len(self.problems)} damaged part(s): {first}",
                            hint=f"run: synthkit bank repair {self.path}, then synthesize --resume")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {
            "path": str(self.path), "ok": self.ok, "deep": self.deep, "complete": self.complete,
            "shards_planned": self.planned, "shards_committed": len(self.committed), "missing": self.missing,
            "problems": self.problems, "notes": self.notes, "bytes_read": self.bytes_read, "guards": self.guards,
        }  # fmt: skip


@dataclass
class Context:
    """What the checks of the parts share."""

    path: Path
    spec: BankSpec
    record: dict[str, Any]
    deep: bool
    committed: list[int]

    @cached_property
    def manifest(self) -> dict[int, dict[str, Any]] | None:
        """Rows of the manifest by shard; None where there is none, or a damaged one (its own part says so)."""
        try:
            return seal.read_manifest(self.path, self.spec)
        except BankError:
            return None


@dataclass(frozen=True)
class Part:
    """One thing to check."""

    name: str
    """"shard 3"; the key in the report."""
    check: Callable[[Findings], None]
    """Adds notes and bytes to the findings; raises `BankError` (or OSError, MemoryError) for damage."""
    files: tuple[Path, ...] = ()
    """What repair sets aside when it is damaged, the commit record first."""
    sealed: bool = False
    """Whether the manifest vouches for it, and so cannot stay when the part goes."""


class Watch(Protocol):
    """Follows an examination."""

    def opened(self, context: Context) -> None:
        """bank.json was read."""

    def begin(self, part: str) -> bool:
        """A part comes next; False leaves it out."""
        ...

    def end(self, part: str, findings: Findings) -> None:
        """The part was checked."""


def verify(path: str | Path, deep: bool = False, untrusted: bool = False) -> VerifyReport:
    """Check the bank at `path`; whatever is wrong with a part is listed in the report, never raised.

    The manifest: its own hash, what it seals, its root. Every shard: its record parses and fits the plan, size,
    sha256, the manifest's sha256, and only then the HDF5 structure (exactly the recorded datasets: hard links,
    contiguous, no filters, not external or virtual). Checkpoints, generators, transform, label sets: record, sha256,
    content. Unknown files are noted. `deep` also: labels in range, finite logits and difficulty, and the recorded
    histogram and agreement counted anew. `untrusted`: all of this in a child process with limits.

    Raises:
        BankNotFoundError: there is no bank. BankError: bank.json itself is unreadable.
    """
    if untrusted:
        from synthkit.bank.checking.sandbox import verify_untrusted

        return verify_untrusted(path, deep=deep)
    collector = _Collector(VerifyReport(path=Path(path), deep=deep))
    examine(Path(path), deep, collector)
    return finished(collector.report)


class _Collector:
    def __init__(self, report: VerifyReport):
        self.report = report

    def opened(self, context: Context) -> None:
        self.report.planned, self.report.committed = context.spec.shards, context.committed

    def begin(self, part: str) -> bool:
        return True

    def end(self, part: str, findings: Findings) -> None:
        self.report.take(findings)


def finished(report: VerifyReport) -> VerifyReport:
    """`report` with the remarks that concern the whole."""
    if report.ok and not report.complete:
        missing = report.planned - len(report.committed)
        report.note(f"unfinished: {missing} of {report.planned} shards are still to be made")
    return report


def examine(path: Path, deep: bool, watch: Watch) -> None:
    """Check all parts of the bank at `path` and tell `watch`. Raises `BankError` when bank.json is unreadable."""
    context = open_context(path, deep)
    watch.opened(context)
    for part in parts(context):
        if watch.begin(part.name):
            watch.end(part.name, _checked(part))


def open_context(path: Path, deep: bool = False) -> Context:
    """The bank at `path`, opened for checking. Raises `BankError` when bank.json is unreadable."""
    spec, record = read_record(path)
    try:
        committed = committed_shards(path, spec)
    except BankError:  # the folder of the shards is no folder: said by its own part
        committed = []
    return Context(path=path, spec=spec, record=record, deep=deep, committed=committed)


def _checked(part: Part) -> Findings:
    found = Findings()
    try:
        part.check(found)
    except BankError as error:
        found.problem(part.name, error)
    except OSError as error:
        found.problem(part.name, f"cannot be read: {error.strerror or error} ({error.filename or part.name})")
    except MemoryError:
        found.problem(part.name, "is too large to be checked in the memory there is")
    return found


def parts(context: Context) -> Iterator[Part]:
    """All parts of a bank, in the order in which they are checked."""
    yield Part("manifest", lambda found: _check_manifest(context, found), (context.path / "manifest.json",), True)
    yield from _guarded("shards", _shards(context))
    for folder in ("state", "progress", "generators", "transform"):
        yield from _guarded(folder, _entries(context, folder))
    for maker in PART_MAKERS:
        module, _, function = maker.partition(":")
        yield from _guarded(module.rpartition(".")[2], getattr(importlib.import_module(module), function)(context))
    yield Part("folder", lambda found: _note_strangers(context, found))


def _guarded(name: str, made: Iterable[Part]) -> Iterator[Part]:
    """`made`; when listing the parts itself fails (a folder that is a link), one part that says so."""
    try:
        yield from made
    except (BankError, OSError) as error:
        failure = error

        def fail(found: Findings) -> None:
            raise failure

        yield Part(name, fail)


def _check_manifest(context: Context, found: Findings) -> None:
    seal.read_manifest(context.path, context.spec)
    for part, problems in seal.check_manifest(context.path, context.spec, context.record).items():
        for what in problems:
            found.problem(part, what)


def _shards(context: Context) -> Iterator[Part]:
    names = set(names_in(context.path / "shards"))
    committed = set(context.committed)
    for index in context.committed:
        yield _shard_part(context, index, lambda found, i=index: _check_shard(context, i, found))
    if context.manifest is not None:
        for index in range(context.spec.shards):
            if index not in committed:
                yield _shard_part(context, index, _record_gone)
        return
    for name in sorted(names):
        match = re.fullmatch(r"([0-9]{5,7})\.h5", name)
        if match and int(match[1]) not in committed and int(match[1]) < context.spec.shards:
            yield Part(f"file shards/{name}", lambda found, i=int(match[1]): found.note(
                f"shard {i} has a file but no record: never committed, it will be made again"))  # fmt: skip


def _shard_part(context: Context, index: int, check: Callable[[Findings], None]) -> Part:
    file = shard_file(context.path, index)
    return Part(f"shard {index}", check, (file.with_suffix(".json"), file), True)


def _record_gone(found: Findings) -> None:
    raise BankError("is listed in the manifest, but its record is gone")


def _check_shard(context: Context, index: int, found: Findings) -> None:
    file = shard_file(context.path, index)
    record = file.with_suffix(".json")
    sidecar = read_sidecar(record, index, context.spec)
    size = regular_size(file)
    if size != sidecar.bytes:
        raise BankError(f"{file}: has {size} bytes, its record says {sidecar.bytes}")
    digest = file_sha256(file)
    found.bytes_read += size
    if digest != sidecar.sha256:
        raise BankError(f"{file}: its sha256 is not the recorded one", got=digest[:16] + "...")
    row = context.manifest[index] if context.manifest is not None else None
    if row and (row["sha256"], row.get("sidecar_sha256")) != (digest, hashlib.sha256(record.read_bytes()).hexdigest()):
        raise BankError(f"{file}: shard or record is not the one that was sealed in manifest.json")
    check_structure(file, sidecar)  # only now: an altered file never reaches the HDF5 parser
    if context.deep:
        check_values(file, sidecar, context.spec)


def _entries(context: Context, folder: str) -> Iterator[Part]:
    indices = state.entries(context.path / folder)
    if folder == "transform" and context.spec.transform and context.committed and 0 not in indices:
        indices = [0, *indices]  # its reading says that it is missing
    for index in indices:
        file = state.entry_path(context.path / folder, index)
        yield Part(f"{folder} {index}", lambda found, i=index: _check_entry(context, folder, i, found),
                   (file.with_suffix(".json"), file), folder not in ("state", "progress"))  # fmt: skip


def _check_entry(context: Context, folder: str, index: int, found: Findings) -> None:
    if folder == "transform":
        record = state.read_transform(context.path, context.spec.transform)
    else:
        record = state.read_entry(context.path / folder, index)
    found.bytes_read += regular_size(record.path)
    record.load()


def _note_strangers(context: Context, found: Findings) -> None:
    for name in names_in(context.path, follow=True):
        place = context.path / name
        if os.path.islink(place):
            found.note(f"{name!r} is a link; it is never followed")
        elif name not in KNOWN_NAMES:
            found.note(f"{name!r} is no part of a bank; it is never read")
    known = re.compile(r"([0-9]{5}|[1-9][0-9]{5,6})\.(h5|json)(\.tmp-.+)?")
    for name in names_in(context.path / "shards"):
        match = known.fullmatch(name)
        if not match or int(name.partition(".")[0]) >= context.spec.shards:
            found.note(f"{'shards/' + name!r} is no planned shard; it is never read")
