"""Is every byte of a bank what its record says? And: setting damaged shards aside so that they can be made again."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank import seal, state
from synthkit.bank.lock import exclusive
from synthkit.bank.shard import Sidecar, committed_shards, file_sha256, read_sidecar, shard_file, summary, value_problem
from synthkit.bank.spec import BankSpec, read_record
from synthkit.bank.storage import regular_size, storage_errors, sync_folder
from synthkit.errors import BankError


@dataclass
class VerifyReport:
    """What `verify` found."""

    path: Path
    deep: bool
    planned: int
    """Planned shards."""
    committed: list[int]
    """Shards that have a record."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """What is damaged ("shard 3", "state 7", ...) -> what is wrong with it."""
    notes: list[str] = field(default_factory=list)
    """Harmless things worth knowing."""
    bytes_read: int = 0

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
        return not self.missing

    @property
    def damaged_shards(self) -> list[int]:
        """Shards with a problem, ascending."""
        return sorted(int(name.split()[1]) for name in self.problems if name.startswith("shard "))

    def raise_if_damaged(self) -> None:
        """Raise `BankError` with the first problems unless `ok`."""
        if not self.ok:
            first = "; ".join(f"{name}: {what[0]}" for name, what in list(self.problems.items())[:3])
            raise BankError(f"{self.path}: {len(self.problems)} damaged part(s): {first}",
                            hint=f"run: synthkit bank repair {self.path}, then synthesize --resume")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {
            "path": str(self.path), "ok": self.ok, "deep": self.deep, "complete": self.complete,
            "shards_planned": self.planned, "shards_committed": len(self.committed), "missing": self.missing,
            "problems": self.problems, "notes": self.notes, "bytes_read": self.bytes_read,
        }  # fmt: skip


def verify(path: str | Path, deep: bool = False) -> VerifyReport:
    """Check the bank at `path`.

    Every shard: its record parses and fits the plan, size, sha256, the manifest's sha256, and then the HDF5 structure
    (exactly the recorded datasets: hard links, contiguous, no filters, not external or virtual). `deep` also: labels in
    range, finite logits and difficulty, and the recorded histogram and agreement counted anew.

    Raises:
        BankNotFoundError: there is no bank. BankError: bank.json itself is unreadable.
    """
    path = Path(path)
    spec, _ = read_record(path)
    report = VerifyReport(path=path, deep=deep, planned=spec.shards, committed=committed_shards(path, spec))
    manifest = _manifest(path, spec, report)
    for index in report.committed:
        try:
            _check_shard(path, index, spec, report, manifest)
        except BankError as error:
            _add(report, f"shard {index}", error)
    for index in report.missing:
        if manifest is not None:
            _add(report, f"shard {index}", "is listed in the manifest, but its record is gone")
        elif os.path.lexists(shard_file(path, index)):
            report.notes.append(f"shard {index} has a file but no record: never committed, it will be made again")
    if spec.transform and report.committed and not state.entries(path / "transform"):
        _add(report, "transform 0", "bank.json names a transform, but it is missing")
    for folder in ("state", "generators", "transform"):
        for index in state.entries(path / folder):
            try:
                record = state.read_entry(path / folder, index)
                if folder == "transform":
                    record = state.read_transform(path, spec.transform)
                report.bytes_read += record.path.stat().st_size
                record.load()
            except BankError as error:
                _add(report, f"{folder} {index}", error)
    if report.ok and not report.complete:
        report.notes.append(f"unfinished: {len(report.missing)} of {report.planned} shards are still to be made")
    return report


def _add(report: VerifyReport, part: str, what: object) -> None:
    report.problems.setdefault(part, []).append(str(what))


def _manifest(path: Path, spec: BankSpec, report: VerifyReport) -> dict[int, dict[str, Any]] | None:
    try:
        return seal.read_manifest(path, spec)
    except BankError as error:
        _add(report, "manifest", error)
        return None


def _check_shard(
    path: Path, index: int, spec: BankSpec, report: VerifyReport, manifest: dict[int, dict[str, Any]] | None
) -> None:
    file = shard_file(path, index)
    record = file.with_suffix(".json")
    sidecar = read_sidecar(record, index, spec)
    size = regular_size(file)
    if size != sidecar.bytes:
        raise BankError(f"{file}: has {size} bytes, its record says {sidecar.bytes}")
    digest = file_sha256(file)
    report.bytes_read += size
    if digest != sidecar.sha256:
        raise BankError(f"{file}: its sha256 is not the recorded one", got=digest[:16] + "...")
    if manifest is not None:
        row = manifest[index]
        if row["sha256"] != digest or row.get("sidecar_sha256") != hashlib.sha256(record.read_bytes()).hexdigest():
            raise BankError(f"{file}: shard or record is not the one that was sealed in manifest.json")
    check_structure(file, sidecar)  # only now: an altered file never reaches the HDF5 parser
    if report.deep:
        _check_values(file, sidecar, spec)


def check_structure(file: Path, sidecar: Sidecar) -> None:
    """Raise `BankError` unless the HDF5 file holds exactly the recorded datasets, each plain and in its place."""
    import h5py

    try:
        with h5py.File(file, "r", locking=False) as opened:
            if sorted(opened) != sorted(sidecar.datasets):
                raise BankError(f"{file}: holds other datasets than recorded", got=sorted(opened)[:10])
            if len(opened.attrs):
                raise BankError(f"{file}: holds attributes; a shard has none")
            for name, place in sidecar.datasets.items():
                if type(opened.get(name, getlink=True)) is not h5py.HardLink:
                    raise BankError(f"{file}: {name} is a link to elsewhere; a shard holds hard links only")
                node = opened[name]
                if not isinstance(node, h5py.Dataset):
                    raise BankError(f"{file}: {name} is not a dataset")
                wrong = _layout_problem(node, place.offset, place.shape, place.dtype)
                if wrong:
                    raise BankError(f"{file}: {name} {wrong}")
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # whatever h5py says of a broken file
        raise BankError(f"{file}: is not readable HDF5 ({str(error)[:120]})") from error


def _layout_problem(node: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> str | None:
    plist = node.id.get_create_plist()
    if node.is_virtual or node.external is not None or plist.get_external_count():
        return "keeps its data in another file"
    if node.chunks is not None or plist.get_layout() != 1 or plist.get_nfilters():  # 1 is H5D_CONTIGUOUS
        return "is not contiguous and unfiltered"
    if node.shape != shape or node.dtype != dtype:
        return f"is {node.dtype} {node.shape}, recorded is {dtype} {shape}"
    if node.id.get_offset() != offset:
        return f"lies at byte {node.id.get_offset()}, recorded is {offset}"
    return None


def _check_values(file: Path, sidecar: Sidecar, spec: BankSpec) -> None:
    columns: dict[str, np.ndarray] = {}
    for name, place in sidecar.datasets.items():
        if name != "images":
            flat = np.fromfile(file, dtype=place.dtype, count=math.prod(place.shape), offset=place.offset)
            columns[name] = flat.reshape(place.shape)
    wrong = value_problem(columns, spec)
    if wrong:
        raise BankError(f"{file}: {wrong}")
    counted = summary(columns, spec.num_classes)
    for key in ("label_histogram", "argmax_matches", "step_range", "difficulty_range"):
        if counted.get(key) != sidecar.raw.get(key):
            raise BankError(f"{file}: {key} is not what the record says", got=counted.get(key))


@dataclass
class RepairReport:
    """What `repair` did."""

    path: Path
    moved: list[Path]
    """Where the damaged files lie now."""
    remake: list[int]
    """Shards that are to be made again (or for the first time)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {"path": str(self.path), "moved": [str(p) for p in self.moved], "remake": self.remake}


