"""Removing duplicates: which rows stand for which, and a new bank of those that stay. The old bank is never changed.

Exact duplicates are found by a hash of the pixels. Near duplicates come from feature vectors and a distance, by the
greedy leader rule of `evaluation.neighbours.leaders`: of a group the lowest row stays, no two rows that stay lie within
the threshold, and every removed row lies within it of the row that represents it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank import card
from synthkit.bank.checking.verify import verify
from synthkit.bank.disk.storage import canonical_hash, require_free, staged
from synthkit.bank.reader import Bank
from synthkit.bank.seal import root_hash
from synthkit.bank.spec import BankSpec
from synthkit.bank.writer import BankWriter
from synthkit.errors import BankError, UsageError

RULE = "greedy leaders in stored order: the lowest row of a group stays"
READ_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Who stands for whom."""

    leader: np.ndarray
    """int64 (N,): the row that represents each row; its own number for a row that stays."""
    exact: np.ndarray
    """bool (N,): removed because the pixels are those of the leader."""
    threshold: float | None = None
    """Distance up to which two images count as near duplicates; None where only exact ones were looked for."""
    distances: np.ndarray | None = None
    """float64 (N,): distance of a row to its leader; 0 for a row that stays."""
    about: dict[str, Any] = field(default_factory=dict)
    """The feature space and where the threshold comes from, for the record."""

    @property
    def keep(self) -> np.ndarray:
        """The rows that stay, ascending."""
        return np.flatnonzero(self.leader == np.arange(len(self.leader)))

    @property
    def removed(self) -> np.ndarray:
        """The rows that go, ascending."""
        return np.flatnonzero(self.leader != np.arange(len(self.leader)))


