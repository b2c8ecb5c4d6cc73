"""The seal of a complete bank: manifest.json (every record and one root hash) and README.md (the card).

manifest.json, schema 2:
    uuid             of the bank
    root             over what readers see of the shards, and nothing that differs between two runs of one recipe
                     (times, hosts): equal banks have equal roots
    bank_sha256      of the file bank.json
    shards           rows {shard, n, bytes, sha256, sidecar_sha256}
    generators       rows {index, bytes, sha256, record_sha256} of the generator snapshots
    transform        such a row, or null
    seal             sha256 of the canonical JSON of all of the above

A schema 1 manifest (uuid, root, shards) stays valid; it says nothing of the rest.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from synthkit.bank import card, migrate, state
from synthkit.bank.disk.storage import (
    canonical_hash,
    clean_stale_temps,
    dump_json,
    publish,
    read_json,
    storage_errors,
    sync_folder,
)
from synthkit.bank.shard import Sidecar, committed_shards, read_sidecar, shard_file
from synthkit.bank.spec import SCHEMA, BankSpec, read_record
from synthkit.errors import BankError


def seal(path: Path, *, renew: bool = False) -> dict[str, Any]:
    """Write manifest.json and README.md of the complete bank at `path`; returns the manifest.

    A manifest that is there already stays. Only the records of its shards may be brought up to date (a lost shard was
    made again, byte for byte): sealing by itself never vouches for anything that the present seal does not.

    Args:
        renew: make the manifest anew from what is there now (`bank seal`, after a verification); an older schema
            becomes the newest.

    Raises:
        BankError: shards are missing, a record is damaged, or (without `renew`) the bank is not the one that the
            present manifest sealed.
        StorageError: writing failed.
    """
    spec, record = read_record(path)
    committed = committed_shards(path, spec)
    if len(committed) < spec.shards:
        raise BankError(f"{path}: {spec.shards - len(committed)} of {spec.shards} shards are missing",
                        hint="finish it with: synthkit synthesize ... --resume")  # fmt: skip
    sidecars, rows = _shard_rows(path, spec, committed)
    root, target = root_hash(sidecars), path / "manifest.json"
    if target.exists() and not renew:
        manifest = _kept(path, spec, record["uuid"], root, rows)
    else:
        manifest = signed({
            "schema": SCHEMA, "uuid": record["uuid"], "root": root, "shards": rows,
            "bank_sha256": _sha256(_record(path)),
            "generators": [_entry_row(path / "generators", i) for i in state.entries(path / "generators")],
            "transform": _entry_row(path / "transform", 0) if spec.transform else None,
        })  # fmt: skip
    data = dump_json(manifest)
    if not target.exists() or target.read_bytes() != data:
        with storage_errors("manifest", target):
            clean_stale_temps(path)  # of a run that was killed while it sealed
            publish(path / "README.md", _card(path, spec, record, sidecars, manifest))
            publish(target, data)
            sync_folder(path)
    return manifest


def refresh_card(path: Path) -> None:
    """Write README.md of a sealed bank anew, with what its run measured since (run.json); else nothing is done.

    Raises:
        BankError: the bank is damaged. StorageError: writing failed.
    """
    if not (path / "manifest.json").exists():
        return
    spec, record = read_record(path)
    records = [(i, shard_file(path, i).with_suffix(".json")) for i in committed_shards(path, spec)]
    sidecars = [read_sidecar(where, i, spec) for i, where in records]
    data = _card(path, spec, record, sidecars, read_json(path / "manifest.json"))
    target = path / "README.md"
    if not target.is_file() or target.read_bytes() != data:
        with storage_errors("card", target):
            publish(target, data)
            sync_folder(path)


def _card(
    path: Path, spec: BankSpec, record: dict[str, Any], sidecars: list[Sidecar], manifest: dict[str, Any]
) -> bytes:
    # the root alone, not the seal: the card is no part of what is sealed and must not lag behind it
    return card.render(spec, record, sidecars, str(manifest["root"]), results=card.run_record(path)).encode()


def _kept(path: Path, spec: BankSpec, uuid: str, root: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The present manifest, with the present rows of its shards when they are the same shards."""
    raw, where = read_json(path / "manifest.json"), path / "manifest.json"
    table, _ = _checked(raw, where, spec)
    hint = f"synthkit bank verify {path} lists what differs, bank repair sets the old manifest aside"
    if raw.get("uuid") != uuid or raw["root"] != root:
        raise BankError(f"{where}: seals another content than the bank has now", got=root[:16] + "...", hint=hint)
    if [table[row["shard"]] for row in rows] == rows:
        return raw
    changed = {**raw, "shards": rows}
    return signed(changed) if "seal" in raw else changed


