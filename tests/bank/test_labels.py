"""Label sets: written whole or not at all, read by row, bound to their bank, verified and repaired with it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from synthkit.bank import (
    Bank,
    BankBusyError,
    BankIndexError,
    BankMismatchError,
    LabelSpec,
    LabelWriter,
)
from synthkit.bank.checking.repair import repair
from synthkit.bank.checking.verify import verify
from synthkit.bank.labels.spec import check_name
from synthkit.bank.labels.topk import compress_topk
from synthkit.bank.labels.views import ViewDraw, ViewPolicy
from synthkit.errors import BankError, ConfigError, NonFiniteError, OutputExistsError, RequirementError, UsageError

from .banks import CLASSES, SHAPE, make_bank

SIZE = (SHAPE[1], SHAPE[2])


def spec_of(path: Path, kind: str = "images", **changes) -> LabelSpec:
    bank = Bank(path)
    rows = 53 if kind == "images" else 3 * 53
    base = {"kind": kind, "bank": bank.record["uuid"], "images": 53, "rows": rows, "num_classes": CLASSES,
            "rows_per_shard": 20, "size": SIZE if kind == "views" else None,
            "teacher": {"arch": "lenet5", "sha256": "cd" * 32}, "policy": {"name": "custom", "seed": 1}}  # fmt: skip
    return LabelSpec(**{**base, **changes})


def columns_of(spec: LabelSpec, index: int) -> dict[str, np.ndarray]:
    """Columns of one shard, a pure function of the shard."""
    start, count = index * spec.per_shard, spec.shard_size(index)
    logits = np.random.default_rng([9, index]).normal(0, 3, (count, spec.num_classes)).astype(np.float16)
    found: dict[str, np.ndarray] = {}
    if spec.kind == "views":
        policy = ViewPolicy(epochs=3, mix="cutmix")
        found = ViewDraw(policy, images=spec.images, source=SIZE, size=SIZE, seed=1).rows(start, start + count)
    if spec.top_k is None:
        return {**found, "logits": logits}
    names = ("topk_index", "topk_logit", "tail_logsumexp")
    return {**found, **dict(zip(names, compress_topk(logits, spec.top_k), strict=True))}


def fill(writer: LabelWriter, shards: list[int] | None = None) -> None:
    for index in writer.missing() if shards is None else shards:
        writer.write_shard(index, columns_of(writer.spec, index), {"step": index})


def whole(spec: LabelSpec, column: str) -> np.ndarray:
    return np.concatenate([columns_of(spec, i)[column] for i in range(spec.shards)])


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.h5"))}


@pytest.fixture
def bank(tmp_path) -> Path:
    make_bank(tmp_path / "b")
    return tmp_path / "b"


@pytest.mark.parametrize("kind", ["images", "views"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_what_was_written_is_read(bank, kind, top_k):
    spec = spec_of(bank, kind, top_k=top_k)
    fill(LabelWriter.create(bank, "r18", spec))
    assert Bank(bank).label_sets() == ["r18"]
    found = Bank(bank).labels("r18")
    assert len(found) == spec.rows and found.kind == kind and found.complete and found.missing == []
    rows = np.array([50, 0, 19, 20, 20, spec.rows - 1])
    for name, value in found.rows(rows).items():
        assert np.array_equal(value, whole(spec, name)[rows]), name
        assert value.dtype == spec.layout.columns[name][0]
    assert (found.path / "manifest.json").is_file()
    assert verify(bank, deep=True).problems == {}
    assert list(found.rows([])) == found.columns


def test_topk_is_read_as_dense_logits(bank):
    fill(LabelWriter.create(bank, "full", spec_of(bank)))
    fill(LabelWriter.create(bank, "top", spec_of(bank, top_k=CLASSES - 1)))
    opened = Bank(bank)
    assert opened.label_sets() == ["full", "top"]
    dense, kept = opened.labels("full").logits(np.arange(53)), opened.labels("top").logits(np.arange(53))
    assert dense.dtype == np.float16 and np.array_equal(kept, dense.astype(np.float32))  # one class of tail: exact


def test_views_come_with_their_partners(bank):
    spec = spec_of(bank, "views")
    fill(LabelWriter.create(bank, "fkd", spec))
    found, rows = Bank(bank).labels("fkd"), np.array([3, 150, 60])
    views = found.views(rows)
    assert np.array_equal(views.sample, whole(spec, "sample")[rows])
    partners = whole(spec, "partner")[rows][views.mixed]
    assert np.array_equal(views.partner_sample, whole(spec, "sample")[partners])
    assert np.array_equal(views.partner_crop, whole(spec, "crop")[partners])
    assert np.array_equal(views.partner_flip, whole(spec, "flip")[partners])
    fill(LabelWriter.create(bank, "plain", spec_of(bank)))
    with pytest.raises(RequirementError, match="no views"):
        Bank(bank).labels("plain").views(rows)


def test_an_unfinished_set_is_named_and_resumed_with_equal_bytes(bank, tmp_path):
    spec = spec_of(bank)
    writer = LabelWriter.create(bank, "a", spec)
    fill(writer, [0, 2])
    opened = Bank(bank).labels("a")
    assert not opened.complete and opened.missing == [1]
    with pytest.raises(BankError, match="unfinished.*2 of 3.*--resume"):
        opened.rows([0])
    assert not (opened.path / "manifest.json").exists()
    assert any("unfinished" in note for note in verify(bank).notes)
    with pytest.raises(OutputExistsError, match="already"):
        LabelWriter.create(bank, "a", spec)
    fill(LabelWriter.open(bank, "a", expect=spec))
    fill(LabelWriter.create(bank, "b", spec))
    assert hashes(bank / "labels" / "a") == hashes(bank / "labels" / "b")
    roots = [json.loads((bank / "labels" / n / "manifest.json").read_text())["root"] for n in "ab"]
    assert roots[0] == roots[1]
    with pytest.raises(BankMismatchError, match="policy"):
        LabelWriter.open(bank, "a", expect=spec_of(bank, policy={"name": "other"}))


def test_shards_are_immutable_and_images_untouched(bank):
    before = {p: p.read_bytes() for p in sorted(bank.rglob("*")) if p.is_file()}
    writer = LabelWriter.create(bank, "a", spec_of(bank))
    fill(writer)
    writer.write_shard(1, columns_of(writer.spec, 1))  # equal content is no change
    other = columns_of(writer.spec, 1)
    other["logits"] = other["logits"] + np.float16(1)
    with pytest.raises(BankError, match="immutable"):
        writer.write_shard(1, other)
    assert {p: p.read_bytes() for p in before} == before


def test_two_runs_of_one_shard_are_told_apart(bank):
    writer, other = LabelWriter.create(bank, "a", spec_of(bank)), LabelWriter.open(bank, "a")
    with writer.claim([0, 1]), pytest.raises(BankBusyError, match="pid"), other.claim([1, 2]):
        pass
    with writer.claim([0, 1]), other.claim([2]):
        fill(writer, [0])
        with pytest.raises(UsageError, match="not among"):
            fill(other, [1])
        fill(other, [2])


def test_bad_columns_and_names_are_refused(bank):
    writer = LabelWriter.create(bank, "a", spec_of(bank, "views", top_k=2))
    good = columns_of(writer.spec, 0)
    for name, value, error, match in (
        ("topk_index", np.full((20, 2), CLASSES), UsageError, "topk_index must be 0 to 3"),
        ("topk_index", np.zeros((20, 2), np.int64), UsageError, "twice"),
        ("topk_logit", np.full((20, 2), 1e6), NonFiniteError, "not finite"),
        ("sample", np.full(20, 53), BankError, "sample must be an image from 0 to 52"),
        ("partner", np.full(20, 159), BankError, "partner must be a row from 0 to 158"),
        ("crop", np.full((20, 4), 0.7, np.float32), BankError, "inside"),
        ("flip", np.full(20, 2), BankError, "flip"),
        ("mix_box", np.tile([4, 0, 2, 1], (20, 1)), BankError, "mix_box"),
        ("mix_lambda", np.full(20, 1.5), BankError, "mix_lambda"),
        ("images", np.zeros((20, *SHAPE), np.uint8), UsageError, "not a column"),
    ):
        with pytest.raises(error, match=match):
            writer.write_shard(0, {**good, name: value})
    with pytest.raises(UsageError, match="column topk_index is missing"):
        writer.write_shard(0, {k: v for k, v in good.items() if k != "topk_index"})
    assert not list((bank / "labels" / "a").glob("*.h5"))
    for name in ("", "../up", "A b", "x" * 65, "-x", ".", "a/b", "ä"):
        with pytest.raises(UsageError, match="not a name"):
            LabelWriter.create(bank, name, spec_of(bank))
    with pytest.raises(UsageError, match="e.g. my-labels"):
        check_name("My Labels")
    assert check_name("fkd_r18-e300") == "fkd_r18-e300"
    for changes in ({"rows": 52}, {"top_k": CLASSES}, {"kind": "else"}, {"size": (3, 3)}, {"bank": "../x"}):
        with pytest.raises(ConfigError):
            spec_of(bank, **changes)


def test_a_set_belongs_to_its_bank(bank, tmp_path):
    fill(LabelWriter.create(bank, "a", spec_of(bank)))
    make_bank(tmp_path / "other")
    shutil.copytree(bank / "labels", tmp_path / "other" / "labels")
    with pytest.raises(BankError, match="another bank"):
        Bank(tmp_path / "other").labels("a")
    assert "another bank" in verify(tmp_path / "other").problems["labels a"][0]
    with pytest.raises(BankMismatchError, match="another bank"):
        LabelWriter.create(tmp_path / "other", "b", spec_of(bank))
    with pytest.raises(UsageError, match="no such label set.*did you mean 'a'|allowed: a"):
        Bank(bank).labels("zz")
    rows = Bank(bank).labels("a")
    for bad in ([53], [-1], [0.5], [[1]]):
        with pytest.raises(BankIndexError):
            rows.rows(bad)


@pytest.mark.parametrize("where", ["shard", "sidecar", "manifest", "record", "lost"])
def test_damage_is_found_and_set_aside_and_made_again(bank, where):
    spec = spec_of(bank, top_k=2)
    fill(LabelWriter.create(bank, "a", spec))
    folder = bank / "labels" / "a"
    before = hashes(folder)
    target = {"shard": "00001.h5", "sidecar": "00001.json", "manifest": "manifest.json", "record": "labels.json",
              "lost": "00001.json"}[where]  # fmt: skip
    data = bytearray((folder / target).read_bytes())
    if where == "lost":
        (folder / target).unlink()
    else:
        at = len(data) // 2
        data[at] ^= 1
        (folder / target).write_bytes(data)
    report = verify(bank, deep=True)
    assert not report.ok
    assert set(report.problems) <= {"labels a", "labels a shard 1"}, report.problems
    assert report.damaged_shards == []  # the images are whole
    moved = repair(bank).moved
    assert moved and all("quarantine" in str(p) for p in moved)
    assert (bank / "manifest.json").exists()  # the bank's own seal does not go
    if where == "record":
        assert Bank(bank).label_sets() == []
        return
    writer = LabelWriter.open(bank, "a", expect=spec)
    fill(writer)
    assert hashes(folder) == before
    assert verify(bank, deep=True).problems == {}


def test_hostile_records_are_typed_errors(bank):
    fill(LabelWriter.create(bank, "a", spec_of(bank, "views")))
    where = bank / "labels" / "a" / "labels.json"
    raw = json.loads(where.read_text())
    for change in ({"rows": 2**62}, {"rows": -1}, {"kind": "x"}, {"top_k": 99}, {"columns": {}}, {"size": [1 << 20, 2]},
                   {"num_classes": 1 << 40}, {"rows_per_shard": None}, {"min_reader": 99}, {"min_reader": "1"},
                   {"format": "else"}, {"teacher": 3}, {"bank": 7}, {"images": 54}):  # fmt: skip
        where.write_text(json.dumps({**raw, **change}))
        with pytest.raises(BankError):
            Bank(bank).labels("a")
        assert "labels a" in verify(bank).problems, change
    where.write_text(
        json.dumps({**raw, "policy": {"views": 3}, "teacher": {"spec": [1]}})
    )  # free texts: no reader minds
    assert Bank(bank).labels("a").complete
    where.write_text(json.dumps(raw))
    record = bank / "labels" / "a" / "00000.json"
    raw = json.loads(record.read_text())
    for change in ({"offset": 1 << 40}, {"dtype": "<f8"}, {"shape": [20, 5]}):
        datasets = {**raw["datasets"], "crop": {**raw["datasets"]["crop"], **change}}
        record.write_text(json.dumps({**raw, "datasets": datasets}))
        with pytest.raises(BankError):
            Bank(bank).labels("a")
    for meta in ({"tail_error": {"\x1b[2J": 0.1}}, {"tail_error": {"1": 1e300}}, {"agrees_with_bank_labels": 10**9}, 3):
        record.write_text(json.dumps({**raw, "meta": meta}))
        opened = Bank(bank).labels("a")
        assert opened.tail_error is None and opened.agreement is None
    record.write_text(json.dumps(raw))
    # a set that is a link to somewhere else is not followed
    shutil.move(bank / "labels" / "a", bank.parent / "elsewhere")
    (bank / "labels" / "a").symlink_to(bank.parent / "elsewhere")
    with pytest.raises(BankError, match="not a folder"):
        Bank(bank).labels("a")
    assert not verify(bank).ok


def test_info_says_what_a_bank_carries(bank, capsys):
    from synthkit.cli.main import main

    fill(LabelWriter.create(bank, "fkd", spec_of(bank, "views", top_k=2)))
    fill(LabelWriter.create(bank, "half", spec_of(bank)), [0])
    fill(LabelWriter.create(bank, "bad", spec_of(bank)))
    (bank / "labels" / "bad" / "00000.json").write_text("{")
    facts = Bank(bank).info()
    assert facts["label_sets"] == ["bad", "fkd", "half"]
    damaged, views, half = facts["label_set_facts"]
    assert set(damaged) == {"name", "damaged"} and views["rows"] == 159 and views["complete"] and not half["complete"]
    assert views["bytes"] == sum(p.stat().st_size for p in (bank / "labels" / "fkd").glob("*.h5"))
    assert main(["bank", "info", str(bank)]) == 0
    out = capsys.readouterr().out
    assert "fkd: 159 views, top 2" in out and "half: 53 images, all logits" in out and "bad: damaged" in out


def test_a_claim_taken_over_stops_the_writer(bank):
    writer = LabelWriter.create(bank, "a", spec_of(bank))
    with pytest.raises(BankBusyError, match="taken over"), writer.claim([0]) as held:
        held.path.unlink()
        fill(writer, [0])
    assert not list((bank / "labels" / "a").glob("*.h5"))


@pytest.mark.parametrize("step", [0, 1])
def test_a_full_disk_leaves_no_half_shard(bank, monkeypatch, step):
    import errno

    from synthkit.bank.disk import commit
    from synthkit.errors import StorageError

    writer, original, count = LabelWriter.create(bank, "a", spec_of(bank)), commit.publish, [0]

    def publish(path, *args, **options):
        count[0] += 1
        if count[0] == step + 1:
            raise OSError(errno.ENOSPC, "full")
        return original(path, *args, **options)

    monkeypatch.setattr(commit, "publish", publish)
    with pytest.raises(StorageError, match="labels shard 0.*the disk is full"):
        fill(writer, [0])
    assert writer.committed() == [] and not list((bank / "labels" / "a").glob("0*"))
    fill(writer)
    assert verify(bank, deep=True).problems == {} and Bank(bank).labels("a").complete
