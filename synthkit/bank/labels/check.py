"""The label sets of a bank as parts for `verify` and `repair`: record, shards, manifest of each set."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank.checking.structure import check_structure, read_column
from synthkit.bank.checking.verify import Context, Findings, Part
from synthkit.bank.disk.storage import names_in, read_json, regular_size
from synthkit.bank.labels import views
from synthkit.bank.labels.spec import (
    LabelSpec,
    committed_labels,
    label_file,
    label_sets,
    read_label_record,
    read_label_sidecar,
)
from synthkit.bank.seal import signed
from synthkit.bank.shard import Sidecar, file_sha256, summary, value_problem
from synthkit.errors import BankError


def label_parts(context: Context) -> Iterator[Part]:
    """Every part of every label set: "labels NAME" (record and manifest) and "labels NAME shard I"."""
    folder = context.path / "labels"
    known = label_sets(context.path)
    for name in names_in(folder):
        if name not in known:
            yield Part(f"file labels/{name}", lambda found, n=name: found.note(f"labels/{n} is not a label set"))
    for name in known:
        yield from _set_parts(context, folder / name, name)


def _set_parts(context: Context, folder: Path, name: str) -> Iterator[Part]:
    record, manifest = folder / "labels.json", folder / "manifest.json"
    try:
        names_in(folder)  # refuses a link, before anything behind it is read
        spec, _ = read_label_record(folder)
        _check_owner(spec, context, record)
    except BankError as error:
        failure = error

        def fail(found: Findings) -> None:
            raise failure

        # without its record a set does not exist: the shards stay where they are, unread
        yield Part(f"labels {name}", fail, (record,))
        return
    yield Part(f"labels {name}", lambda found: _check_seal(folder, spec), (manifest,))
    committed = committed_labels(folder, spec)

    @functools.cache
    def rows() -> dict[int, dict[str, Any]] | None:  # of the manifest; None where there is none, or a damaged one
        try:
            return _sealed_rows(folder, spec)
        except BankError:
            return None

    sealed = os.path.lexists(manifest)
    for index in range(spec.shards) if sealed else committed:
        file = label_file(folder, index)
        there = index in committed
        check = (lambda found, i=index: _check_shard(folder, i, spec, rows(), context.deep, found)) if there else _gone
        # the set's manifest vouches for the shard: it goes first
        yield Part(f"labels {name} shard {index}", check, (manifest, file.with_suffix(".json"), file))
    if len(committed) < spec.shards and not sealed:
        text = f"label set {name} is unfinished: {spec.shards - len(committed)} of {spec.shards} shards are to be made"
        yield Part(f"labels {name} rest", lambda found: found.note(text))


def _gone(found: Findings) -> None:
    raise BankError("is listed in the manifest of its label set, but its record is gone")


def _check_owner(spec: LabelSpec, context: Context, where: Path) -> None:
    if spec.bank != context.record.get("uuid"):
        raise BankError(f"{where}: was made for another bank", got=spec.bank)
    if (spec.images, spec.num_classes) != (context.spec.images, context.spec.num_classes):
        raise BankError(f"{where}: does not fit the bank", got=f"{spec.images} images, {spec.num_classes} classes")


def _check_seal(folder: Path, spec: LabelSpec) -> None:
    _sealed_rows(folder, spec)


def _sealed_rows(folder: Path, spec: LabelSpec) -> dict[int, dict[str, Any]] | None:
    """The rows of the set's manifest by shard; None where there is no manifest.

    Raises:
        BankError: its own hash, the hash of labels.json or the list of shards is wrong.
    """
    where = folder / "manifest.json"
    if not os.path.lexists(where):
        return None
    raw = read_json(where)
    if raw.get("seal") != signed(raw)["seal"]:
        raise BankError(f"{where}: was altered after it was written", hint="its own hash does not fit")
    if raw.get("bank") != spec.bank:
        raise BankError(f"{where}: seals labels of another bank", got=raw.get("bank"))
    if raw.get("labels_sha256") != hashlib.sha256((folder / "labels.json").read_bytes()).hexdigest():
        raise BankError(f"{where}: labels.json is not the one that was sealed")
    rows = raw.get("shards")
    if not isinstance(rows, list) or not all(isinstance(r, dict) and type(r.get("shard")) is int for r in rows):
        raise BankError(f"{where}: must hold a row per shard")
    if sorted(row["shard"] for row in rows) != list(range(spec.shards)):
        raise BankError(f"{where}: does not list the {spec.shards} planned shards")
    return {row["shard"]: row for row in rows}


def _check_shard(
    folder: Path, index: int, spec: LabelSpec, rows: dict[int, dict[str, Any]] | None, deep: bool, found: Findings
) -> None:
    file = label_file(folder, index)
    sidecar = read_label_sidecar(file.with_suffix(".json"), index, spec)
    size = regular_size(file)
    if size != sidecar.bytes:
        raise BankError(f"{file}: has {size} bytes, its record says {sidecar.bytes}")
    digest = file_sha256(file)
    found.bytes_read += size
    if digest != sidecar.sha256:
        raise BankError(f"{file}: its sha256 is not the recorded one", got=digest[:16] + "...")
    if rows is not None:
        row = rows[index]
        if (row.get("sha256"), row.get("n"), row.get("bytes")) != (digest, sidecar.n, size):
            raise BankError(f"{file}: is not the shard that was sealed in the manifest of its label set")
    check_structure(file, sidecar)  # only now: an altered file never reaches the HDF5 parser
    if deep:
        _check_values(file, sidecar, spec)


def _check_values(file: Path, sidecar: Sidecar, spec: LabelSpec) -> None:
    columns: dict[str, np.ndarray] = {name: read_column(file, place) for name, place in sidecar.datasets.items()}
    wrong = value_problem(columns, spec)
    if wrong:
        raise BankError(f"{file}: {wrong}")
    if spec.kind == "views":
        views.check_records(columns, images=spec.images, rows=spec.rows, where=str(file))
    counted = summary(columns, spec.num_classes)
    if counted != {key: sidecar.raw.get(key) for key in counted}:
        raise BankError(f"{file}: what its record says of the values is not so", got=counted)
