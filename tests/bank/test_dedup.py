"""dedup: what goes, what stays, and that the old bank is never touched."""

from __future__ import annotations

import json

import numpy as np
import pytest
from workshop import save_teacher, tree

from synthkit.bank import Bank, BankSpec, BankWriter
from synthkit.bank import state as states
from synthkit.bank.joining.dedup import only_exact, summary, with_near, write_kept
from synthkit.bank.make import bank_from_arrays
from synthkit.cli.bank import main
from synthkit.errors import BankError, ModelError, OutputExistsError, UsageError
from synthkit.evaluation.duplicates import find_duplicates
from synthkit.evaluation.features import pixel_source

from .banks import fill, make_spec, shard_arrays


def pixels(n: int, seed: int = 0, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 1, side, side), dtype=np.uint8)


def bank_of(path, images: np.ndarray, **options) -> Bank:
    labels = np.arange(len(images)) % 3
    rest = {"num_classes": 3, "mean": [0.5], "std": [0.2], "images_per_shard": 16, "label_kind": "argmax", **options}
    return bank_from_arrays(path, images, labels, **rest)


@pytest.fixture
def planted(tmp_path):
    """100 images: 40 equals 3, 41 equals 40, 77 equals 50; 60 is nearly 5, 90 is nearly 5 as well."""
    images = pixels(100)
    images[[40, 41]], images[77] = images[3], images[50]
    images[60] = images[90] = images[5]
    images[60, 0, 0, 0] ^= 2
    images[90, 0, 7, 7] ^= 4
    return bank_of(tmp_path / "b", images)


def test_exact_duplicates_by_pixels_alone(planted):
    found = only_exact(planted)
    assert found.removed.tolist() == [40, 41, 77] and found.leader[[40, 41, 77]].tolist() == [3, 3, 50]
    assert found.exact[[40, 41, 77]].all() and found.threshold is None
    facts = summary(planted, found)
    assert (facts["kept"], facts["exact"], facts["near"], facts["groups"], facts["largest_group"]) == (97, 3, 0, 2, 3)
    assert facts["removed_per_class"] == {"1": 1, "2": 2}


def test_near_duplicates_with_the_default_threshold(planted):
    found = find_duplicates(planted, pixel_source(planted.shape))
    assert found.removed.tolist() == [40, 41, 60, 77, 90] and found.leader[[60, 90]].tolist() == [5, 5]
    assert found.distances is not None
    assert found.distances[60] == pytest.approx(2 / 255 / 8, rel=1e-4)  # one pixel of 64 differs by 2
    facts = summary(planted, found)
    assert (facts["exact"], facts["near"]) == (3, 2) and "far-out" in facts["threshold_from"]
    assert facts["features"]["name"] == "pixels" and "root mean square" in facts["unit"]


def test_a_bank_without_duplicates_keeps_everything(tmp_path):
    bank = bank_of(tmp_path / "b", pixels(300))
    assert len(find_duplicates(bank, pixel_source(bank.shape)).removed) == 0


def test_threshold_given(planted):
    source = pixel_source(planted.shape)
    assert find_duplicates(planted, source, threshold=0.0).removed.tolist() == [40, 41, 77]
    assert find_duplicates(planted, source, threshold=2 / 255 / 8 * 1.01).removed.tolist() == [40, 41, 60, 77]
    assert find_duplicates(planted, source, threshold=1.0).keep.tolist() == [0]
    with pytest.raises(UsageError):
        find_duplicates(planted, source, threshold=float("nan"))


def test_copies_of_a_near_duplicate_go_where_it_goes(tmp_path):
    images = pixels(80)
    images[10] = images[2]
    images[10, 0, 0, 0] ^= 1
    images[20] = images[10]
    bank = bank_of(tmp_path / "b", images)
    found = find_duplicates(bank, pixel_source(bank.shape))
    assert found.leader[[10, 20]].tolist() == [2, 2] and not found.exact[20] and found.removed.tolist() == [10, 20]
    joined = with_near(only_exact(bank), np.where(np.arange(80) == 20, -1, np.arange(80)), np.zeros(80), 0.1)
    assert joined.removed.tolist() == [20] and joined.exact[20]


def test_the_new_bank_has_every_column_and_the_old_one_is_untouched(tmp_path):
    writer = BankWriter.create(tmp_path / "old", make_spec(contains_real=True, real_data_used=True))
    for index in range(6):
        arrays = shard_arrays(writer.spec, index)
        if index == 4:
            arrays["images"][3] = shard_arrays(writer.spec, 0)["images"][7]
        meta = {"learning_rate": 0.02} if index == 5 else {}
        writer.write_shard(index, arrays, meta)
    writer.write_generator(0, {"w": np.arange(4.0)}, {"step": 3})
    before = tree(tmp_path / "old")
    old = Bank(tmp_path / "old")
    new = write_kept(old, only_exact(old), tmp_path / "new")
    assert tree(tmp_path / "old") == before
    kept = np.delete(np.arange(53), 43)
    assert len(new) == 52 and new.columns == old.columns and new.complete and new.verify(deep=True).ok
    for column in old.columns:
        np.testing.assert_array_equal(new.column(column), old.column(column)[kept])
    assert new.spec.contains_real and new.spec.real_data_used and new.spec.class_names == old.spec.class_names
    assert new.spec.images == 52 and new.spec.per_shard == 10 and new.record["uuid"] != old.record["uuid"]
    assert new.spec.recipe_hash() != old.spec.recipe_hash()
    parent = new.spec.parents[0]
    assert parent["uuid"] == old.record["uuid"] and parent["root"] == old.info()["root"] and parent["contains_real"]
    assert new.sidecars[-1].raw["meta"]["learning_rate"] == 0.02 and "1 duplicates" in parent["how"]
    assert new.generators()[0].meta == {"step": 3}
    card = (tmp_path / "new" / "README.md").read_text()
    assert "## Made from" in card and "Contains real pixels" in card


