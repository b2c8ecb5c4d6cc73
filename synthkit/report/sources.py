"""What a report is made from: a bank or a run directory, read with care and checked. No torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthkit.bank import Bank
from synthkit.bank.disk.storage import read_json
from synthkit.errors import BankError, UsageError, nearest
from synthkit.report.numbers import Figure, number

MOST_RECORDS = 200_000
MOST_LINE = 1 << 20
MOST_SEEDS = 100

Record = dict[str, float]


@dataclass(kw_only=True)
class BankSource:
    """A bank and the record of the run that made it."""

    path: Path
    bank: Bank
    info: dict[str, Any]
    run: dict[str, Any]
    """run.json; empty where there is none (a bank made from arrays)."""
    metrics: list[Record]
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Curve:
    """The log of one training: a seed, or the control."""

    name: str
    records: list[Record]


@dataclass(kw_only=True)
class RunSource:
    """A distill or teach run: one training, or several seeds, with or without a control."""

    path: Path
    kind: str
    """distill, control, teach, or run where the record does not say."""
    record: dict[str, Any]
    """run.json."""
    members: list[dict[str, Any]]
    """run.json of every training that the run is made of."""
    results: list[dict[str, Any]]
    """result.json of every finished training."""
    planned: int
    curves: list[Curve]
    control: dict[str, Any] | None = None
    control_curve: Curve | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every planned training has its result."""
        return len(self.results) >= self.planned

    def fact(self, key: str) -> Any:
        """What the results say about `key` (the first that says anything)."""
        return next((r[key] for r in self.results if r.get(key) is not None), None)

    def figure(self, key: str) -> Figure | None:
        """The value of `key` over the finished trainings."""
        return Figure.over(r.get(key) for r in self.results)


def load(path: str | Path) -> BankSource | RunSource:
    """The bank or run in the directory `path`.

    Raises:
        UsageError: there is neither; what lies near is named. BankError: the bank is damaged.
    """
    place = Path(path)
    if not place.is_dir():
        raise _not_there(place)
    if (place / "bank.json").is_file():
        return _load_bank(place)
    if _is_run(place):
        return _load_run(place)
    inside = [child.name for child in _children(place) if is_source(child)]
    hint = "it holds " + ", ".join(f"{place / n}" for n in inside[:5]) if inside else "give a bank or a run directory"
    raise UsageError(f"report: {place} is neither a bank (bank.json) nor a run (run.json)", hint=hint)


def is_source(place: Path) -> bool:
    """Whether `place` is a directory that a report can show."""
    return (place / "bank.json").is_file() or _is_run(place)


def _is_run(place: Path) -> bool:
    return any((place / name).is_file() for name in ("run.json", "result.json", "summary.json"))


def _children(place: Path) -> list[Path]:
    try:
        return sorted(child for child in place.iterdir() if child.is_dir())
    except OSError as error:
        raise UsageError(f"report: {place} cannot be read: {error.strerror}", hint="check its permissions") from error


def _not_there(place: Path) -> UsageError:
    if place.exists():
        near = f"give the directory {place.parent}" if is_source(place.parent) else "give a bank or a run directory"
        return UsageError(f"report: {place} is a file", hint=near)
    names = [c.name for c in _children(place.parent) if is_source(c)] if place.parent.is_dir() else []
    close = nearest(place.name, names)
    if close:
        return UsageError(f"report: {place} does not exist", hint=f"did you mean {str(place.parent / close[0])!r}?")
    shown = ", ".join(str(place.parent / n) for n in names[:5])
    return UsageError(f"report: {place} does not exist", hint=f"there is: {shown}" if names else "check the path")


def _record(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty where there is no file."""
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except BankError as error:  # the guarded reader speaks of banks; here a run's record is meant
        hint = "mend or remove that file, or leave this run out"
        raise UsageError(f"report: {path} cannot be used ({error})", hint=hint) from error


def read_metrics(path: Path) -> tuple[list[Record], list[str]]:
    """The finite numbers of each record of a metrics.jsonl, and what there is to say about the file.

    A torn last line (a killed run) is normal and left out in silence.

    Raises:
        UsageError: the file is there and cannot be read.
    """
    if not path.is_file():
        return [], []
    records: list[Record] = []
    broken, cut = 0, False
    try:
        with open(path, "rb") as stream:
            while line := stream.readline(MOST_LINE):
                if len(records) >= MOST_RECORDS:
                    cut = True
                    break
                found = _numbers(line)
                if found is not None:
                    records.append(found)
                elif line.endswith(b"\n") and line.strip():
                    broken += 1
    except OSError as error:
        raise UsageError(f"report: {path} cannot be read: {error.strerror}", hint="check its permissions") from error
    notes = [f"{path.name}: {broken} lines cannot be read and are left out"] if broken else []
    return records, notes + ([f"{path.name}: only the first {MOST_RECORDS:,} records are shown"] if cut else [])


def _numbers(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    found = {key: number(v) for key, v in value.items()}
    return {key: v for key, v in found.items() if v is not None}


def _load_bank(place: Path) -> BankSource:
    bank = Bank(place)
    metrics, notes = read_metrics(place / "metrics.jsonl")
    return BankSource(
        path=place, bank=bank, info=bank.info(), run=_record(place / "run.json"), metrics=metrics, notes=notes
    )


def _load_run(place: Path) -> RunSource:
    record = _record(place / "run.json")
    seeds = [c for c in _children(place) if re.fullmatch(r"seed\d{1,9}", c.name) and is_source(c)]
    seeds.sort(key=lambda c: int(c.name[4:]))
    folders = seeds[:MOST_SEEDS] or [place]
    notes: list[str] = []
    if len(seeds) > MOST_SEEDS:
        notes.append(f"{len(seeds)} seeds; the first {MOST_SEEDS} are shown")
    curves, results, members = [], [], []
    for folder in folders:
        records, said = read_metrics(folder / "metrics.jsonl")
        notes += said
        members.append(_record(folder / "run.json"))
        result = _record(folder / "result.json")
        name = folder.name.replace("seed", "seed ") if seeds else _curve_name(result, members[-1])
        curves.append(Curve(name=name, records=records))
        results += [result] if result else []
    if not results:  # the summary of several seeds may have been copied without their directories
        results = _dicts(_record(place / "summary.json").get("runs"))
    config = record.get("config")
    planned = number(config.get("seeds")) if isinstance(config, dict) else None
    source = RunSource(
        path=place, kind=_kind(record, results), record=record or members[0], members=members, results=results,
        planned=max(len(folders), int(planned or 1)), curves=curves, notes=notes,
    )  # fmt: skip
    if _is_run(place / "control"):
        source.control = _record(place / "control" / "result.json") or None
        records, said = read_metrics(place / "control" / "metrics.jsonl")
        source.control_curve = Curve(name="control", records=records)
        source.notes += said
    if source.control is None:
        source.control = next(iter(_dicts([r.get("control") for r in results])), None)
    return source


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [v for v in values[:MOST_SEEDS] if isinstance(v, dict) and v] if isinstance(values, list) else []


def _kind(record: dict[str, Any], results: list[dict[str, Any]]) -> str:
    said = results[0].get("kind") if results else record.get("command")
    return said if said in ("distill", "control", "teach") else "run"


def _curve_name(result: dict[str, Any], record: dict[str, Any]) -> str:
    if result.get("kind") == "control":
        return "control"
    seed = number(result.get("seed", record.get("seed")))
    return f"seed {int(seed)}" if seed is not None else "training"
