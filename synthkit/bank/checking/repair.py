"""Setting the damaged parts of a bank aside, so that they can be made again. Nothing is deleted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkit.bank.checking.verify import Context, VerifyReport, open_context, parts, verify
from synthkit.bank.disk.lock import claim
from synthkit.bank.disk.storage import names_in, storage_errors, sync_folder
from synthkit.bank.shard import committed_shards
from synthkit.errors import BankError


@dataclass
class RepairReport:
    """What `repair` did."""

    path: Path
    moved: list[Path]
    """Where the damaged files lie now."""
    remake: list[int]
    """Shards that are to be made again (or for the first time)."""
    left: dict[str, list[str]]
    """Damage that moving files cannot mend (bank.json itself, a folder that is a link)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {"path": str(self.path), "moved": [str(p) for p in self.moved], "remake": self.remake, "left": self.left}


def repair(path: str | Path, deep: bool = True, untrusted: bool = False) -> RepairReport:
    """Move every damaged part of the bank at `path` to quarantine/; nothing is deleted.

    `synthesize --resume` then makes again exactly the shards in `remake`. Damage that is no file of its own (a folder
    that is a link, a bank.json that is not the sealed one) stays and is listed in `left`.

    Raises:
        BankBusyError: a run is writing the bank. BankNotFoundError, BankError: as `verify`.
    """
    path = Path(path)
    open_context(path)
    with claim(path):
        report = verify(path, deep=deep, untrusted=untrusted)
        context = open_context(path)
        targets, left = _targets(context, report)
        moved = []
        with storage_errors("quarantine", path):
            for target in targets:
                if os.path.lexists(target):
                    moved.append(_set_aside(target, path))
            for folder in {t.parent for t in targets if t.parent.is_dir()}:
                sync_folder(folder)
        remake = sorted(set(range(context.spec.shards)) - set(_committed(context)))
    return RepairReport(path=path, moved=moved, remake=remake, left=left)


def _targets(context: Context, report: VerifyReport) -> tuple[list[Path], dict[str, list[str]]]:
    """(what to move: the manifest before what it vouches for, every record before its data; damage that stays)."""
    found = {part.name: part for part in parts(context)}
    damaged = [found[name] for name in report.problems if name in found]
    gone = {name for name in report.problems if name.startswith("generators ") and name not in found}
    left = {name: what for name, what in report.problems.items()
            if name not in gone and not (name in found and found[name].files)}  # fmt: skip
    # a snapshot that is gone cannot be made again alone: the seal that tells of it goes aside, the bank stays usable
    targets = [context.path / "manifest.json"] if gone or any(part.sealed for part in damaged) else []
    for part in damaged:
        targets += [file for file in part.files if file not in targets]
    return targets, left


def _committed(context: Context) -> list[int]:
    try:
        return committed_shards(context.path, context.spec)
    except BankError:  # the folder of the shards is a link; it is in `left`
        return []


def _set_aside(target: Path, bank: Path) -> Path:
    folder = bank
    for name in ("quarantine", *target.relative_to(bank).parent.parts):
        folder = folder / name
        names_in(folder)  # refuses a link: nothing is moved out of the bank
    folder.mkdir(parents=True, exist_ok=True)
    place, number = folder / target.name, 0
    while os.path.lexists(place):
        number += 1
        place = folder / f"{target.name}.{number}"
    os.rename(target, place)
    return place
