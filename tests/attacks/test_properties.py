"""Properties of the readers, with inputs that hypothesis makes (the long runs are `synthkit bench fuzz`)."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthkit.bank import Bank, seal, state
from synthkit.bank.checking.verify import verify
from synthkit.bank.disk.storage import dump_json, parse_json
from synthkit.bank.errors import BankIndexError
from synthkit.bank.shard import check_sidecar
from synthkit.bank.spec import read_record
from synthkit.cli.bank.common import clean
from synthkit.config import safe_yaml
from synthkit.errors import BankError, ConfigError, UsageError

from .forge import small_bank

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from synthkit.bench.fuzz_json import JSON, records  # noqa: E402

FOLDER = Path(tempfile.mkdtemp(prefix="synthkit-properties-"))
BANK = small_bank(FOLDER / "bank").path
SPEC = Bank(BANK).spec
SEEDS = {name: (BANK / name).read_bytes() for name in ("bank.json", "shards/00000.json", "manifest.json")}
SHARD = (BANK / "shards" / "00000.h5").read_bytes()
common = settings(max_examples=200, deadline=None, database=None)


@pytest.fixture(autouse=True, scope="module")
def _tidy():
    yield
    shutil.rmtree(FOLDER)


@pytest.fixture(autouse=True)
def _honest():
    yield
    for name, data in SEEDS.items():
        (BANK / name).write_bytes(data)
    (BANK / "shards" / "00000.h5").write_bytes(SHARD)


@common
@given(st.binary(max_size=300) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_as_json(data):
    try:
        value = parse_json(data, "x")
    except BankError:
        return
    assert isinstance(value, dict)
    assert parse_json(dump_json(value), "x") == value  # whatever is accepted can be written, and is read as the same


@common
@given(records([SEEDS["bank.json"]]))
def test_bank_record(data):
    """Accepted: the plan adds up and every number is in its range."""
    (BANK / "bank.json").write_bytes(data)
    try:
        spec, raw = read_record(BANK)
    except BankError:
        return
    assert sum(spec.shard_size(i) for i in (0, spec.shards - 1)) <= 2 * spec.images
    assert (spec.shards - 1) * spec.per_shard < spec.images <= spec.shards * spec.per_shard
    assert len(spec.mean) == spec.shape[0] and np.isfinite(spec.mean + spec.std).all() and min(spec.std) > 0
    assert len(spec.recipe_hash()) == 64 and raw["uuid"]


@common
@given(records([SEEDS["shards/00000.json"]]))
def test_sidecar(data):
    """Accepted: all columns lie inside of the file and apart from each other, and the facts are usable."""
    try:
        sidecar = check_sidecar(parse_json(data, "x"), "x", 0, SPEC)
    except BankError:
        return
    spans = []
    for place in sidecar.datasets.values():
        size = int(np.prod(place.shape)) * place.dtype.itemsize
        assert place.offset >= 0 and place.offset + size <= sidecar.bytes and place.shape[0] == 10
        spans.append((place.offset, place.offset + size))
    assert all(a[1] <= b[0] for a, b in zip(sorted(spans), sorted(spans)[1:], strict=False))


@settings(parent=common, max_examples=100)
@given(records([SEEDS["shards/00000.json"]]))
def test_what_is_opened_is_read(data):
    """A bank that opens gives every row of every column, or says what is wrong with the file; verify never raises."""
    (BANK / "shards" / "00000.json").write_bytes(data)
    report = verify(BANK, deep=True)
    try:
        bank = Bank(BANK)
        for name in bank.columns:
            assert len(bank.column(name)) == 20
    except BankError:
        assert not report.ok


@common
@given(records([SEEDS["manifest.json"]]))
def test_manifest(data):
    """A changed manifest is refused, or says the same about every shard."""
    (BANK / "manifest.json").write_bytes(data)
    honest = json.loads(SEEDS["manifest.json"])
    try:
        table = seal.read_manifest(BANK, SPEC)
    except BankError:
        return
    assert table is not None and sorted(table) == [0, 1]
    if json.loads(data) != honest:  # not noticed by the reader itself: then by the comparison with the shards
        assert json.loads(data).get("schema") == 1 or not verify(BANK).ok or table == {
            row["shard"]: row for row in honest["shards"]}  # fmt: skip


@settings(parent=common, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, len(SHARD) - 1), st.integers(0, 7)), min_size=1, max_size=5))
def test_flips_of_a_shard(flips):
    """Found, always: the record has its hash."""
    data = bytearray(SHARD)
    for position, bit in flips:
        data[position] ^= 1 << bit
    (BANK / "shards" / "00000.h5").write_bytes(data)
    assert verify(BANK).ok == (bytes(data) == SHARD)


@common
@given(
    st.dictionaries(st.text(max_size=8), st.sampled_from(["f4", "f8", "i8", "u1", "f2", "?"]), max_size=4), st.data()
)
def test_arrays_come_back(names, data):
    arrays = {name: np.arange(data.draw(st.integers(0, 5))).astype(kind) for name, kind in names.items()}
    encoded = state.encode_arrays(arrays)
    file = FOLDER / "arrays.safetensors"
    file.write_bytes(encoded)
    found = state.read_arrays(file, hashlib.sha256(encoded).hexdigest())
    assert set(found) == set(arrays)
    assert all(
        np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in arrays.items()
    )


@common
@given(st.lists(st.integers(-30, 50) | st.integers(), max_size=6) | st.lists(st.floats(), max_size=3) | JSON)
def test_any_indices(indices: Any):
    """Rows, or a typed error: never a row of somewhere else."""
    bank = Bank(BANK)
    whole = bank.column("labels")
    try:
        rows = bank.batch(indices if isinstance(indices, list) else [indices], columns=["labels"]).labels
    except (BankIndexError, UsageError):
        return
    assert rows is not None and np.array_equal(rows, whole[np.asarray(indices, dtype=np.int64).reshape(-1)])


@common
@given(st.text(max_size=300))
def test_yaml(text):
    try:
        value = safe_yaml.loads(text)
    except ConfigError:
        return
    assert isinstance(value, dict) and all(isinstance(key, str) for key in value)


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=8)  # PyYAML writes NEL as a blank
VALUES = st.integers() | st.booleans() | st.floats(allow_nan=False) | NAMES


@common
@given(st.dictionaries(NAMES, VALUES, max_size=5))
def test_yaml_comes_back(value):
    assert safe_yaml.loads(safe_yaml.dumps(value)) == value


@common
@given(st.text())
def test_clean_text(text):
    said = clean(text)
    assert said.isprintable() and len(said) <= 200
