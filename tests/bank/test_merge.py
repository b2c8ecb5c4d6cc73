"""bank merge: joined banks, united parts of one run, refusals, provenance, whole or absent."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from synthkit.bank import Bank, BankMismatchError, BankSpec, BankWriter, state
from synthkit.bank.checking.verify import VerifyReport
from synthkit.bank.joining import copying
from synthkit.bank.joining import merge as merge_module
from synthkit.bank.joining.merge import merge
from synthkit.bank.joining.plan import plan_join
from synthkit.bank.make import bank_from_arrays
from synthkit.cli.bank import main
from synthkit.cli.main import main as synthkit_main
from synthkit.errors import BankError, OutputExistsError, StorageError, UsageError

from .banks import fill, make_bank, make_spec, shard_arrays, whole
from .fixtures.make import shard as fixture_shard
from .fixtures.make import spec as fixture_spec
from .fixtures.make import transform_arrays

COLUMNS = ("images", "labels", "logits", "difficulty", "origin_step", "origin_seed")


def bank_at(path: Path, **changes) -> Bank:
    return Bank(make_bank(path, **changes).path)


def expect_rows(bank: Bank, *specs: BankSpec) -> None:
    for name in COLUMNS:
        assert np.array_equal(bank.column(name), np.concatenate([whole(spec, name) for spec in specs])), name


def temporaries(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if ".tmp-" in p.name]


def test_whole_shards_are_copied_byte_for_byte(tmp_path):
    a, b = bank_at(tmp_path / "a", images=50), bank_at(tmp_path / "b", images=34, seed=8)
    report = merge([a.path, b.path], tmp_path / "c")
    c = Bank(tmp_path / "c")
    assert (report.mode, report.copied, report.packed, report.missing) == ("join", 9, 0, [])
    expect_rows(c, a.spec, b.spec)
    assert [s.sha256 for s in c.sidecars] == [s.sha256 for s in [*a.sidecars, *b.sidecars]]
    assert c.verify(deep=True).ok and c.complete and c.info()["sealed"] and c.info()["root"] == report.root
    assert c.sidecars[6].raw["meta"] == {
        "step": 1, "merged_from": [{"uuid": b.record["uuid"], "shard": 1, "rows": [0, 10]}]
    }  # fmt: skip
    assert c.sidecars[6].raw["host"] == b.sidecars[1].raw["host"] and temporaries(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "copied", "packed"),
    [
        (({}, {"seed": 8}), 5, 6),  # 53 images: from the short shard on, everything is packed anew
        (({"images": 40}, {"seed": 8, "images": 37, "images_per_shard": 7}), 4, 4),  # size 10 keeps more than size 7
        (({"images": 3, "images_per_shard": 3}, {"seed": 8, "images_per_shard": 50}), 0, 2),  # not 19 shards of 3
        (({"images": 9, "images_per_shard": 3}, {"seed": 8, "images": 7, "images_per_shard": 7}), 3, 3),
        (({"images": 20}, {"seed": 8, "images": 20}, {"seed": 9, "images": 5}), 5, 0),
    ],
)
def test_other_shard_sizes_are_packed_anew(tmp_path, changes, copied, packed):
    banks = [bank_at(tmp_path / str(i), **change) for i, change in enumerate(changes)]
    report = merge([b.path for b in banks], tmp_path / "c")
    c = Bank(tmp_path / "c")
    expect_rows(c, *(b.spec for b in banks))
    assert c.verify(deep=True).ok and c.spec.shards == report.shards
    assert (report.copied, report.packed) == (copied, packed)


def test_shard_size_by_hand(tmp_path):
    a, b = bank_at(tmp_path / "a"), bank_at(tmp_path / "b", seed=8)
    report = merge([a.path, b.path], tmp_path / "c", images_per_shard=53)
    c = Bank(tmp_path / "c")
    assert (report.shards, report.copied, report.packed) == (2, 0, 2) and c.spec.per_shard == 53
    expect_rows(c, a.spec, b.spec)
    with pytest.raises(UsageError, match="at least 1"):
        merge([a.path, b.path], tmp_path / "d", images_per_shard=0)
    parts = [part(tmp_path / n, s, seed=5).path for n, s in (("x", [0]), ("y", [5]))]
    with pytest.raises(UsageError, match="keep their shards"):
        merge(parts, tmp_path / "d", images_per_shard=53)


@pytest.mark.parametrize("seed", range(60))
def test_every_plan_holds_every_row_once_and_in_order(seed):
    chance = random.Random(seed)
    sizes = [[chance.randint(1, 9) for _ in range(chance.randint(1, 5))] for _ in range(chance.randint(1, 4))]
    per_shard = chance.randint(1, 12)
    plan = plan_join(sizes, per_shard)
    rows = [(p.parent, p.at, row) for pieces in plan for p in pieces for row in range(p.start, p.stop)]
    assert rows == [(i, j, r) for i, shards in enumerate(sizes) for j, n in enumerate(shards) for r in range(n)]
    counts = [sum(p.stop - p.start for p in pieces) for pieces in plan]
    assert counts[:-1] == [per_shard] * (len(plan) - 1) and 1 <= counts[-1] <= per_shard


def test_every_column_of_the_newest_schema_travels(tmp_path):
    def make(path: Path, seed: int) -> Bank:
        spec = fixture_spec()
        writer = BankWriter.create(path, BankSpec(**{**vars(spec), "seed": seed}))
        writer.write_transform(transform_arrays(), {"channels": 3})
        for index in range(writer.shards):
            writer.write_shard(index, fixture_shard(writer.spec, index))
        return Bank(path)

    a, b = make(tmp_path / "a", 1), make(tmp_path / "b", 2)
    merge([a.path, b.path], tmp_path / "c")
    c = Bank(tmp_path / "c")
    assert c.columns == a.columns and len(c.columns) == 10 and c.verify(deep=True).ok
    for name in c.columns:
        assert np.array_equal(c.column(name), np.concatenate([a.column(name), b.column(name)])), name
    left, right = a.transform(), c.transform()
    assert left is not None and right is not None and right[1] == left[1]
    assert right[0]["mean"].tolist() == left[0]["mean"].tolist()


def test_provenance(tmp_path):
    a = bank_at(tmp_path / "a", extra={"source": "here"})
    b = bank_at(tmp_path / "b", seed=8, contains_real=True, real_data_used=True)
    merge([a.path, b.path], tmp_path / "ab")
    ab = Bank(tmp_path / "ab")
    assert ab.spec.contains_real and ab.spec.real_data_used and ab.spec.teacher == a.spec.teacher
    first, second = ab.spec.parents
    assert first["uuid"] == a.record["uuid"] and first["root"] == a.info()["root"] and first["images"] == 53
    assert first["recipe"] == a.spec.recipe and first["recipe_hash"] == a.spec.recipe_hash()
    assert first["teacher_sha256"] == "ab" * 32 and first["name"] == "a" and first["extra"] == {"source": "here"}
    assert second["contains_real"] and not first["contains_real"]
    assert str(tmp_path) not in json.dumps(ab.record)  # no path of this machine
    assert "Contains real pixels" in ab.info()["origin"]
    # parents of parents stay known, flat
    c = bank_at(tmp_path / "c", seed=9)
    merge([ab.path, c.path], tmp_path / "abc")
    abc = Bank(tmp_path / "abc").spec
    assert [p["name"] for p in abc.parents] == ["ab", "c"] and abc.contains_real
    assert [p["name"] for p in abc.extra["ancestors"]] == ["a", "b"]
    # the same banks give the same bank again
    merge([a.path, b.path], tmp_path / "again")
    again = Bank(tmp_path / "again")
    assert again.info()["root"] == ab.info()["root"] and again.spec.recipe_hash() == ab.spec.recipe_hash()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_classes": 5, "class_names": None}, "num_classes is 5.*class_names is None"),
        ({"class_names": ["ant", "bee", "cat", "eel"]}, "eel.*dog"), ({"mean": [0.5, 0.4, 0.2]}, "mean is"),
        ({"shape": (3, 5, 6)}, r"shape is \(3, 5, 6\)"), ({"label_kind": "target"}, "label_kind is 'target'.*'argmax'"),
        ({"std": [0.2, 0.2, 0.2]}, "std is"),
    ],
)  # fmt: skip
def test_what_differs_is_said_per_bank(tmp_path, change, said):
    a, b, c = bank_at(tmp_path / "a"), bank_at(tmp_path / "b", seed=8), bank_at(tmp_path / "c", seed=9, **change)
    with pytest.raises(BankMismatchError, match=said) as caught:
        merge([a.path, b.path, c.path], tmp_path / "out")
    assert str(c.path) in str(caught.value) and f"{b.path}:" not in str(caught.value)
    assert not (tmp_path / "out").exists() and caught.value.exit_code == 2


def test_other_columns_are_refused(tmp_path):
    images, labels = np.zeros((6, 1, 2, 2), np.uint8), np.arange(6) % 3
    common = {"num_classes": 3, "mean": [0.0], "std": [1.0]}
    bank_from_arrays(tmp_path / "a", images, labels, **common)
    bank_from_arrays(tmp_path / "b", images + 1, labels, **common, columns={"difficulty": np.zeros(6)})
    with pytest.raises(BankMismatchError, match="b: the columns differ.*has difficulty more"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    with pytest.raises(BankMismatchError, match="a: the columns differ.*lacks difficulty"):
        merge([tmp_path / "b", tmp_path / "a"], tmp_path / "c")


def test_different_teachers(tmp_path):
    a, b = bank_at(tmp_path / "a"), bank_at(tmp_path / "b", seed=8, teacher={"arch": "resnet8", "sha256": "cd" * 32})
    with pytest.raises(BankMismatchError, match="2 different teachers .lenet5, resnet8.*--allow-different-teachers"):
        merge([a.path, b.path], tmp_path / "c")
    report = merge([a.path, b.path], tmp_path / "c", allow_different_teachers=True)
    assert any("different teachers stand side by side" in note for note in report.notes)
    spec = Bank(tmp_path / "c").spec
    assert spec.teacher["name"] == "several" and [t["arch"] for t in spec.teacher["teachers"]] == ["lenet5", "resnet8"]
    assert [p["teacher_sha256"] for p in spec.parents] == ["ab" * 32, "cd" * 32]


def test_names_from_a_bank_do_not_steer_the_terminal(tmp_path, capsys):
    for seed, name in ((7, "\x1b[2Jgone"), (8, "\u202eevil")):
        bank_at(tmp_path / str(seed), seed=seed, teacher={"arch": name})
    words = ["bank", "merge", str(tmp_path / "7"), str(tmp_path / "8"), "--out", str(tmp_path / "c")]
    assert synthkit_main(words) == 2
    assert synthkit_main([*words, "--allow-different-teachers"]) == 0
    said = "".join(capsys.readouterr())
    assert "?[2Jgone" in said and "\x1b" not in said and "\u202e" not in said


def test_without_logits_teachers_may_differ(tmp_path):
    images, labels = np.zeros((6, 1, 2, 2), np.uint8), np.arange(6) % 3
    common = {"num_classes": 3, "mean": [0.0], "std": [1.0]}
    for number, name in enumerate("ab"):
        teacher = {"arch": name}
        bank_from_arrays(tmp_path / name, images + number, labels, label_kind="argmax", teacher=teacher, **common)
    report = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert report.notes == ["teachers: a, b; no logits are stored"]


def test_generators_travel_when_every_parent_has_usable_ones(tmp_path):
    def with_snapshots(name: str, seed: int, indices: tuple[int, ...], meta: dict) -> Path:
        writer = make_bank(tmp_path / name, seed=seed)
        for index in indices:
            writer.write_generator(index, {"w": np.array([seed, index])}, meta)
        return writer.path

    usable = {"generator": {"name": "cud"}, "step": 3}
    a, b = with_snapshots("a", 7, (1, 3, 5), usable), with_snapshots("b", 8, (4,), usable)
    bare, odd = with_snapshots("bare", 9, (), {}), with_snapshots("odd", 10, (5,), {"step": 1})
    report = merge([a, b], tmp_path / "c")
    c = Bank(tmp_path / "c")
    assert [r.load()["w"].tolist() for r in c.generators()] == [[7, 3], [7, 5], [8, 4]]
    assert all(int(r.path.stem) >= c.spec.shards // 2 for r in c.generators()) and c.verify().ok
    assert "3 generator snapshots come along" in report.notes
    for other in (bare, odd):
        report = merge([a, other], tmp_path / f"with-{other.name}")
        assert Bank(report.out).generators() == []
        assert any("stay behind" in note and str(other) in note for note in report.notes)


@pytest.mark.parametrize(("rates", "kept"), [((0.02, 0.02), 0.02), ((0.02, 0.03), None), ((0.02, None), None)])
@pytest.mark.parametrize("images", [20, 17])
def test_learning_rate_of_the_last_shard(tmp_path, rates, kept, images):
    for number, rate in enumerate(rates):
        writer = BankWriter.create(tmp_path / str(number), make_spec(images=images, seed=number))
        fill(writer, [0])
        writer.write_shard(1, shard_arrays(writer.spec, 1), {} if rate is None else {"learning_rate": rate})
    report = merge([tmp_path / "0", tmp_path / "1"], tmp_path / "c")
    assert Bank(tmp_path / "c").sidecars[-1].raw["meta"]["learning_rate"] == kept
    assert any("different learning rates" in note for note in report.notes) == (kept is None)


@pytest.mark.parametrize("kind", ["bytes", "record", "lost", "manifest", "generator"])
def test_a_damaged_parent_is_refused(tmp_path, kind):
    a, writer = bank_at(tmp_path / "a"), make_bank(tmp_path / "b", seed=8)
    writer.write_generator(5, {"w": np.ones(2)}, {})
    data = writer.shard_path(3).read_bytes()
    if kind == "bytes":
        writer.shard_path(3).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif kind == "record":
        writer.sidecar_path(3).write_text("{")
    elif kind == "lost":
        writer.shard_path(3).unlink()
    elif kind == "manifest":
        (writer.path / "manifest.json").write_text("{}")
    else:
        (writer.path / "generators/00005.safetensors").write_bytes(b"x")
    with pytest.raises(BankError, match="b"):
        merge([a.path, writer.path], tmp_path / "c")
    with pytest.raises(BankError):
        merge([a.path, writer.path], tmp_path / "c", dry_run=True)
    assert not (tmp_path / "c").exists() and temporaries(tmp_path) == []


@pytest.mark.parametrize("sizes", [(10, 10), (10, 7)])
def test_bytes_that_change_after_the_check_are_noticed_while_copying(tmp_path, monkeypatch, sizes):
    a = bank_at(tmp_path / "a", images=20, images_per_shard=sizes[0])
    b = bank_at(tmp_path / "b", images=14, images_per_shard=sizes[1], seed=8)
    file = b.path / "shards/00001.h5"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    monkeypatch.setattr(
        merge_module, "verify", lambda path: VerifyReport(path=path, deep=False, planned=0, committed=[])
    )
    with pytest.raises(BankError, match="sha256"):
        merge([a.path, b.path], tmp_path / "c")
    assert not (tmp_path / "c").exists() and temporaries(tmp_path) == []


def test_refusals(tmp_path):
    a, b = bank_at(tmp_path / "a"), bank_at(tmp_path / "b", seed=8)
    with pytest.raises(UsageError, match="two banks or more"):
        merge([a.path], tmp_path / "c")
    with pytest.raises(UsageError, match="are the same bank"):
        merge([a.path, tmp_path / "b" / ".." / "a"], tmp_path / "c")
    with pytest.raises(UsageError, match="inside the bank"):
        merge([a.path, b.path], a.path / "c")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(OutputExistsError):
        merge([a.path, b.path], tmp_path / "full")
    make_bank(tmp_path / "twin", recipe={"method": "other"})
    with pytest.raises(UsageError, match="same images"):
        merge([a.path, tmp_path / "twin"], tmp_path / "c")
    unfinished = BankWriter.create(tmp_path / "u", make_spec(seed=9))
    fill(unfinished, [0, 1])
    with pytest.raises(BankError, match="unfinished, 4 of 6 shards are missing.*--resume"):
        merge([a.path, unfinished.path], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_without_copy_file_range_and_with_a_full_disk(tmp_path, monkeypatch):
    a, b = bank_at(tmp_path / "a", images=20), bank_at(tmp_path / "b", images=20, seed=8)

    def fails(*_):
        raise OSError(errno.EXDEV, "not across file systems")

    if hasattr(os, "copy_file_range"):
        monkeypatch.setattr(os, "copy_file_range", fails)
    merge([a.path, b.path], tmp_path / "c")
    assert Bank(tmp_path / "c").verify(deep=True).ok

    def full(source, target):
        Path(target).write_bytes(b"part")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StorageError, match="disk is full"):
        merge([a.path, b.path], tmp_path / "d")
    assert not (tmp_path / "d").exists() and temporaries(tmp_path) == []


def test_copy_exact_leaves_nothing_that_is_wrong(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(BankError, match="sha256"):
        copying.copy_exact(tmp_path / "x", tmp_path / "y", "0" * 64)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    with pytest.raises(BankError, match="not a regular file"):
        copying.copy_exact(tmp_path / "link", tmp_path / "y", "0" * 64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "x"]


# -- one run, spread over machines


def part(path: Path, shards: list[int], **changes) -> BankWriter:
    writer = BankWriter.create(path, make_spec(**changes))
    fill(writer, shards)
    return writer


def test_parts_of_one_run_become_the_bank_of_that_run(tmp_path):
    single = bank_at(tmp_path / "single")
    paths = [part(tmp_path / f"host{i}", list(range(i, 6, 3)), extra={"host": i}).path for i in range(3)]
    report = merge(paths, tmp_path / "c")
    c = Bank(tmp_path / "c")
    assert report.mode == "unite" and (report.copied, report.packed) == (6, 0) and "one run" in report.notes[0]
    assert report.root == c.info()["root"] == single.info()["root"]
    assert c.spec.recipe_hash() == single.spec.recipe_hash() and c.verify(deep=True).ok and c.info()["sealed"]
    expect_rows(c, single.spec)
    assert [p["shards"] for p in c.spec.extra["united"]] == [[0, 3], [1, 4], [2, 5]] and c.spec.extra["host"] == 0
    for index in range(6):  # the records too are as they were
        name = f"shards/{index:05d}.json"
        assert (c.path / name).read_bytes() == (paths[index % 3] / name).read_bytes()
    BankWriter.open(c.path, expect=make_spec())  # --resume finds nothing left to do


def test_an_incomplete_union_can_be_resumed(tmp_path):
    a, b = part(tmp_path / "a", [0, 1]), part(tmp_path / "b", [1, 4])
    a.save_state(2, {"x": np.arange(3)}, {"plain": {}})
    report = merge([a.path, b.path], tmp_path / "c")
    assert report.missing == [2, 3, 5] and report.root is None and "go on with" in report.notes[-1]
    writer = BankWriter.open(tmp_path / "c", expect=make_spec())
    assert writer.missing() == [2, 3, 5] and not (tmp_path / "c/manifest.json").exists()
    found = writer.load_state()
    assert found is not None and found[0] == 2 and found[1]["x"].tolist() == [0, 1, 2]
    fill(writer)
    assert Bank(tmp_path / "c").info()["root"] == bank_at(tmp_path / "single").info()["root"]


def test_parts_that_disagree_are_refused(tmp_path):
    a, b = part(tmp_path / "a", [0, 1]), BankWriter.create(tmp_path / "b", make_spec())
    other = {name: whole(make_spec(seed=8), name)[10:20] for name in COLUMNS}
    b.write_shard(1, other)
    with pytest.raises(BankMismatchError, match="shard 1 differs between"):
        merge([a.path, b.path], tmp_path / "c")
    names = part(tmp_path / "n", [2], class_names=["a", "b", "c", "d"])
    with pytest.raises(BankMismatchError, match="class_names"):
        merge([a.path, names.path], tmp_path / "c")


def test_transform_and_generators_of_parts(tmp_path):
    spec = fixture_spec()
    paths = []
    for number in range(2):
        writer = BankWriter.create(tmp_path / str(number), spec)
        writer.write_transform(transform_arrays(), {"channels": 3})
        writer.write_generator(number, {"w": np.array([number])}, {})
        for index in range(number, 3, 2):
            writer.write_shard(index, fixture_shard(spec, index), {"step": index})
        paths.append(writer.path)
    report = merge(paths, tmp_path / "c")
    assert report.mode == "unite" and report.root == Bank(Path(__file__).parent / "fixtures/schema2").info()["root"]
    assert [r.load()["w"].tolist() for r in Bank(tmp_path / "c").generators()] == [[0], [1]]
    assert Bank(tmp_path / "c").verify(deep=True).ok and state.entries(tmp_path / "c/state") == []


def test_workers_on_separate_disks_make_the_bank_of_a_single_run(tmp_path, capsys):
    data = bank_at(tmp_path / "data", images=400)
    words = ["synthesize", "--method", "random_real", "--data", f"bank:{data.path}", "--images", "60", "--seed", "3",
             "--images_per_shard", "8", "--device", "cpu", "--threads", "1"]  # fmt: skip
    assert synthkit_main([*words, "--out", str(tmp_path / "single")]) == 0
    for number in (1, 2, 3):
        assert synthkit_main([*words, "--shards", f"{number}/3", "--out", str(tmp_path / f"host{number}")]) == 0
    hosts = [str(tmp_path / f"host{number}") for number in (3, 1, 2)]
    assert synthkit_main(["bank", "merge", *hosts, "--out", str(tmp_path / "c")]) == 0
    assert "parts of one run" in capsys.readouterr().out
    single, united = Bank(tmp_path / "single"), Bank(tmp_path / "c")
    assert united.info()["root"] == single.info()["root"]
    assert united.spec.contains_real == single.spec.contains_real
    assert united.spec.recipe_hash() == single.spec.recipe_hash() and united.verify(deep=True).ok
    assert synthkit_main([*words, "--resume", "--out", str(tmp_path / "c")]) == 0  # nothing is left to do


# -- the command


def test_command(tmp_path, capsys):
    a, b = bank_at(tmp_path / "a", images=50), bank_at(tmp_path / "b", seed=8)
    words = ["merge", str(a.path), str(b.path), "--out", str(tmp_path / "c")]
    assert main([*words, "--dry-run"]) == 0
    assert "would be 103 images in 11 shards: 11 copied byte for byte, 0 packed anew" in capsys.readouterr().out
    assert not (tmp_path / "c").exists()
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mode"] == "join" and found["root"] == Bank(tmp_path / "c").info()["root"] and not found["dry_run"]
    assert main(["info", str(tmp_path / "c")]) == 0 and "merge" in capsys.readouterr().out
    parts = [str(part(tmp_path / n, s, seed=5).path) for n, s in (("x", [0, 1, 2]), ("y", [5]))]
    assert main(["merge", *parts, "--out", str(tmp_path / "z")]) == 0
    out = capsys.readouterr().out
    assert "parts of one run" in out and "missing: shards 3-4" in out and "root" not in out.splitlines()[-1]
