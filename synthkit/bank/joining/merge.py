"""Joining banks into one. The result is whole or absent, and says where each of its parts came from.

Two modes, told apart by themselves:

join: banks of different runs behind one another. A parent's shard that falls on a shard of the result is copied byte
    for byte; rows that do not (the parents have other shard sizes, or a last shard that is not full) are packed anew,
    one shard in memory at a time.
unite: folders of one run that was spread over machines (`synthesize --shards I/N` on separate disks): equal recipe
    hashes, and each folder has some of the shards. The result is the bank that a single run makes: same identity, same
    root hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank import card, state
from synthkit.bank.checking.verify import verify
from synthkit.bank.disk.storage import require_free, staged, sync_folder
from synthkit.bank.errors import BankMismatchError
from synthkit.bank.joining.copying import ShardRows, adopt_shard, copy_exact
from synthkit.bank.joining.plan import Piece, best_plan, exact
from synthkit.bank.reader import Bank
from synthkit.bank.seal import root_hash, seal
from synthkit.bank.shard import shard_file
from synthkit.bank.spec import BankSpec
from synthkit.bank.writer import BankWriter
from synthkit.errors import BankError, UsageError

SAME = ("shape", "num_classes", "class_names", "mean", "std", "label_kind", "top_k", "transform")
"""What all parents must agree on, beside the columns."""


@dataclass
class MergeReport:
    """What `merge` did, or with `dry_run` would do."""

    mode: str
    """join or unite."""
    out: Path
    parents: list[Path]
    images: int
    """Images of the result when it is complete."""
    shards: int
    """Shards of the result when it is complete."""
    copied: int = 0
    """Shards that are copies, byte for byte, of a parent's."""
    packed: int = 0
    """Shards that are packed anew from rows of the parents."""
    missing: list[int] = field(default_factory=list)
    """Shards that no parent has (unite)."""
    notes: list[str] = field(default_factory=list)
    root: str | None = None
    """Root hash of the result; None for a dry run or while shards are missing."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {**vars(self), "out": str(self.out), "parents": [str(p) for p in self.parents]}


def merge(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    dry_run: bool = False,
    allow_different_teachers: bool = False,
    images_per_shard: int | None = None,
) -> MergeReport:
    """Join the banks at `paths`, in this order, into a new bank at `out`.

    Args:
        dry_run: check everything (the parents' bytes too) and write nothing.
        allow_different_teachers: also join banks whose stored logits come from different teachers.
        images_per_shard: of the result; none takes that of the parents that leaves most shards as they are.

    Raises:
        BankMismatchError: the parents differ; the message lists in what, per bank.
        BankError: a parent is damaged, or unfinished and not part of one run.
        OutputExistsError: `out` is not empty. UsageError: fewer than two banks, one given twice, `out` inside one.
        StorageError: writing failed; there is nothing at `out` then.
    """
    out = Path(out)
    banks = _parents([Path(p) for p in paths], out)
    require_free(out)
    if len({b.spec.recipe_hash() for b in banks}) == 1 and not all(b.complete for b in banks):
        if images_per_shard not in (None, banks[0].spec.per_shard):
            raise UsageError("merge: parts of one run keep their shards", got=f"images_per_shard {images_per_shard}")
        job: _Unite | _Join = _Unite(banks, out)
    else:
        job = _Join(banks, out, allow_different_teachers, images_per_shard)
    for bank in banks:
        report = verify(bank.path)
        if not report.ok:
            first = "; ".join(f"{part}: {what[0]}" for part, what in list(report.problems.items())[:3])
            raise BankError(f"merge: {bank.path} is damaged ({first})", hint=f"run: synthkit bank repair {bank.path}")
    if not dry_run:
        with staged(out) as staging:
            job.report.root = job.write(staging)
    return job.report


def _parents(paths: list[Path], out: Path) -> list[Bank]:
    if len(paths) < 2:
        raise UsageError("merge: give two banks or more", got=[str(p) for p in paths])
    banks = [Bank(path) for path in paths]
    seen: dict[str, Path] = {}
    for bank in banks:
        other = seen.setdefault(bank.record["uuid"], bank.path)
        if other is not bank.path:
            raise UsageError(f"merge: {other} and {bank.path} are the same bank", hint="give each bank once")
        if out.absolute().resolve().is_relative_to(bank.path.resolve()):
            raise UsageError(f"merge: {out} lies inside the bank {bank.path}", hint="choose another --out")
    differing = _differences(banks)
    if differing:
        raise BankMismatchError("merge: the banks do not fit together: " + "; ".join(differing))
    return banks


def _differences(banks: list[Bank]) -> list[str]:
    """What each bank has otherwise than the first, readable."""
    first, lines = banks[0], []
    for bank in banks[1:]:
        for name in SAME:
            a, b = getattr(first.spec, name), getattr(bank.spec, name)
            if a != b:
                lines.append(f"{bank.path}: {name} is {_short(b)}, in {first.path} it is {_short(a)}")
        if bank.sidecars and first.sidecars and bank.columns != first.columns:
            here, there = set(bank.columns), set(first.columns)
            parts = [f"lacks {', '.join(sorted(there - here))}"] if there - here else []
            parts += [f"has {', '.join(sorted(here - there))} more"] if here - there else []
            lines.append(f"{bank.path}: the columns differ from {first.path}: it {' and '.join(parts)}")
    for bank in banks:
        ragged = [s.index for s in bank.sidecars if sorted(s.datasets) != sorted(bank.columns)]
        if ragged:
            lines.append(f"{bank.path}: shard {ragged[0]} has other columns than the rest")
    return lines


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _beside(bank: Bank) -> list[str]:
    """Notes on what of a parent stays with it."""
    sets = bank.label_sets()
    return [f"label sets of {bank.path} stay with it: {', '.join(sets)} (relabel the new bank)"] if sets else []


class _Unite:
    """Folders of one run become the bank of that run."""

    def __init__(self, banks: list[Bank], out: Path):
        self.banks, first = banks, banks[0].spec
        self.owner: dict[int, tuple[Bank, int]] = {}
        for bank in banks:
            for at, sidecar in enumerate(bank.sidecars):
                other, place = self.owner.setdefault(sidecar.index, (bank, at))
                if other.sidecars[place].sha256 != sidecar.sha256:
                    raise BankMismatchError(
                        f"merge: shard {sidecar.index} differs between {other.path} and {bank.path}",
                        hint="they were not made by one recipe on the same kind of machine; keep one of them",
                    )
        missing = sorted(set(range(first.shards)) - set(self.owner))
        self.report = MergeReport(mode="unite", out=out, parents=[b.path for b in banks], images=first.images,
                                  shards=first.shards, copied=len(self.owner), missing=missing)  # fmt: skip
        notes = [note for bank in banks for note in _beside(bank)]
        notes += (
            [f"{len(missing)} shards are in none of the folders: go on with synthesize --resume"] if missing else []
        )
        self.report.notes = ["parts of one run (equal recipe hashes): the result is the bank of that run", *notes]

    def write(self, staging: Path) -> str | None:
        first = self.banks[0].spec
        parts = [
            {"uuid": b.record["uuid"], "name": b.path.resolve().name, "created": b.record.get("created"),
             "versions": b.record.get("versions"), "hardware": b.record.get("hardware"),
             "shards": [i for i, (owner, _) in sorted(self.owner.items()) if owner is b]} for b in self.banks
        ]  # fmt: skip
        fields = {name: getattr(first, name) for name in BankSpec.__dataclass_fields__}
        writer = BankWriter.create(staging, BankSpec(**{**fields, "extra": {**first.extra, "united": parts}}))
        _copy_transform(self.banks[0], staging)
        for folder in ("generators", "state") if self.report.missing else ("generators",):
            for bank in self.banks:  # one run makes each of these once; the first that has it gives it
                _copy_entries(bank, staging, folder)
        for index, (bank, at) in sorted(self.owner.items()):
            file, sidecar = shard_file(bank.path, index), bank.sidecars[at]
            copy_exact(file, writer.shard_path(index), sidecar.sha256)
            record = file.with_suffix(".json")
            copy_exact(record, writer.sidecar_path(index), _sha256(record))
        if self.report.missing:
            return None
        return seal(staging)["root"]


class _Join:
    """Banks behind one another."""

    def __init__(self, banks: list[Bank], out: Path, allow_different_teachers: bool, images_per_shard: int | None):
        self.banks = banks
        for bank in banks:
            if not bank.complete:
                missing = bank.spec.shards - len(bank.sidecars)
                raise BankError(f"merge: {bank.path} is unfinished, {missing} of {bank.spec.shards} shards are missing",
                                hint="finish it with: synthkit synthesize ... --resume")  # fmt: skip
        self.roots = [root_hash(bank.sidecars) for bank in banks]
        for at, root in enumerate(self.roots):
            if root in self.roots[:at]:
                twin = banks[self.roots.index(root)].path
                raise UsageError(f"merge: {twin} and {banks[at].path} hold the same images (equal roots)",
                                 hint="give it once")  # fmt: skip
        teacher, notes = _teacher(banks, allow_different_teachers)
        sizes = [[s.n for s in bank.sidecars] for bank in banks]
        if images_per_shard is not None and images_per_shard < 1:
            raise UsageError("merge: images_per_shard must be at least 1", got=images_per_shard)
        wanted = [images_per_shard] if images_per_shard else [b.spec.per_shard for b in banks]
        self.plan, per_shard = best_plan(sizes, wanted)
        self.snapshots, said = _snapshots(banks)
        self.spec = self._spec(per_shard, teacher)
        copied = sum(exact(pieces, sizes) for pieces in self.plan)
        self.report = MergeReport(mode="join", out=out, parents=[b.path for b in banks], images=self.spec.images,
                                  shards=self.spec.shards, copied=copied, packed=len(self.plan) - copied)  # fmt: skip
        self.rate, more = _learning_rate(banks)
        self.report.notes = [*notes, *said, *more, *(note for bank in banks for note in _beside(bank))]
        self.sizes = sizes

    def _spec(self, per_shard: int, teacher: dict[str, Any]) -> BankSpec:
        first, seeds = self.banks[0].spec, {b.spec.seed for b in self.banks}
        parents = [_provenance(bank, root) for bank, root in zip(self.banks, self.roots, strict=True)]
        older = {_key(p): p for bank in self.banks for p in [*bank.spec.parents, *_ancestors(bank)]}
        return BankSpec(
            **{name: getattr(first, name) for name in SAME},
            images=sum(len(b) for b in self.banks), images_per_shard=per_shard,
            seed=seeds.pop() if len(seeds) == 1 else 0, teacher=teacher,
            # the roots decide the images: merging the same banks again gives the same identity
            recipe={"method": {"name": "merge"}, "roots": self.roots},
            real_data_used=any(b.spec.real_data_used for b in self.banks),
            contains_real=any(b.spec.contains_real for b in self.banks),
            parents=parents, extra={"ancestors": list(older.values())} if older else {},
        )  # fmt: skip

    def write(self, staging: Path) -> str:
        writer, reading = BankWriter.create(staging, self.spec), ShardRows()
        _copy_transform(self.banks[0], staging)
        late = self.spec.shards // 2  # `distill --fresh` draws from snapshots of the last half of a run
        for number, record in enumerate(self.snapshots):
            state.save_entry(staging / "generators", late + number, record.load(), record.meta)
        for index, pieces in enumerate(self.plan):
            meta = {"merged_from": self._origin(pieces), **(self.rate if index == len(self.plan) - 1 else {})}
            if exact(pieces, self.sizes):
                bank, at = self.banks[pieces[0].parent], pieces[0].at
                file = shard_file(bank.path, bank.sidecars[at].index)
                adopt_shard(staging, index, bank.sidecars[at], file, meta)
                continue
            rows = [self._rows(reading, piece) for piece in pieces]
            arrays = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
            writer.write_shard(index, arrays, meta)
            del rows, arrays
        sync_folder(staging / "shards")
        return seal(staging)["root"]

    def _rows(self, reading: ShardRows, piece: Piece) -> dict[str, np.ndarray]:
        bank = self.banks[piece.parent]
        sidecar = bank.sidecars[piece.at]
        rows = reading.rows(shard_file(bank.path, sidecar.index), sidecar, piece.start, piece.stop)
        return {name: column.copy() for name, column in rows.items()}  # so that the shard can leave the memory

    def _origin(self, pieces: list[Piece]) -> list[dict[str, Any]]:
        return [
            {"uuid": self.banks[p.parent].record["uuid"], "shard": self.banks[p.parent].sidecars[p.at].index,
             "rows": [p.start, p.stop]} for p in pieces
        ]  # fmt: skip


def _provenance(bank: Bank, root: str) -> dict[str, Any]:
    """What a parent leaves in bank.json; its folder by name only: paths say more about a machine than about a bank."""
    spec = bank.spec
    return {
        "uuid": bank.record["uuid"], "name": bank.path.resolve().name, "root": root, "images": len(bank),
        "method": card.method_of(spec), "seed": spec.seed, "recipe_hash": bank.record.get("recipe_hash"),
        "teacher": spec.teacher.get("name") or spec.teacher.get("arch"), "teacher_sha256": spec.teacher.get("sha256"),
        "real_data_used": spec.real_data_used, "contains_real": spec.contains_real,
        "created": bank.record.get("created"), "recipe": spec.recipe, "versions": bank.record.get("versions"),
        "extra": {k: v for k, v in spec.extra.items() if k != "ancestors"},
    }  # fmt: skip


def _ancestors(bank: Bank) -> list[Any]:
    """Parents of the parents, flat: nested records would meet the depth cap of a record one day."""
    found = bank.spec.extra.get("ancestors")
    return found if isinstance(found, list) else []


def _key(parent: object) -> str:
    return str(parent.get("uuid") or parent) if isinstance(parent, dict) else str(parent)


def _teacher(banks: list[Bank], allowed: bool) -> tuple[dict[str, Any], list[str]]:
    """(teacher of the result, notes)."""
    kinds: dict[str, dict[str, Any]] = {}
    for bank in banks:
        kinds.setdefault(str(bank.spec.teacher.get("sha256") or bank.spec.teacher), bank.spec.teacher)
    if len(kinds) == 1:
        return banks[0].spec.teacher, []
    names = [str(t.get("name") or t.get("arch") or "none") for t in kinds.values()]
    judged = [c for c in ("logits", "topk_logit") if banks[0].has(c)]
    if judged and not allowed:
        raise BankMismatchError(
            f"merge: the banks hold {judged[0]} of {len(kinds)} different teachers ({', '.join(names)})",
            hint="a student would learn from two teachers at once: relabel with one, or add --allow-different-teachers",
        )
    what = f"{judged[0]} of different teachers stand side by side" if judged else "no logits are stored"
    return {"name": "several", "teachers": list(kinds.values())}, [f"teachers: {', '.join(names)}; {what}"]


def _snapshots(banks: list[Bank]) -> tuple[list[state.GeneratorRecord], list[str]]:
    """Generator snapshots of the late half of each parent's run; none unless every parent has usable ones."""
    found: list[state.GeneratorRecord] = []
    without: list[str] = []
    for bank in banks:
        records = bank.generators()
        late = [r for r in records if int(r.path.stem) >= bank.spec.shards // 2] or records
        found += late
        if not late or not all(isinstance(r.meta.get("generator"), dict) for r in late):
            without.append(str(bank.path))
    if not found:
        return [], []
    if without:
        return [], [f"generator snapshots stay behind: {', '.join(without)} has none that `distill --fresh` can use"]
    return found, [f"{len(found)} generator snapshots come along"]


def _learning_rate(banks: list[Bank]) -> tuple[dict[str, Any], list[str]]:
    """({"learning_rate": ...} for the record of the last shard, notes); a trajectory-matching bank has it there."""
    metas = [bank.sidecars[-1].raw.get("meta") for bank in banks]
    rates = [meta.get("learning_rate") if isinstance(meta, dict) else None for meta in metas]
    if all(rate is None for rate in rates):
        return {}, []
    if all(rate == rates[0] for rate in rates):
        return {"learning_rate": rates[0]}, []
    return {"learning_rate": None}, [f"the banks were made for different learning rates ({rates}): none is recorded"]


def _copy_transform(bank: Bank, target: Path) -> None:
    if bank.spec.transform:
        record = state.read_transform(bank.path, bank.spec.transform)
        state.save_entry(target / "transform", 0, record.load(), record.meta)


def _copy_entries(bank: Bank, target: Path, folder: str) -> None:
    present = set(state.entries(target / folder))
    for index in state.entries(bank.path / folder):
        if index not in present:
            record = state.read_entry(bank.path / folder, index)
            state.save_entry(target / folder, index, record.load(), record.meta)


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