def test_the_transform_comes_along(tmp_path):
    arrays = {"scale": np.array([2.0], np.float32)}
    spec = BankSpec(shape=(1, 4, 4), num_classes=2, mean=[0.5], std=[0.2], images=6, images_per_shard=4,
                    label_kind="none", transform=states.transform_entry("affine", arrays))  # fmt: skip
    writer = BankWriter.create(tmp_path / "old", spec)
    writer.write_transform(arrays, {"of": "test"})
    images = pixels(6, side=4)
    images[5] = images[4] = images[0]
    wide = np.linspace(-3, 3, 6 * 16).reshape(6, 1, 4, 4)
    wide[5] = wide[0]  # image 4 looks like image 0 but is another one to train on
    for index, part in enumerate((slice(0, 4), slice(4, 6))):
        writer.write_shard(index, {"images": images[part], "images_f16": wide[part]})
    old = Bank(tmp_path / "old")
    new = write_kept(old, only_exact(old), tmp_path / "new")
    found = new.transform()
    assert found is not None and found[0]["scale"] == 2 and found[1]["of"] == "test"
    np.testing.assert_array_equal(new.column("images_f16"), old.column("images_f16")[:5])


def test_damage_is_not_sealed_anew(planted, tmp_path):
    shard = planted.path / "shards" / "00002.h5"
    data = bytearray(shard.read_bytes())
    data[-40] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BankError):
        write_kept(planted, only_exact(planted), tmp_path / "new")
    assert not (tmp_path / "new").exists() and [p.name for p in tmp_path.iterdir()] == ["b"]


def test_tiny_banks(tmp_path):
    for count in (1, 2):
        bank = bank_of(tmp_path / f"b{count}", pixels(count))
        found = find_duplicates(bank, pixel_source(bank.shape))
        assert len(found.removed) == 0 and "too few" in found.about["threshold_from"]
    bank = bank_of(tmp_path / "same", np.repeat(pixels(1), 40, axis=0))
    found = find_duplicates(bank, pixel_source(bank.shape))
    assert found.keep.tolist() == [0] and len(write_kept(bank, found, tmp_path / "one")) == 1


def test_an_unfinished_bank_is_refused(tmp_path):
    writer = BankWriter.create(tmp_path / "b", make_spec())
    fill(writer, [0, 1])
    bank = Bank(writer.path)
    with pytest.raises(BankError, match="unfinished"):
        write_kept(bank, only_exact(bank), tmp_path / "new")


def test_a_place_inside_the_old_bank_is_refused(planted):
    before = tree(planted.path)
    with pytest.raises(UsageError, match="inside the bank"):
        main(["dedup", str(planted.path), "--out", str(planted.path / "new"), "--features", "pixels"])
    assert tree(planted.path) == before


def test_a_failure_leaves_nothing_behind(planted, tmp_path, monkeypatch):
    def fails(self, index, arrays, meta=None):
        if index == 3:
            raise OSError(28, "No space left on device")
        return original(self, index, arrays, meta)

    original = BankWriter.write_shard
    monkeypatch.setattr(BankWriter, "write_shard", fails)
    with pytest.raises(Exception, match="disk is full"):
        write_kept(planted, only_exact(planted), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_command(planted, tmp_path, capsys):
    words = ["dedup", str(planted.path), "--features", "pixels", "--device", "cpu"]
    with pytest.raises(UsageError, match="--out NEW, or --dry-run"):
        main(words)
    assert main([*words, "--dry-run", "--pairs", str(tmp_path / "p.png"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["removed"] == 5 and facts["out"] is None and not (tmp_path / "new").exists()
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    out = str(tmp_path / "new")
    assert main([*words, "--out", out, "--threshold", "none"]) == 0
    text = capsys.readouterr().out
    assert "3 of 100 images removed: 3 with equal pixels, 0 near" in text and "97 images" in text
    assert len(Bank(out)) == 97
    with pytest.raises(OutputExistsError):
        main([*words, "--out", out])
    with pytest.raises(OutputExistsError):
        main([*words, "--dry-run", "--pairs", str(tmp_path / "p.png")])
    for bad in ("-1", "nan", "inf", "much"):
        with pytest.raises(UsageError, match="--threshold"):
            main([*words, "--dry-run", f"--threshold={bad}"])
    with pytest.raises(ModelError, match="remembers no teacher"):
        main(["dedup", str(planted.path), "--dry-run"])


def test_command_in_a_teachers_features(planted, tmp_path, capsys):
    teacher = save_teacher(tmp_path, classes=3)
    words = ["dedup", str(planted.path), "--teacher", str(teacher), "--device", "cpu", "--out", str(tmp_path / "new")]
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["exact"] == 3 and facts["features"]["unit_length"] and "cosine" in facts["unit"]
    recipe = Bank(tmp_path / "new").spec.recipe["dedup"]
    assert recipe["threshold"] == facts["threshold"] and recipe["features"]["sha256"]


def test_the_same_bytes_every_time(planted, tmp_path):
    one = write_kept(planted, only_exact(planted), tmp_path / "one")
    two = write_kept(planted, only_exact(planted), tmp_path / "two")
    assert one.info()["root"] == two.info()["root"] and one.spec.recipe_hash() == two.spec.recipe_hash()
