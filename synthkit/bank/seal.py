"""The seal of a complete bank: manifest.json (every shard's record and one root hash) and README.md (the card)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from synthkit.bank import card
from synthkit.bank.shard import Sidecar, committed_shards, read_sidecar, shard_file
from synthkit.bank.spec import SCHEMA, BankSpec, read_record
from synthkit.bank.storage import canonical_hash, dump_json, publish, read_json, storage_errors, sync_folder
from synthkit.errors import BankError


def seal(path: Path) -> dict[str, Any]:
    """Write manifest.json and README.md of the complete bank at `path`; returns the manifest.

    The root hash covers what readers see (every shard's sha256 and layout) and nothing that differs between two runs
    of one recipe (times, hosts), so that equal banks have equal roots.

    Raises:
        BankError: shards are missing or a sidecar is damaged.
        StorageError: writing failed.
    """
    spec, record = read_record(path)
    committed = committed_shards(path, spec)
    if len(committed) < spec.shards:
        raise BankError(f"{path}: {spec.shards - len(committed)} of {spec.shards} shards are missing",
                        hint="finish it with: synthkit synthesize ... --resume")  # fmt: skip
    rows, sidecars = [], []
    for index in committed:
        where = shard_file(path, index).with_suffix(".json")
        sidecar = read_sidecar(where, index, spec)
        sidecars.append(sidecar)
        rows.append({"shard": index, "n": sidecar.n, "bytes": sidecar.bytes, "sha256": sidecar.sha256,
                     "sidecar_sha256": hashlib.sha256(where.read_bytes()).hexdigest()})  # fmt: skip
    manifest = {"schema": SCHEMA, "uuid": record["uuid"], "root": root_hash(sidecars), "shards": rows}
    target = path / "manifest.json"
    if not target.exists() or target.read_bytes() != dump_json(manifest):
        with storage_errors("manifest", target):
            publish(path / "README.md", card.render(spec, record, sidecars, manifest["root"]).encode())
            publish(target, dump_json(manifest))
            sync_folder(path)
    return manifest


def root_hash(sidecars: list[Sidecar]) -> str:
    """sha256 over index, size, sha256 and layout of every shard, in order."""
    return canonical_hash([[s.index, s.n, s.bytes, s.sha256, s.raw["datasets"]] for s in sidecars])


def read_manifest(path: Path, spec: BankSpec) -> dict[int, dict[str, Any]] | None:
    """The rows of manifest.json by shard; None where the bank is not sealed. Raises `BankError` when it is damaged."""
    where = path / "manifest.json"
    if not where.exists():
        return None
    raw = read_json(where)
    rows = raw.get("shards")
    if not isinstance(rows, list) or not isinstance(raw.get("root"), str):
        raise BankError(f"{where}: must hold shards and root")
    table = {}
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("shard"), int) or not isinstance(row.get("sha256"), str):
            raise BankError(f"{where}: a row is malformed", got=row)
        table[row["shard"]] = row
    if sorted(table) != list(range(spec.shards)):
        raise BankError(f"{where}: does not list the {spec.shards} planned shards")
    return table