def exact_leaders(bank: Bank) -> np.ndarray:
    """int64 (N,): the first row with the same pixels (labels do not count). Memory: about 150 bytes an image.

    Where a bank also has float pixels to train on (`images_f16`), those must be equal too.
    """
    first: dict[bytes, int] = {}
    leader = np.empty(len(bank), np.int64)
    columns = [name for name in ("images", "images_f16") if bank.has(name)]
    step = max(1, READ_BYTES // bank.spec.image_bytes)
    for start in range(0, len(bank), step):
        batch = bank.batch(np.arange(start, min(start + step, len(bank))), columns=columns)
        for row, pixels in enumerate(zip(*(getattr(batch, name) for name in columns), strict=True), start):
            digest = hashlib.blake2b(b"".join(part.tobytes() for part in pixels), digest_size=20).digest()
            leader[row] = first.setdefault(digest, row)
    return leader


def only_exact(bank: Bank) -> Duplicates:
    """The exact duplicates of `bank`."""
    leader = exact_leaders(bank)
    return Duplicates(leader=leader, exact=leader != np.arange(len(leader)), distances=np.zeros(len(leader)))


def with_near(
    exact: Duplicates, leader: np.ndarray, distances: np.ndarray, threshold: float, **about: Any
) -> Duplicates:
    """`exact` joined with near duplicates among the rows that it keeps.

    Args:
        leader: (N,) result of `leaders` on the rows `exact.keep` (-1 elsewhere).
        distances: (N,) of each of these rows to its leader.
    """
    joined = leader[exact.leader]  # the copies of an image go where it goes
    gaps = np.where(exact.exact, distances[exact.leader], distances)
    copies = exact.exact & (joined == exact.leader)
    return Duplicates(leader=joined, exact=copies, threshold=threshold, distances=gaps, about=about)


def write_kept(bank: Bank, found: Duplicates, out: str | Path) -> Bank:
    """A new bank at `out` with the rows that stay, in their order, all columns; whole or absent.

    Generator snapshots and the transform come along; label sets stay with the old bank (their rows are its rows).
    One shard is held in memory at a time.

    Raises: as `check_source`; StorageError: writing failed; there is nothing at `out` then.
    """
    check_source(bank, Path(out))
    keep = found.keep
    spec = new_spec(bank, found)
    with staged(out) as staging:
        writer = BankWriter.create(staging, spec)
        transform = bank.transform()
        if transform is not None:
            writer.write_transform(*transform)
        for index, record in enumerate(bank.generators()):
            writer.write_generator(index, record.load(), record.meta)
        for index in range(spec.shards):
            start = index * spec.per_shard
            rows = keep[start : start + spec.shard_size(index)]
            batch = bank.batch(rows, columns=bank.columns)
            arrays = {name: value for name, value in vars(batch).items() if value is not None}
            writer.write_shard(index, arrays, _meta(bank, rows, last=index == spec.shards - 1))
    return Bank(out)


def check_source(bank: Bank, out: Path) -> None:
    """Refuse, before any work, what cannot become a new bank at `out`.

    Raises:
        BankError: the bank is unfinished or damaged (what is damaged must not be sealed anew).
        UsageError: `out` lies inside the bank. OutputExistsError: `out` is not empty.
    """
    if out.absolute().resolve().is_relative_to(bank.path.resolve()):
        raise UsageError(f"dedup: {out} lies inside the bank {bank.path}", hint="choose another --out")
    require_free(out)
    if not bank.complete:
        raise BankError(f"{bank.path}: is unfinished", hint="finish it with: synthkit synthesize ... --resume")
    verify(bank.path).raise_if_damaged()


def new_spec(bank: Bank, found: Duplicates) -> BankSpec:
    """The spec of the new bank: the old recipe with the rule, the space, the threshold and the rows behind it."""
    spec, keep = bank.spec, found.keep
    digest = hashlib.sha256(keep.astype("<i8").tobytes()).hexdigest()
    dedup = {"rule": RULE, "threshold": found.threshold, **found.about, "rows_sha256": digest}
    parent = {
        "uuid": bank.record["uuid"], "name": bank.path.resolve().name, "root": root_hash(bank.sidecars),
        "images": len(bank), "method": card.method_of(spec), "recipe_hash": bank.record.get("recipe_hash"),
        "real_data_used": spec.real_data_used, "contains_real": spec.contains_real,
        "created": bank.record.get("created"), "how": f"{len(bank) - len(keep):,} duplicates were removed",
    }  # fmt: skip
    older = [*spec.extra.get("ancestors", []), *spec.parents]
    return dataclasses.replace(
        spec, images=len(keep), images_per_shard=min(spec.per_shard, len(keep)),
        recipe={**spec.recipe, "dedup": {**dedup, "parent": canonical_hash(parent["root"])}}, parents=[parent],
        extra={**spec.extra, **({"ancestors": older} if older else {})},
    )  # fmt: skip


def _meta(bank: Bank, rows: np.ndarray, last: bool) -> dict[str, Any]:
    """What the record of a new shard says: the span of the old rows, and what belongs to the last shard of a bank."""
    meta: dict[str, Any] = {"rows_of_parent": [int(rows[0]), int(rows[-1])]}
    rate = (bank.sidecars[-1].raw.get("meta") or {}).get("learning_rate")
    return {**meta, "learning_rate": rate} if last and rate is not None else meta


def summary(bank: Bank, found: Duplicates) -> dict[str, Any]:
    """The figures of a dedup as plain data: counts, per class, the distribution of distances."""
    removed = found.removed
    per_class: dict[str, int] | None = None
    if bank.has("labels") and bank.spec.label_kind != "none":
        counts = np.bincount(bank.column("labels")[removed], minlength=bank.num_classes)
        names = bank.class_names
        per_class = {f"{i} {names[i]}" if names[i] != str(i) else names[i]: int(n) for i, n in enumerate(counts) if n}
    groups = np.unique(found.leader[removed], return_counts=True)[1]
    return {
        "images": len(found.leader), "kept": len(found.keep), "removed": len(removed),
        "exact": int(found.exact.sum()), "near": len(removed) - int(found.exact.sum()),
        "groups": len(groups), "largest_group": int(groups.max(initial=0)) + 1 if len(groups) else 0,
        "threshold": found.threshold, "rule": RULE, **found.about, "removed_per_class": per_class,
        "contains_real": bank.spec.contains_real,
    }  # fmt: skip