def admit_generator(path: Path, index: int) -> None:
    """Add generator snapshot `index`, just written, to the manifest of a sealed bank (schema 2; else nothing).

    Raises:
        BankError: the manifest is damaged. StorageError: writing failed.
    """
    where = path / "manifest.json"
    if not where.exists():
        return
    raw = read_json(where)
    _, lifted = _checked(raw, where, read_record(path)[0])
    if lifted["generators"] is None:
        return
    new = _entry_row(path / "generators", index)
    others = [row for row in raw["generators"] if row["index"] != index]
    if len(others) + 1 == len(raw["generators"]) and new in raw["generators"]:
        return
    rows = sorted([*others, new], key=lambda row: row["index"])
    with storage_errors("manifest", where):
        publish(where, dump_json(signed({**raw, "generators": rows})))
        sync_folder(path)


def check_manifest(path: Path, spec: BankSpec, record: dict[str, Any]) -> dict[str, list[str]]:
    """What contradicts the manifest of the bank at `path`, apart from its shards: part -> problems.

    Parts are "manifest" (its own hash, uuid and root), "bank.json", "generators N" and "transform 0". Empty where the
    bank is not sealed. The rows of the shards are checked by `verify`, which reads every shard anyway.
    """
    where = path / "manifest.json"
    if not where.exists():
        return {}
    try:
        raw = read_json(where)
        table, manifest = _checked(raw, where, spec)
    except BankError as error:
        return {"manifest": [str(error)]}
    found: dict[str, list[str]] = {}
    if raw["schema"] < min(record["schema"], SCHEMA):
        found["manifest"] = [f"{where}: is of an older schema than the bank, and covers less of it"]
    elif manifest.get("uuid") != record["uuid"]:
        found["manifest"] = [f"{where}: seals another bank (uuid {manifest.get('uuid')!r})"]
    elif manifest["root"] != _present_root(path, spec, manifest["root"]):
        found["manifest"] = [f"{where}: its root is not the root of the shards"]
    if manifest["bank_sha256"] is None:
        return found  # schema 1
    if manifest["bank_sha256"] != _sha256(_record(path)):
        found["bank.json"] = [f"{_record(path)}: is not the record that was sealed; restore it from a copy"]
    sealed = {("generators", row["index"]): row for row in manifest["generators"]}
    if manifest["transform"] is not None:
        sealed["transform", 0] = manifest["transform"]
    present = {(folder, i) for folder in ("generators", "transform") for i in state.entries(path / folder)}
    for folder, index in sorted(present | set(sealed)):
        wrong = _entry_problem(path / folder, index, sealed.get((folder, index)))
        if wrong:
            found[f"{folder} {index}"] = [wrong]
    return found


def _entry_problem(folder: Path, index: int, row: dict[str, Any] | None) -> str | None:
    file = state.entry_path(folder, index)
    if row is None:
        return f"{file}: is not in the sealed manifest"
    try:
        return None if _entry_row(folder, index) == row else f"{file}: is not the one that was sealed in manifest.json"
    except BankError as error:
        return str(error)


def _present_root(path: Path, spec: BankSpec, sealed: str) -> str:
    """The root of the shards; `sealed` where a record is missing or damaged, which is reported as such elsewhere."""
    try:
        return root_hash([read_sidecar(_sidecar(path, i), i, spec) for i in range(spec.shards)])
    except BankError:
        return sealed


