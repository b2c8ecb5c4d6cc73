"""Writing a bank: shards that are published whole or not at all, states to resume from, and the seal at the end."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank import seal, state
from synthkit.bank.disk.commit import Beaten, commit, holds
from synthkit.bank.disk.lock import Claim, claim
from synthkit.bank.disk.storage import (
    clean_stale_temps,
    dump_json,
    host,
    make_folder,
    plain,
    publish,
    storage_errors,
    sync_folder,
)  # fmt: skip
from synthkit.bank.errors import BankMismatchError
from synthkit.bank.shard import SINCE, committed_shards, conform, encode, read_sidecar, shard_file, summary
from synthkit.bank.spec import BankSpec, differences, read_record, record_of
from synthkit.errors import BankError, OutputExistsError, StorageError, UsageError


class BankWriter:
    """Fills a bank shard by shard. Make one with `create`, `open` or `open_or_create`.

    Shards may be written in any order and by several processes; no file is ever changed after it was published.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.spec, self.record = read_record(self.path)
        self._clock = time.monotonic()
        self._claims: list[Claim] = []

    @classmethod
    def create(cls, path: str | Path, spec: BankSpec) -> BankWriter:
        """Begin a new bank at `path`, which must not exist or be an empty folder.

        Raises:
            OutputExistsError: there is something already.
            StorageError: no room for the planned bank, or no permission.
        """
        path = Path(path)
        _require_empty(path)
        _require_room(path, spec.planned_bytes)
        data = dump_json(record_of(spec))
        with storage_errors("bank", path):
            make_folder(path)
            clean_stale_temps(path)
            try:
                publish(path / "bank.json", data, new=True)
            except FileExistsError:  # two runs began at the same moment
                _require_empty(path)
            sync_folder(path)
        return cls(path)

    @classmethod
    def open(cls, path: str | Path, expect: BankSpec | None = None) -> BankWriter:
        """Go on with the bank at `path`: temporaries of dead runs are removed, and a finished bank is sealed.

        Raises:
            BankNotFoundError: there is no bank.
            BankMismatchError: `expect` describes another bank; the message lists what differs.
            BankError: bank.json is damaged or of a newer schema.
        """
        writer = cls(path)
        if expect is not None and expect.recipe_hash() != writer.spec.recipe_hash():
            changed = differences(writer.spec.identity(), expect.identity())
            raise BankMismatchError(f"{path}: this bank was begun with another recipe ({'; '.join(changed[:6])})",
                                    hint="resume with the same settings, or choose another --out")  # fmt: skip
        for folder in ("", "shards", "state", "progress", "generators", "transform"):
            with storage_errors("bank", writer.path):
                clean_stale_temps(writer.path / folder)
        if not writer.missing():
            writer.finish()
        return writer

    @classmethod
    def open_or_create(cls, path: str | Path, spec: BankSpec) -> BankWriter:
        """`open` when there is a bank at `path` (killed before its first shard or not), else `create`.

        Any number of processes may do this at the same moment: one of them creates, all work on the same bank.
        """
        if not (Path(path) / "bank.json").exists():
            try:
                return cls.create(path, spec)
            except OutputExistsError:
                if not (Path(path) / "bank.json").exists():
                    raise
        return cls.open(path, expect=spec)

    @property
    def shards(self) -> int:
        """Planned number of shards."""
        return self.spec.shards

    def shard_size(self, index: int) -> int:
        """Images in shard `index`."""
        return self.spec.shard_size(index)

    def committed(self) -> list[int]:
        """Shards that exist (have a sidecar), ascending."""
        return committed_shards(self.path, self.spec)

    def missing(self) -> list[int]:
        """Planned shards that do not exist yet, ascending."""
        return sorted(set(range(self.shards)) - set(self.committed()))

    def write_shard(
        self, index: int, arrays: Mapping[str, Any], meta: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Publish shard `index` and return its sidecar.

        Args:
            arrays: "images" uint8 (N,C,H,W), "labels" (N,); optional "logits" (N,K), "difficulty" (N,),
                "origin_step" and "origin_seed" (N,) or one number, "images_f16" (N,C,H,W); with `top_k` also
                "topk_index", "topk_logit" (N,k) and "tail_logsumexp" (N,); N is `shard_size(index)`.
            meta: anything worth recording (JSON data); it does not change the bytes of the shard.

        Raises:
            BankError: the shard exists already with other content (equal content is left as it is).
            BankBusyError: another run made it at the same time, or took this run's claim over.
            UsageError: a column is unknown, missing or malformed. NonFiniteError: a value is not finite.
            StorageError: disk full or the like; the shard does not exist then and no part of it is left.
        """
        self._require_bank()
        if self.spec.transform and not state.entries(self.path / "transform"):
            raise UsageError("bank: images_f16 cannot be read as meant before the transform is written",
                             hint="call write_transform(arrays) first")  # fmt: skip
        columns = conform(arrays, self.spec, self.spec.shard_size(index))
        shard, sidecar = self.shard_path(index), self.sidecar_path(index)
        data, layout = encode(columns)
        digest, now = hashlib.sha256(data).hexdigest(), time.monotonic()
        if sidecar.exists():
            # A run that re-makes one lost shard may have to make its neighbours again: equal bytes are no change.
            present = read_sidecar(sidecar, index, self.spec)
            if present.sha256 != digest:
                raise BankError(f"{shard}: is committed already with other content; shards are immutable")
            return present.raw
        schema = max(self.record["schema"], *(SINCE.get(name, 1) for name in columns))
        record = {
            "schema": schema, "shard": index, "n": len(columns["images"]), "bytes": len(data),
            "sha256": digest, "datasets": layout, **summary(columns, self.spec.num_classes),
            "seconds": round(now - self._clock, 3), "host": host(), "created": round(time.time(), 3),
            "meta": plain(dict(meta or {}), "meta"),
        }  # fmt: skip
        text = dump_json(record)
        with storage_errors(f"shard {index}", shard):
            try:
                commit(shard, data, text, lambda: self._check_claim(index), sha256=digest)
            except Beaten:
                if not holds(shard, digest) or not sidecar.exists():
                    raise
                present = read_sidecar(sidecar, index, self.spec)
                if present.sha256 != digest:
                    raise
                record = present.raw  # the other run made the same bytes
        self._clock = now
        if not self.missing():
            self.finish()
        return record

    def finish(self) -> dict[str, Any]:
        """Seal the complete bank: manifest.json and the card README.md. Called by itself after the last shard.

        Raises:
            BankError: shards are missing, or an older seal is there and does not fit.
        """
        return seal.seal(self.path)

    def shard_path(self, index: int) -> Path:
        """The HDF5 file of shard `index`."""
        return shard_file(self.path, index)

    def sidecar_path(self, index: int) -> Path:
        """The commit record of shard `index`."""
        return shard_file(self.path, index).with_suffix(".json")

    def save_state(self, index: int, arrays: Mapping[str, Any], meta: dict[str, Any]) -> None:
        """Commit the engine's state `index`: what is needed to go on with shard `index` when all before it are done."""
        self._require_bank()
        state.save_entry(self.path / "state", index, arrays, meta)

    def load_state(self) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
        """The newest whole state that the unbroken row of committed shards 0, 1, ... reaches: (index, arrays, meta)."""
        missing = self.missing()
        return state.newest_state(self.path / "state", missing[0] if missing else self.shards)

    def save_progress(self, index: int, step: int, arrays: Mapping[str, Any], meta: dict[str, Any]) -> None:
        """Commit the engine's state at `step` within shard `index`, in place of the one stored there before."""
        self._require_bank()
        state.save_entry(self.path / "progress", step, arrays, {**meta, "shard": index})
        state.prune(self.path / "progress", keep=1)

    def load_progress(self) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
        """The newest whole state within the first missing shard: (index of the shard, arrays, meta)."""
        missing = self.missing()
        found = state.newest_state(self.path / "progress", limit=10**12)
        if found is None or not missing or found[2].get("shard") != missing[0]:
            return None
        return missing[0], found[1], found[2]

    def drop_progress(self) -> None:
        """Remove what `save_progress` stored: the shard that it led to is committed."""
        folder = self.path / "progress"
        if folder.is_dir():
            self._require_bank()
            state.clear(folder)

    def prune_states(self, keep: int = 2) -> None:
        """Remove all but the newest `keep` states."""
        self._require_bank()
        state.prune(self.path / "state", keep)

    def write_generator(self, index: int, arrays: Mapping[str, Any], meta: dict[str, Any]) -> None:
        """Commit generator snapshot `index`, which `distill --fresh` draws from; a bank's seal takes it in."""
        self._require_bank()
        state.save_entry(self.path / "generators", index, arrays, meta)
        seal.admit_generator(self.path, index)

    def write_transform(self, arrays: Mapping[str, Any], meta: dict[str, Any] | None = None) -> None:
        """Commit the transform that `spec.transform` names by sha256, before the first shard.

        Raises:
            UsageError: the bank has no transform, or these are not the arrays that its spec names.
        """
        named, found = self.spec.transform, state.transform_entry("", arrays)["sha256"]
        if not named:
            raise UsageError("bank: the spec has no transform", hint="BankSpec(transform=state.transform_entry(...))")
        if named.get("sha256") != found:
            raise UsageError("bank: these arrays are not the transform of the spec", got=found[:16] + "...",
                             hint="make the spec with transform=state.transform_entry(kind, arrays)")  # fmt: skip
        if state.entries(self.path / "transform"):
            present = state.read_transform(self.path, named)
            if present.meta != plain(meta or {}):
                raise UsageError("bank: the transform is written already, with other facts", got=present.meta)
            return
        state.save_entry(self.path / "transform", 0, arrays, meta or {})

    @contextlib.contextmanager
    def claim(self, shards: Sequence[int] | None) -> Iterator[Claim]:
        """Context in which this run alone makes `shards` (none: holds the whole bank).

        While any claim is held, `write_shard` checks it before it publishes, and refuses shards outside it.

        Raises:
            BankBusyError: a living run claims one of them; the message names its pid, host and shards.
        """
        with claim(self.path, shards) as held:
            self._claims.append(held)
            try:
                yield held
            finally:
                self._claims.remove(held)

    def lock(self) -> contextlib.AbstractContextManager[Claim]:
        """Context in which no other run can hold any of this bank: a claim of the whole."""
        return self.claim(None)

    def _require_bank(self) -> None:
        """Refuse to write where the bank was removed (its folders would be made anew), or when a claim was lost."""
        if not (self.path / "bank.json").exists():
            raise StorageError(f"{self.path}: the bank's folder vanished while the run was writing",
                               hint="nothing is written there now; put it back, then go on with --resume")  # fmt: skip

        for held in self._claims:
            held.check()

    def _check_claim(self, index: int) -> None:
        mine = [held for held in self._claims if held.covers(index)]
        if self._claims and not mine:
            raise UsageError(f"{self.path}: shard {index} does not belong to {self._claims[0].label}, claimed here")
        for held in mine:
            held.check()


def _require_empty(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise OutputExistsError(f"{path}: is a link to nothing", hint="choose another --out")
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputExistsError(f"{path}: is a file", hint="choose another --out")
    # a run that was killed while it wrote its very first file left only that temporary
    inside = [p for p in path.iterdir() if not p.name.startswith("bank.json.tmp-")]
    if (path / "bank.json").exists():
        raise OutputExistsError(f"{path}: there is a bank already", hint="go on with --resume, or choose another --out")
    if inside:
        raise OutputExistsError(f"{path}: is not empty (it holds {inside[0].name})", hint="choose another --out")


def _require_room(path: Path, needed: int) -> None:
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    with storage_errors("bank", path):
        free = shutil.disk_usage(parent).free
    if needed > free:
        raise StorageError(f"{path}: the bank needs about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free there",
                           hint="make fewer images, or choose another --out")  # fmt: skip