def repair(path: str | Path, deep: bool = True) -> RepairReport:
    """Move every damaged part of the bank at `path` to quarantine/; nothing is deleted.

    `synthesize --resume` then makes again exactly the shards in `remake`.

    Raises:
        BankBusyError: a run is writing the bank. BankNotFoundError, BankError: as `verify`.
    """
    path = Path(path)
    read_record(path)
    with exclusive(path / "state" / "lock"):
        report = verify(path, deep=deep)
        targets: list[Path] = []
        shards = report.damaged_shards
        if report.problems.get("manifest") or shards:
            targets.append(path / "manifest.json")  # it seals what is no longer there
        for index in shards:
            file = shard_file(path, index)
            targets += [file.with_suffix(".json"), file]  # the record first: without it the shard does not exist
        for part in report.problems:
            kind, _, number = part.partition(" ")
            if kind in ("state", "generators"):
                file = state.entry_path(path / kind, int(number))
                targets += [file.with_suffix(".json"), file]
        moved = []
        with storage_errors("quarantine", path):
            for target in targets:
                if os.path.lexists(target):
                    moved.append(_set_aside(target, path))
            for folder in {t.parent for t in targets if t.parent.is_dir()}:
                sync_folder(folder)
    spec, _ = read_record(path)
    remake = sorted(set(range(spec.shards)) - set(committed_shards(path, spec)))
    return RepairReport(path=path, moved=moved, remake=remake)


def _set_aside(target: Path, bank: Path) -> Path:
    folder = bank / "quarantine" / target.relative_to(bank).parent
    folder.mkdir(parents=True, exist_ok=True)
    place, number = folder / target.name, 0
    while os.path.lexists(place):
        number += 1
        place = folder / f"{target.name}.{number}"
    os.rename(target, place)
    return place