def root_hash(sidecars: list[Sidecar]) -> str:
    """sha256 over index, size, sha256 and layout of every shard, in order."""
    return canonical_hash([[s.index, s.n, s.bytes, s.sha256, s.raw["datasets"]] for s in sidecars])


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """`manifest` with its own hash under "seal"."""
    body = {name: value for name, value in manifest.items() if name != "seal"}
    return {**body, "seal": canonical_hash(body)}


def read_manifest(path: Path, spec: BankSpec) -> dict[int, dict[str, Any]] | None:
    """The rows of manifest.json by shard; None where the bank is not sealed. Raises `BankError` when it is damaged."""
    where = path / "manifest.json"
    if not where.exists():
        return None
    return _checked(read_json(where), where, spec)[0]


def _checked(raw: dict[str, Any], where: Path, spec: BankSpec) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """(rows of the shards by index, manifest in the newest form) of `raw`. Raises `BankError` when it is malformed."""
    manifest = migrate.manifest(raw, where)
    rows = manifest.get("shards")
    if not isinstance(rows, list) or not isinstance(manifest.get("root"), str):
        raise BankError(f"{where}: must hold shards and root")
    table = {}
    for row in rows:
        if not isinstance(row, dict) or type(row.get("shard")) is not int or not isinstance(row.get("sha256"), str):
            raise BankError(f"{where}: a row is malformed", got=row)
        table[row["shard"]] = row
    if sorted(table) != list(range(spec.shards)) or len(rows) != spec.shards:
        raise BankError(f"{where}: does not list the {spec.shards} planned shards")
    if raw["schema"] >= 2:
        _check_covering(raw, where)
    return table, manifest


def _check_covering(raw: dict[str, Any], where: Path) -> None:
    """The part of a manifest that schema 2 brought."""
    if raw.get("seal") != signed(raw)["seal"]:
        raise BankError(f"{where}: was altered after it was written", hint="its own hash does not fit")
    if not isinstance(raw.get("bank_sha256"), str) or not isinstance(raw.get("generators"), list):
        raise BankError(f"{where}: must hold bank_sha256 and generators")
    if "transform" not in raw:
        raise BankError(f"{where}: must say whether there is a transform")
    for row in [*raw["generators"], *([] if raw["transform"] is None else [raw["transform"]])]:
        whole = isinstance(row, dict) and sorted(row) == ["bytes", "index", "record_sha256", "sha256"]
        if not whole or not isinstance(row["index"], int) or isinstance(row["index"], bool) or row["index"] < 0:
            raise BankError(f"{where}: a row is malformed", got=row)
        if not all(re.fullmatch(r"[0-9a-f]{64}", str(row[name])) for name in ("sha256", "record_sha256")):
            raise BankError(f"{where}: a sha256 is malformed", got=row)


def _shard_rows(path: Path, spec: BankSpec, indices: list[int]) -> tuple[list[Sidecar], list[dict[str, Any]]]:
    sidecars, rows = [], []
    for index in indices:
        where = _sidecar(path, index)
        sidecar = read_sidecar(where, index, spec)
        sidecars.append(sidecar)
        rows.append({"shard": index, "n": sidecar.n, "bytes": sidecar.bytes, "sha256": sidecar.sha256,
                     "sidecar_sha256": _sha256(where)})  # fmt: skip
    return sidecars, rows


def _entry_row(folder: Path, index: int) -> dict[str, Any]:
    """The manifest's row of a generator snapshot or transform. Raises `BankError` when its record is damaged."""
    record = state.read_entry(folder, index)
    where = record.path.with_suffix(".json")
    size = record.path.stat().st_size
    return {"index": index, "bytes": size, "sha256": record.sha256, "record_sha256": _sha256(where)}


def _record(path: Path) -> Path:
    return path / "bank.json"


def _sidecar(path: Path, index: int) -> Path:
    return shard_file(path, index).with_suffix(".json")


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BankError(f"{path}: cannot be read: {error.strerror}") from error
