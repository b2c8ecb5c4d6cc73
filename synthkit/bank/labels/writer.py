"""Writing label sets: shards that are published whole or not at all, a manifest at the end, nothing overwritten."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from synthkit.bank.disk.commit import Beaten, commit
from synthkit.bank.disk.lock import Claim, claim
from synthkit.bank.disk.storage import (
    clean_stale_temps,
    dump_json,
    host,
    make_folder,
    plain,
    publish,
    read_json,
    storage_errors,
    sync_folder,
)  # fmt: skip
from synthkit.bank.errors import BankMismatchError
from synthkit.bank.labels import views
from synthkit.bank.labels.sets import mismatch
from synthkit.bank.labels.spec import (
    LabelSpec,
    committed_labels,
    label_file,
    read_label_record,
    read_label_sidecar,
    record_of,
    set_path,
)
from synthkit.bank.reader import Bank
from synthkit.bank.seal import root_hash, signed
from synthkit.bank.shard import conform_columns, encode, summary, value_problem
from synthkit.bank.spec import SCHEMA, differences
from synthkit.errors import BankError, OutputExistsError, StorageError, UsageError


class LabelWriter:
    """Fills a label set shard by shard. Make one with `create`, `open` or `open_or_create`."""

    def __init__(self, bank_path: str | Path, name: str):
        self.bank = Path(bank_path)
        self.name, self.path = name, set_path(self.bank, name)
        self.spec, self.record = read_label_record(self.path)
        self._clock = time.monotonic()
        self._claims: list[Claim] = []

    @classmethod
    def create(cls, bank_path: str | Path, name: str, spec: LabelSpec) -> LabelWriter:
        """Begin a new label set of the bank at `bank_path`.

        Raises:
            OutputExistsError: the bank has a set of that name. UsageError: `name` cannot be one.
            BankMismatchError: the spec is for another bank. StorageError: no room or no permission.
        """
        path, bank = set_path(Path(bank_path), name), Bank(bank_path)
        wrong = mismatch(spec, bank)
        if wrong:
            raise BankMismatchError(f"{path}: the label set {wrong}")
        _require_room(path, spec.planned_bytes)
        with storage_errors("labels", path):
            make_folder(path)
            clean_stale_temps(path)
            try:
                publish(path / "labels.json", dump_json(record_of(spec, name)), new=True)
            except FileExistsError:
                hint = "go on with --resume, or choose another --name"
                raise OutputExistsError(f"{path}: there is a label set already", hint=hint) from None
            sync_folder(path)
            sync_folder(path.parent)
        return cls(bank_path, name)

    @classmethod
    def open(cls, bank_path: str | Path, name: str, expect: LabelSpec | None = None) -> LabelWriter:
        """Go on with a label set: temporaries of dead runs are removed, a complete set gets its manifest.

        Raises:
            BankMismatchError: `expect` describes another set; the message lists what differs.
            BankError: there is none, or it is damaged.
        """
        writer = cls(bank_path, name)
        if expect is not None and expect.identity_hash() != writer.spec.identity_hash():
            changed = differences(writer.spec.identity(), expect.identity())
            raise BankMismatchError(f"{writer.path}: this label set was begun otherwise ({'; '.join(changed[:6])})",
                                    hint="resume with the same settings, or choose another --name")  # fmt: skip
        with storage_errors("labels", writer.path):
            clean_stale_temps(writer.path)
        if not writer.missing():
            writer.finish()
        return writer

    @classmethod
    def open_or_create(cls, bank_path: str | Path, name: str, spec: LabelSpec) -> LabelWriter:
        """`open` when there is a set of that name, else `create`."""
        if not (set_path(Path(bank_path), name) / "labels.json").exists():
            with contextlib.suppress(OutputExistsError):  # another run was faster: both fill the same set
                return cls.create(bank_path, name, spec)
        return cls.open(bank_path, name, expect=spec)

    def committed(self) -> list[int]:
        """Shards that exist, ascending."""
        return committed_labels(self.path, self.spec)

    def missing(self) -> list[int]:
        """Planned shards that do not exist yet, ascending."""
        return sorted(set(range(self.spec.shards)) - set(self.committed()))

    def write_shard(
        self, index: int, arrays: Mapping[str, Any], meta: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Publish shard `index` and return its record.

        Args:
            arrays: every column of `spec.layout`, `spec.shard_size(index)` rows each.
            meta: anything worth recording (JSON data); it does not change the bytes of the shard.

        Raises:
            BankError: the shard exists already with other content (equal content is left as it is).
            BankBusyError: another run made it at the same time, or took this run's claim over.
            UsageError: a column is unknown, missing or malformed. NonFiniteError: a value is not finite.
            StorageError: disk full or the like; the shard does not exist then and no part of it is left.
        """
        columns = conform_columns(arrays, self.spec.layout, self.spec.shard_size(index), f"kind {self.spec.kind}")
        wrong = value_problem(columns, self.spec)
        if wrong:
            raise UsageError(f"labels: {wrong}")
        if self.spec.kind == "views":
            views.check_records(columns, images=self.spec.images, rows=self.spec.rows, where=f"labels shard {index}")
        file = label_file(self.path, index)
        data, layout = encode(columns)
        digest, now = hashlib.sha256(data).hexdigest(), time.monotonic()
        if file.with_suffix(".json").exists():
            present = read_label_sidecar(file.with_suffix(".json"), index, self.spec)
            if present.sha256 != digest:
                raise BankError(f"{file}: is committed already with other content; shards are immutable")
            return present.raw
        record = {
            "schema": SCHEMA, "shard": index, "n": self.spec.shard_size(index), "bytes": len(data), "sha256": digest,
            "datasets": layout, **summary(columns, self.spec.num_classes), "seconds": round(now - self._clock, 3),
            "host": host(), "created": round(time.time(), 3), "meta": plain(dict(meta or {}), "meta"),
        }  # fmt: skip
        with storage_errors(f"labels shard {index}", file):
            try:
                commit(file, data, dump_json(record), lambda: self._check_claim(index))
            except Beaten:
                present = read_label_sidecar(file.with_suffix(".json"), index, self.spec)
                if present.sha256 != digest:
                    raise
                record = present.raw  # the other run made the same bytes
        self._clock = now
        if not self.missing():
            self.finish()
        return record

    def finish(self) -> dict[str, Any]:
        """Write manifest.json of the complete set. Called by itself after the last shard.

        A manifest that is there stays as it is; a set that does not fit it any more is refused.

        Raises:
            BankError: shards are missing, or the present manifest sealed another content.
        """
        if self.missing():
            raise BankError(f"{self.path}: {len(self.missing())} of {self.spec.shards} shards are missing",
                            hint="finish it with: synthkit relabel ... --resume")  # fmt: skip
        manifest = label_manifest(self.path, self.spec)
        target = self.path / "manifest.json"
        if target.exists():
            present = read_json(target)
            if present.get("root") != manifest["root"]:
                raise BankError(f"{target}: seals another content than the set has now",
                                hint=f"synthkit bank verify {self.bank} lists what differs")  # fmt: skip
            return present
        with storage_errors("labels manifest", target):
            publish(target, dump_json(manifest))
            sync_folder(self.path)
        return manifest

    @contextlib.contextmanager
    def claim(self, shards: Sequence[int] | None = None) -> Iterator[Claim]:
        """Context in which this run alone makes `shards` (none: the whole set).

        Raises:
            BankBusyError: a living run claims one of them; the message names its pid, host and shards.
        """
        with claim(self.path, shards) as held:
            self._claims.append(held)
            try:
                yield held
            finally:
                self._claims.remove(held)

    def _check_claim(self, index: int) -> None:
        mine = [held for held in self._claims if held.covers(index)]
        if self._claims and not mine:
            raise UsageError(f"{self.path}: shard {index} is not among those claimed here")
        for held in mine:
            held.check()


def label_manifest(folder: Path, spec: LabelSpec) -> dict[str, Any]:
    """manifest.json of the complete set in `folder`: the hash of labels.json, a row per shard, and its own hash.

    Raises:
        BankError: a record is missing or damaged.
    """
    sidecars = [read_label_sidecar(label_file(folder, i).with_suffix(".json"), i, spec) for i in range(spec.shards)]
    rows = [{"shard": s.index, "n": s.n, "bytes": s.bytes, "sha256": s.sha256} for s in sidecars]
    digest = hashlib.sha256((folder / "labels.json").read_bytes()).hexdigest()
    return signed({"schema": SCHEMA, "kind": "labels", "bank": spec.bank, "root": root_hash(sidecars),
                   "labels_sha256": digest, "shards": rows})  # fmt: skip


def _require_room(path: Path, needed: int) -> None:
    import shutil

    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    with storage_errors("labels", path):
        free = shutil.disk_usage(parent).free
    if needed > free:
        raise StorageError(f"{path}: the labels need about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free there",
                           hint="store fewer views or a smaller --top_k")  # fmt: skip
