"""Schemas: every fixture reads for ever, older records are lifted, and what schema 2 brought is checked."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthkit.bank import Bank, BankBusyError, BankSpec, BankWriter, migrate, state
from synthkit.bank.checking.repair import repair
from synthkit.bank.checking.verify import verify
from synthkit.bank.disk.storage import MAX_JSON_BYTES, dump_json
from synthkit.bank.seal import signed
from synthkit.bank.shard import column_dtype, row_shape
from synthkit.bank.spec import MAX_SHARDS, SCHEMA
from synthkit.cli.bank import main
from synthkit.errors import BankError, ConfigError, NonFiniteError, UsageError

from .banks import fill, make_spec, shard_arrays
from .fixtures.make import transform_arrays

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = json.loads((FIXTURES / "recorded.json").read_text())


def column_sha256(bank: Bank, name: str) -> str:
    value = bank.column(name)
    return hashlib.sha256(value.astype(value.dtype.newbyteorder("<")).tobytes()).hexdigest()


def files(path: Path) -> dict[str, str]:
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in path.rglob("*") if p.is_file()
    }


def rows(bank: Bank, start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: bank.column(name)[start:stop].copy() for name in bank.columns}


def test_there_is_a_fixture_of_every_schema():
    assert sorted(RECORDED) == [f"schema{i}" for i in range(1, SCHEMA + 1)]
    assert sorted(p.name for p in FIXTURES.glob("schema*")) == sorted(RECORDED)


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_fixture_reads_back_to_what_was_recorded(name):
    before, facts = files(FIXTURES / name), RECORDED[name]
    bank = Bank(FIXTURES / name)
    report = bank.verify(deep=True)
    assert report.ok and report.complete and report.notes == []
    assert {c: column_sha256(bank, c) for c in bank.columns} == facts["columns"]
    assert bank.column("labels").tolist() == facts["labels"]
    found = bank.info()
    assert found["schema"] == int(name.removeprefix("schema")) and found["sealed"] and found["complete"]
    for key in ("root", "recipe_hash", "uuid", "images", "label_histogram", "generators", "mean_difficulty"):
        assert found[key] == facts[key], key
    assert bank.spec.recipe_hash() == facts["recipe_hash"]
    for record in bank.generators():
        assert {k: v.tolist() for k, v in record.load().items()} == facts["generator_arrays"][record.path.stem]
    assert main(["info", str(FIXTURES / name)]) == 0 and main(["verify", "--deep", str(FIXTURES / name)]) == 0
    assert files(FIXTURES / name) == before  # reading never writes


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_fixture_goes_on_to_the_same_bank(name, tmp_path):
    path, facts = tmp_path / "b", RECORDED[name]
    shutil.copytree(FIXTURES / name, path)
    whole = files(path)
    for file in ("manifest.json", "README.md", "shards/00001.json", "shards/00001.h5"):
        (path / file).unlink()
    writer = BankWriter.open(path, expect=Bank(FIXTURES / name).spec)
    assert writer.missing() == [1] and not Bank(path).complete
    found = writer.load_state()
    assert found is None or found[0] <= 1
    old = Bank(FIXTURES / name)
    writer.write_shard(1, rows(old, 8, 16), {"step": 1})
    after = files(path)
    kept = [f for f in whole if f not in ("manifest.json", "README.md", "shards/00001.json")]
    assert {f: after[f] for f in kept} == {f: whole[f] for f in kept}
    assert Bank(path).verify(deep=True).ok and Bank(path).info()["root"] == facts["root"]
    # an old reader that was promised this bank by its min_reader can read the new record too
    assert json.loads((path / "shards/00001.json").read_text())["schema"] == int(name.removeprefix("schema"))
    assert json.loads((path / "manifest.json").read_text())["schema"] == SCHEMA


def test_old_seal_stays_until_the_user_seals(tmp_path):
    path = tmp_path / "b"
    shutil.copytree(FIXTURES / "schema1", path)
    before = files(path)
    BankWriter.open(path).finish()
    assert files(path) == before
    assert main(["seal", str(path)]) == 0
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["schema"] == SCHEMA and manifest["root"] == RECORDED["schema1"]["root"]
    assert [row["index"] for row in manifest["generators"]] == [1] and manifest["transform"] is None
    assert verify(path, deep=True).ok
    changed = {f for f, digest in files(path).items() if before.get(f) != digest}
    assert {f for f in changed if not f.startswith("state/")} <= {"manifest.json", "README.md"}


def test_sealing_waits_for_no_one(tmp_path):
    path = tmp_path / "b"
    shutil.copytree(FIXTURES / "schema1", path)
    with BankWriter(path).lock(), pytest.raises(BankBusyError):
        main(["seal", str(path)])
    assert json.loads((path / "manifest.json").read_text())["schema"] == 1


def test_migrations_are_pure_and_reach_the_newest_schema():
    for name in RECORDED:
        folder = FIXTURES / name
        for lift, file in ((migrate.bank_record, "bank.json"), (migrate.sidecar, "shards/00000.json"),
                           (migrate.manifest, "manifest.json")):  # fmt: skip
            raw = json.loads((folder / file).read_text())
            kept = copy.deepcopy(raw)
            lifted = lift(raw)
            assert raw == kept and lifted["schema"] == SCHEMA
            assert {k: lifted[k] for k in raw if k != "schema"} == {k: raw[k] for k in raw if k != "schema"}
            assert lift(lifted) == lifted
    old = migrate.bank_record(json.loads((FIXTURES / "schema1/bank.json").read_text()))
    assert old["top_k"] is None and old["transform"] == {}
    assert migrate.manifest(json.loads((FIXTURES / "schema1/manifest.json").read_text()))["generators"] is None


@pytest.mark.parametrize("lift", [migrate.bank_record, migrate.sidecar, migrate.manifest])
@pytest.mark.parametrize(
    ("schema", "said"), [(3, "upgrade"), (10**9, "upgrade"), (None, "number"), (True, "number"), (0, "number"),
                         ("1", "number"), (1.0, "number"), ([], "number"), (-1, "number")],
)  # fmt: skip
def test_unknown_schemas_are_refused(lift, schema, said):
    with pytest.raises(BankError, match=said):
        lift({"schema": schema, "min_reader": 3 if said == "upgrade" else 1})


def test_a_newer_bank_that_says_we_can_read_it_is_read(tmp_path):
    path = tmp_path / "b"
    shutil.copytree(FIXTURES / "schema2", path)
    raw = json.loads((path / "bank.json").read_text())
    (path / "bank.json").write_text(json.dumps({**raw, "schema": 3, "min_reader": 2, "invented": [1]}))
    assert len(Bank(path)) == 23
    (path / "bank.json").write_text(json.dumps({**raw, "schema": 3, "min_reader": 3}))
    with pytest.raises(BankError, match="pip install -U synthkit"):
        Bank(path)


# -- the columns of schema 2


def topk_spec(**changes: Any) -> BankSpec:
    return make_spec(**{"top_k": 2, "images": 8, "images_per_shard": 4, **changes})


def topk_arrays(spec: BankSpec, n: int = 4) -> dict[str, np.ndarray]:
    base = shard_arrays(spec, 0)
    logits = base["logits"].astype(np.float32)
    order = np.argsort(-logits, axis=1)
    rest = np.take_along_axis(logits, order[:, 2:], axis=1)
    return {
        "images": base["images"], "labels": base["labels"], "topk_index": order[:, :2],
        "topk_logit": np.take_along_axis(logits, order[:, :2], axis=1), "tail_logsumexp": np.log(np.exp(rest).sum(1)),
    }  # fmt: skip


def test_topk_round_trip_and_its_facts_equal_those_of_the_logits(tmp_path):
    spec = topk_spec()
    full, top = BankWriter.create(tmp_path / "l", topk_spec(top_k=None)), BankWriter.create(tmp_path / "t", spec)
    arrays = topk_arrays(spec)
    for index in range(2):
        top.write_shard(index, arrays)
        full.write_shard(index, {k: v for k, v in shard_arrays(spec, 0).items() if k in ("images", "labels", "logits")})
    bank = Bank(tmp_path / "t")
    batch = bank.batch([5, 0])
    assert batch.topk_index.dtype == np.uint16 and batch.topk_index.tolist() == arrays["topk_index"][[1, 0]].tolist()
    assert batch.topk_logit.dtype == np.float16 and batch.tail_logsumexp.dtype == np.float32
    assert bank.verify(deep=True).ok
    a, b = Bank(tmp_path / "l").info(), bank.info()
    assert b["teacher_agreement"] == a["teacher_agreement"] == 1.0
    assert b["mean_confidence"] == pytest.approx(a["mean_confidence"], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"topk_logit": None}, "topk_logit is missing"), ({"tail_logsumexp": None}, "tail_logsumexp is missing"),
        ({"topk_index": None, "topk_logit": None, "tail_logsumexp": None}, "missing"),
        ({"topk_index": np.full((4, 2), 3)}, "twice in row 0"), ({"topk_index": np.tile([0, 4], (4, 1))}, "0 to 3"),
        ({"topk_index": np.tile([0, -1], (4, 1))}, "does not fit"), ({"topk_index": np.zeros((4, 3), int)}, "shape"),
        ({"topk_index": np.tile([0.0, 1.0], (4, 1))}, "integers"), ({"topk_logit": np.zeros((4, 2, 1))}, "shape"),
    ],
)  # fmt: skip
def test_bad_topk_columns_are_refused(tmp_path, change, said):
    writer = BankWriter.create(tmp_path / "b", topk_spec())
    with pytest.raises(UsageError, match=said):
        writer.write_shard(0, {**topk_arrays(writer.spec), **change})
    assert writer.committed() == [] and not list((tmp_path / "b").glob("shards/*"))


@pytest.mark.parametrize("name", ["topk_logit", "tail_logsumexp", "images_f16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(tmp_path, name, value):
    writer = BankWriter.create(tmp_path / "b", topk_spec())
    arrays = {**topk_arrays(writer.spec), "images_f16": np.zeros((4, *writer.spec.shape))}
    arrays[name] = np.array(arrays[name], dtype=np.float32)
    arrays[name][(2, *[0] * (arrays[name].ndim - 1))] = value
    with pytest.raises(NonFiniteError, match=f"{name}.*row 2"):
        writer.write_shard(0, arrays)


def test_topk_needs_a_bank_that_says_so(tmp_path):
    writer = BankWriter.create(tmp_path / "b", topk_spec(top_k=None))
    with pytest.raises(UsageError, match="top_k"):
        writer.write_shard(0, topk_arrays(topk_spec()))
    for k in (0, 4, -1, True, 1.5, "2"):
        with pytest.raises(ConfigError, match="top_k must be 1 to 3"):
            topk_spec(top_k=k)
    with pytest.raises(ConfigError, match="top_k"):
        BankSpec(shape=(1, 2, 2), num_classes=1, mean=[0.0], std=[1.0], images=1, top_k=1)


def test_index_width_follows_the_classes():
    small = make_spec(num_classes=1 << 16, class_names=None, top_k=5)
    large = make_spec(num_classes=(1 << 16) + 1, class_names=None, top_k=5)
    assert column_dtype("topk_index", small) == np.dtype("<u2")
    assert column_dtype("topk_index", large) == np.dtype("<u4")
    assert row_shape("topk_index", small) == row_shape("topk_logit", large) == (5,) and row_shape("labels", small) == ()
    assert row_shape("images_f16", small) == (3, 6, 5)


def test_top_k_and_transform_belong_to_the_identity_only_when_set():
    plain, top = make_spec(), make_spec(top_k=2)
    affine = make_spec(transform=state.transform_entry("affine", transform_arrays()))
    assert set(top.identity()) - set(plain.identity()) == {"top_k"}
    assert set(affine.identity()) - set(plain.identity()) == {"transform"}
    assert len({plain.recipe_hash(), top.recipe_hash(), affine.recipe_hash()}) == 3
    assert Bank(FIXTURES / "schema1").spec.recipe_hash() == RECORDED["schema1"]["recipe_hash"]


@pytest.mark.parametrize(
    "transform",
    [{"kind": "pca", "sha256": "0" * 64}, {"kind": "zca"}, {"kind": "zca", "sha256": "x"}, {"sha256": "0" * 64}],
)
def test_bad_transforms_are_refused(transform):
    with pytest.raises(ConfigError, match="transform"):
        make_spec(transform=transform)


def test_transform_is_written_first_and_only_as_named(tmp_path):
    arrays = transform_arrays()
    writer = BankWriter.create(tmp_path / "b", make_spec(transform=state.transform_entry("affine", arrays, note="x")))
    with pytest.raises(UsageError, match="write_transform"):
        fill(writer, [0])
    with pytest.raises(UsageError, match="not the transform"):
        writer.write_transform({**arrays, "mean": arrays["mean"] + 1})
    writer.write_transform(arrays, {"from": "here"})
    writer.write_transform(arrays, {"from": "here"})  # a resumed run says it again
    with pytest.raises(UsageError, match="already"):
        writer.write_transform(arrays, {"from": "elsewhere"})
    fill(writer)
    found = Bank(tmp_path / "b").transform()
    assert found is not None and found[1] == {"from": "here"} and found[0]["std"].tolist() == arrays["std"].tolist()
    with pytest.raises(UsageError, match="no transform"):
        BankWriter.create(tmp_path / "c", make_spec()).write_transform(arrays)
    assert Bank(FIXTURES / "schema1").transform() is None


def test_a_record_cannot_name_a_column_its_schema_did_not_have(tmp_path):
    path = tmp_path / "b"
    shutil.copytree(FIXTURES / "schema2", path)
    where = path / "shards/00000.json"
    where.write_text(json.dumps({**json.loads(where.read_text()), "schema": 1}))
    with pytest.raises(BankError, match="a record of schema 1 cannot name"):
        Bank(path)


# -- what the seal covers


@pytest.fixture
def sealed(tmp_path) -> Path:
    shutil.copytree(FIXTURES / "schema2", tmp_path / "b")
    return tmp_path / "b"


def swap_entry(folder: Path, index: int) -> None:
    """Another entry with a record that vouches for it."""
    old = state.read_entry(folder, index)
    other = {name: value + 1 for name, value in old.load().items()}
    state.save_entry(folder, index, other, old.meta)


def test_swapped_generator_is_damage_and_repair_sets_it_aside(sealed):
    swap_entry(sealed / "generators", 1)
    report = verify(sealed)
    assert list(report.problems) == ["generators 1"] and "sealed" in report.problems["generators 1"][0]
    repair(sealed)
    assert (sealed / "quarantine/generators/00001.safetensors").exists() and verify(sealed).ok
    BankWriter.open(sealed)
    assert verify(sealed).ok and Bank(sealed).info()["root"] == RECORDED["schema2"]["root"]


def test_generator_that_came_or_went_is_damage(sealed):
    state.save_entry(sealed / "generators", 2, {"w": np.zeros(2)}, {})
    assert list(verify(sealed).problems) == ["generators 2"]
    for suffix in (".json", ".safetensors"):
        (sealed / "generators/00002").with_suffix(suffix).unlink()
        (sealed / "generators/00001").with_suffix(suffix).unlink()
    assert list(verify(sealed).problems) == ["generators 1"]
    repair(sealed)
    assert verify(sealed).ok


def test_writer_takes_a_new_generator_into_the_seal(sealed):
    writer = BankWriter.open(sealed)
    before = json.loads((sealed / "manifest.json").read_text())
    writer.write_generator(4, {"w": np.ones(3, np.float32)}, {"step": 1})
    after = json.loads((sealed / "manifest.json").read_text())
    assert [row["index"] for row in after["generators"]] == [1, 4] and verify(sealed).ok
    assert {k: v for k, v in after.items() if k not in ("generators", "seal")} == {
        k: v for k, v in before.items() if k not in ("generators", "seal")
    }


def test_other_transform_is_damage(sealed):
    swap_entry(sealed / "transform", 0)
    assert list(verify(sealed).problems) == ["transform 0"]
    with pytest.raises(BankError, match="not the transform"):
        Bank(sealed).transform()
    for suffix in (".json", ".safetensors"):
        (sealed / "transform/00000").with_suffix(suffix).unlink()
    assert list(verify(sealed).problems) == ["transform 0"]


@pytest.mark.parametrize("change", [{"label_kind": "real"}, {"contains_real": True}, {"extra": {"a": 1}}])
def test_altered_bank_json_is_damage_that_repair_does_not_bless(sealed, change):
    where = sealed / "bank.json"
    where.write_text(json.dumps({**json.loads(where.read_text()), **change}))
    assert list(verify(sealed).problems) == ["bank.json"]
    report = repair(sealed)
    assert "not the record that was sealed" in report.left["bank.json"][0] and report.moved == []
    with pytest.raises(BankError):
        main(["seal", str(sealed)])
    assert (sealed / "manifest.json").read_bytes() == (FIXTURES / "schema2/manifest.json").read_bytes()


@pytest.mark.parametrize("key", ["uuid", "root", "bank_sha256", "generators", "transform", "schema", "seal"])
def test_altered_manifest_is_damage(sealed, key):
    where = sealed / "manifest.json"
    manifest = json.loads(where.read_text())
    other = {"uuid": "0", "root": "0" * 64, "bank_sha256": "0" * 64, "generators": [], "transform": None,
             "schema": 1, "seal": "0" * 64}  # fmt: skip
    where.write_text(json.dumps({**manifest, key: other[key]}))
    assert list(verify(sealed).problems) == ["manifest"]
    where.write_text(json.dumps(signed({**manifest, key: other[key]})))
    assert verify(sealed).ok == (key == "seal")  # signing makes that one anew


def test_sealing_again_never_vouches_for_another_content(sealed):
    writer = BankWriter.open(sealed)
    old = (sealed / "manifest.json").read_bytes()
    batch = rows(Bank(sealed), 8, 16)
    for suffix in (".json", ".h5"):
        (sealed / "shards/00001").with_suffix(suffix).unlink()
    with pytest.raises(BankError, match="another content"):
        writer.write_shard(1, {**batch, "images": 255 - batch["images"]})
    assert (sealed / "manifest.json").read_bytes() == old and verify(sealed).damaged_shards == [1]
    repair(sealed)
    assert BankWriter.open(sealed).missing() == [1]
    writer.write_shard(1, batch)
    assert verify(sealed, deep=True).ok and Bank(sealed).info()["root"] == RECORDED["schema2"]["root"]


def test_a_shard_made_again_byte_for_byte_keeps_the_seal_and_the_rest_of_it(sealed):
    writer = BankWriter.open(sealed)
    swap_entry(sealed / "generators", 1)
    batch = rows(Bank(sealed), 8, 16)
    for suffix in (".json", ".h5"):
        (sealed / "shards/00001").with_suffix(suffix).unlink()
    writer.write_shard(1, batch)
    assert list(verify(sealed).problems) == ["generators 1"]  # still not what was sealed


def test_manifest_of_the_largest_plan_stays_under_the_cap_of_a_record():
    with pytest.raises(ConfigError, match="raise images_per_shard"):
        make_spec(images=MAX_SHARDS + 1, images_per_shard=1)
    row = {"shard": MAX_SHARDS, "n": 10**6, "bytes": 10**10, "sha256": "0" * 64, "sidecar_sha256": "0" * 64}
    assert MAX_SHARDS * len(dump_json([row])) < MAX_JSON_BYTES


def test_the_example_of_the_format_page_reads_a_fixture(monkeypatch):
    root = Path(__file__).parents[2]
    text = (root / "synthkit" / "bank" / "FORMAT.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(root)
    scope: dict[str, Any] = {}
    exec(code, scope)
    bank = Bank("tests/bank/fixtures/schema2")
    assert set(scope["columns"]) == set(bank.columns)
    for name, values in scope["columns"].items():
        np.testing.assert_array_equal(values, bank.column(name))
