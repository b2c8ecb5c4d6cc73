"""Records of older schemas, lifted in memory to the newest form. Files are never rewritten on reading.

One pure function per kind of record; each walks the chain 1 -> 2 -> ... -> `SCHEMA`. What schema 1 did not know becomes
"not there": no top-k columns, no transform, and in the manifest None, which is "this seal does not cover it".

Schema 2 (against 1): bank.json has `top_k` and `transform`; shards may hold images_f16 and the three topk columns; the
manifest also covers bank.json, the generator snapshots and the transform, and hashes itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from synthkit.errors import BankError

SCHEMA = 2

Record = dict[str, Any]


def bank_record(raw: Record, where: Path | str = "bank.json") -> Record:
    """bank.json in the form of schema 2 or newer. A newer record whose `min_reader` we meet is returned as it is.

    Raises:
        BankError: the schema is no number, or needs a newer synthkit.
    """
    reader = raw.get("min_reader")
    if not isinstance(reader, int) or isinstance(reader, bool):
        raise BankError(f"{where}: min_reader must be a number", got=reader)
    if reader > SCHEMA:
        raise newer_schema(where, raw.get("schema"))
    if _schema_of(raw, where) > SCHEMA:
        return dict(raw)
    return _lift(raw, where, {1: _bank_1})


def sidecar(raw: Record, where: Path | str = "sidecar") -> Record:
    """A shard's commit record in the newest form. Raises `BankError` as `bank_record`."""
    return _lift(raw, where, {1: _same})


def manifest(raw: Record, where: Path | str = "manifest.json") -> Record:
    """The manifest in the newest form; None stands for what an older seal does not cover. Raises `BankError`."""
    return _lift(raw, where, {1: _manifest_1})


def newer_schema(where: Path | str, schema: object) -> BankError:
    """The error for a file of a schema that this version cannot read."""
    what = f"{where}: written by a newer synthkit (bank schema {schema}, this one reads up to {SCHEMA})"
    return BankError(what, hint="upgrade: pip install -U synthkit")


def _bank_1(raw: Record) -> Record:
    return {**raw, "top_k": None, "transform": {}}


def _manifest_1(raw: Record) -> Record:
    return {**raw, "bank_sha256": None, "generators": None, "transform": None, "seal": None}


def _same(raw: Record) -> Record:
    return dict(raw)


def _lift(raw: Record, where: Path | str, steps: dict[int, Callable[[Record], Record]]) -> Record:
    schema = _schema_of(raw, where)
    if schema > SCHEMA:
        raise newer_schema(where, schema)
    lifted = dict(raw)
    for old in range(schema, SCHEMA):
        lifted = {**steps[old](lifted), "schema": old + 1}
    return lifted


def _schema_of(raw: Record, where: Path | str) -> int:
    schema = raw.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise BankError(f"{where}: schema must be a number from 1", got=schema)
    return schema
