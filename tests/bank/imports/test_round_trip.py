"""Our own exports come back as the bank they were made of: every pixel, label, logit, and its provenance."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bank.banks import make_bank, make_spec, shard_arrays
from synthkit.bank import Bank, BankWriter, state
from synthkit.bank.export import export
from synthkit.bank.imports import ImportOptions, guess, import_bank
from synthkit.errors import DataError, UsageError

FORMATS = ["imagefolder", "parquet", "webdataset", "mds", "npz", "safetensors"]


def exported(tmp_path, format, bank=None, **options):
    if bank is None:
        make_bank(tmp_path / "bank")
    export(tmp_path / "bank", format, tmp_path / "out", **options)
    return Bank(tmp_path / "bank"), tmp_path / "out"


@pytest.mark.parametrize("format", FORMATS)
def test_every_column_comes_back(tmp_path, format):
    bank, out = exported(tmp_path, format)
    assert guess(out) == format
    back = import_bank(out, tmp_path / "back")
    assert back.columns == bank.columns
    for column in back.columns:
        assert np.array_equal(back.column(column), bank.column(column)), column
    for field in ("class_names", "mean", "std", "label_kind", "recipe", "teacher", "seed", "contains_real",
                  "real_data_used", "images_per_shard", "shape", "num_classes"):  # fmt: skip
        assert getattr(back.spec, field) == getattr(bank.spec, field), field
    assert back.spec.parents[0]["uuid"] == bank.record["uuid"] != back.record["uuid"]
    assert back.verify(deep=True).ok
    assert back.info()["root"] == bank.info()["root"]  # the very same shards


@pytest.mark.parametrize("format", ["webdataset", "mds"])
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_raw_pixels_of_any_number_of_channels(tmp_path, format, channels):
    make_bank(tmp_path / "bank", shape=(channels, 4, 7), mean=[0.5] * channels, std=[0.2] * channels)
    bank, out = exported(tmp_path, format, bank=True, raw=True)
    assert np.array_equal(import_bank(out, tmp_path / "back").column("images"), bank.column("images"))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_channels_in_png(tmp_path, format, channels):
    make_bank(tmp_path / "bank", shape=(channels, 4, 7), mean=[0.5] * channels, std=[0.2] * channels)
    bank, out = exported(tmp_path, format, bank=True)
    assert np.array_equal(import_bank(out, tmp_path / "back").column("images"), bank.column("images"))


@pytest.mark.parametrize("format", FORMATS)
def test_banks_without_labels_and_names(tmp_path, format):
    spec = make_spec(label_kind="none", class_names=None)
    writer = BankWriter.create(tmp_path / "bank", spec)
    for index in writer.missing():
        writer.write_shard(index, {"images": shard_arrays(spec, index)["images"]})
    bank, out = exported(tmp_path, format, bank=True)
    back = import_bank(out, tmp_path / "back")
    assert back.columns == ["images"] and back.spec.label_kind == "none" and back.spec.class_names is None
    assert np.array_equal(back.column("images"), bank.column("images"))
    assert back.info()["root"] == bank.info()["root"]


@pytest.mark.parametrize("format", FORMATS)
def test_top_k_columns(tmp_path, format):
    spec = make_spec(top_k=2)
    writer = BankWriter.create(tmp_path / "bank", spec)
    rng = np.random.default_rng(0)
    for index in writer.missing():
        rows, n = shard_arrays(spec, index), spec.shard_size(index)
        del rows["logits"]
        rows["topk_index"] = np.stack([rng.permutation(4)[:2] for _ in range(n)])
        rows["topk_logit"] = rng.normal(size=(n, 2)).astype(np.float16)
        rows["tail_logsumexp"] = rng.normal(size=n).astype(np.float32)
        writer.write_shard(index, rows)
    bank, out = exported(tmp_path, format, bank=True)
    back = import_bank(out, tmp_path / "back")
    assert back.spec.top_k == 2
    for column in ("topk_index", "topk_logit", "tail_logsumexp"):
        assert np.array_equal(back.column(column), bank.column(column))


def distilled(path, kind="affine", rate=0.0125):
    """A bank as trajectory matching leaves it: float pixels in a transformed space, a learned step size."""
    arrays = {"mean": np.array([0.5, 0.4, 0.3], np.float32), "std": np.array([0.2, 0.2, 0.1], np.float32)}
    if kind == "zca":
        arrays = {"matrix": np.eye(4, dtype=np.float32)}
    spec = make_spec(transform=state.transform_entry(kind, arrays, eps=0.1), real_data_used=True)
    writer = BankWriter.create(path, spec)
    writer.write_transform(arrays)
    for index in writer.missing():
        rows = shard_arrays(spec, index)
        rows["images_f16"] = np.random.default_rng(index).normal(size=rows["images"].shape).astype(np.float16)
        last = index == writer.shards - 1
        writer.write_shard(index, rows, {"learning_rate": rate} if last else {})
    return Bank(path)


@pytest.mark.parametrize("format", ["npz", "safetensors"])
@pytest.mark.parametrize("kind", ["affine", "zca"])
def test_float_pixels_with_their_transform(tmp_path, format, kind):
    bank = distilled(tmp_path / "bank", kind)
    _, out = exported(tmp_path, format, bank=True)
    back = import_bank(out, tmp_path / "back")
    assert np.array_equal(back.column("images_f16"), bank.column("images_f16"))
    assert back.spec.transform == bank.spec.transform and back.info()["root"] == bank.info()["root"]
    assert all(np.array_equal(back.transform()[0][k], v) for k, v in bank.transform()[0].items())
    assert back.sidecars[-1].raw["meta"]["learning_rate"] == 0.0125
    assert "learning_rate" not in back.sidecars[0].raw["meta"]


@pytest.mark.parametrize("kind", ["affine", "zca"])
def test_pt_of_training_pixels(tmp_path, kind):
    bank = distilled(tmp_path / "bank", kind)
    _, out = exported(tmp_path, "pt", bank=True)
    back = import_bank(out, tmp_path / "back")
    assert np.array_equal(back.column("images_f16"), bank.column("images_f16"))
    assert np.array_equal(back.column("labels"), bank.column("labels"))
    assert back.spec.transform == bank.spec.transform
    assert back.sidecars[-1].raw["meta"]["learning_rate"] == pytest.approx(0.0125)


@pytest.mark.parametrize("space", ["normalised", "pixels"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_pt_gives_back_the_exact_pixels(tmp_path, space, labels):
    bank, out = exported(tmp_path, "pt", space=space, labels=labels)
    back = import_bank(out, tmp_path / "back")
    assert "images_f16" not in back.columns
    assert np.array_equal(back.column("images"), bank.column("images"))
    if labels == "soft":
        assert np.array_equal(back.column("logits"), bank.column("logits"))
    assert np.array_equal(back.column("labels"), bank.column("labels"))


def test_what_contains_real_pixels_keeps_its_label(tmp_path):
    make_bank(tmp_path / "bank", contains_real=True, real_data_used=True)
    _, out = exported(tmp_path, "npz", bank=True)
    with pytest.raises(UsageError, match="contains real pixels"):
        import_bank(out, tmp_path / "no", options=ImportOptions(real=False))
    assert not (tmp_path / "no").exists()
    assert import_bank(out, tmp_path / "back").spec.contains_real


def test_a_file_put_beside_an_export_does_not_inherit_its_provenance(tmp_path):
    bank, out = exported(tmp_path, "npz")
    assert not bank.spec.contains_real
    np.savez(out / "photos.npz", images=np.zeros((4, 6, 5, 3), np.uint8), labels=np.arange(4))
    assert import_bank(out / "photos.npz", tmp_path / "photos").spec.contains_real
    assert not import_bank(out / "bank.npz", tmp_path / "bank2").spec.contains_real
    with pytest.raises(DataError, match="holds 2 files"):
        import_bank(out, tmp_path / "both")


@pytest.mark.parametrize("format", ["imagefolder", "webdataset", "parquet"])
def test_rows_added_to_or_missing_from_an_export_are_refused(tmp_path, format):
    _, out = exported(tmp_path, format)
    record = json.loads((out / "synthkit.json").read_text())
    (out / "synthkit.json").write_text(json.dumps({**record, "images": 52}))
    with pytest.raises(DataError, match="holds 53 images, its synthkit.json says 52"):
        import_bank(out, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("change", [
    {"bank": None}, {"format": "other"}, {"version": 2}, {"shape": [3, 6]}, {"num_classes": 10**9}, {"mean": ["a"]},
    {"class_names": ["one"]}, {"label_kind": "guess"}, {"contains_real": "no"}, {"left_out": [1]}, {"images": True},
    {"transform": []}, {"files": 3},
])  # fmt: skip
def test_malformed_records_are_typed_errors(tmp_path, change):
    _, out = exported(tmp_path, "npz")
    record = json.loads((out / "synthkit.json").read_text())
    (out / "synthkit.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(DataError):
        import_bank(out, tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank", "out"]


def test_another_size_of_an_export(tmp_path):
    """Pixels of another size have no float version, no transform and perhaps other channels; the rest stays."""
    bank = distilled(tmp_path / "bank")
    _, out = exported(tmp_path, "npz", bank=True)
    back = import_bank(out, tmp_path / "back", options=ImportOptions(size=(1, 4, 4)))
    assert back.shape == (1, 4, 4) and not back.has("images_f16") and back.spec.transform == {} and back.mean == [0.5]
    assert np.array_equal(back.column("logits"), bank.column("logits")) and back.verify(deep=True).ok


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_taken_without_its_labels(tmp_path, format):
    _, out = exported(tmp_path, format)
    back = import_bank(out, tmp_path / "back", options=ImportOptions(unlabelled=True))
    assert back.spec.label_kind == "none" and not back.has("labels") and len(back) == 53
