"""Parquet, read back with Hugging Face datasets, and the card with PyYAML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
datasets = pytest.importorskip("datasets")
pytest.importorskip("pyarrow")
import pyarrow.parquet  # noqa: E402  # only where it is installed
import yaml  # noqa: E402

from synthkit.bank.export import export  # noqa: E402
from synthkit.data.specs import load_data  # noqa: E402
from synthkit.errors import UsageError  # noqa: E402

from .exports import HOSTILE, make, pixels, same, stored  # noqa: E402


def load(folder: Path, split: str = "train") -> Any:
    return datasets.load_dataset(str(folder), split=split, cache_dir=str(folder.parent / "cache"))


@pytest.mark.parametrize("channels", [1, 3])
def test_load_dataset_reads_the_same_rows(tmp_path, channels):
    rows = stored(make(tmp_path / "b", shape=(channels, 6, 5), top_k=3))
    data = load(export(tmp_path / "b", "parquet", tmp_path / "o"))
    same(np.stack([pixels(image) for image in data["image"]]), rows["images"])
    same(np.array(data["label"]), rows["labels"], np.int64)
    table = data.with_format("numpy")
    for column in ("logits", "topk_logit"):
        same(table[column][:], rows[column], np.float32)
        same(table[column][:].astype(np.float16), rows[column])
    same(table["topk_index"][:], rows["topk_index"], np.int64)
    for column in ("difficulty", "tail_logsumexp"):
        same(np.array(data[column], dtype=np.float32), rows[column])
    same(np.array(data["origin_seed"], dtype=np.uint64), rows["origin_seed"])
    same(np.array(data["origin_step"], dtype=np.uint32), rows["origin_step"])


def test_the_features_are_those_of_the_hub(tmp_path):
    make(tmp_path / "b")
    data = load(export(tmp_path / "b", "parquet", tmp_path / "o"))
    features = data.features
    assert isinstance(features["image"], datasets.Image)
    assert isinstance(features["label"], datasets.ClassLabel)
    names = features["label"].names
    assert names[:3] == HOSTILE[:3] and names[3] == f"{HOSTILE[3]} (3)" and names[4] == HOSTILE[4]
    assert features["logits"].length == 5 and features["logits"].feature.dtype == "float32"
    assert data[7]["image"].format == "PNG"


def test_several_files_of_bounded_row_groups_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr("synthkit.bank.export.parquet.GROUP_ROWS", 4)
    rows = stored(make(tmp_path / "b", images=53))
    out = export(tmp_path / "b", "parquet", tmp_path / "o", shard_bytes=2000, split="val")
    names = sorted(p.name for p in (out / "data").iterdir())
    assert len(names) > 2 and names[0] == f"val-00000-of-{len(names):05d}.parquet"
    assert names[-1] == f"val-{len(names) - 1:05d}-of-{len(names):05d}.parquet"
    for name in names:
        meta = pyarrow.parquet.ParquetFile(out / "data" / name).metadata
        assert max(meta.row_group(i).num_rows for i in range(meta.num_row_groups)) <= 4 + 9  # a piece may go over
    data = load(out, "val")
    same(np.stack([pixels(image) for image in data["image"]]), rows["images"])
    same(np.array(data["label"]), rows["labels"], np.int64)


def test_our_own_reader_takes_it(tmp_path):
    rows = stored(make(tmp_path / "b"))
    out = export(tmp_path / "b", "parquet", tmp_path / "o")
    data = load_data(f"parquet:{out}", "train")
    same(data.images.numpy(), rows["images"])
    same(data.labels.numpy(), rows["labels"], np.int64)


@pytest.mark.parametrize("real", [False, True])
def test_the_card_says_whether_the_pixels_are_real(tmp_path, real):
    make(tmp_path / "b", contains_real=real, real_data_used=real)
    out = export(tmp_path / "b", "parquet", tmp_path / "o", title="Eins: [zwei]\n---")
    text = (out / "README.md").read_text(encoding="utf-8")
    front, body = text.split("\n---\n", 1)
    meta = yaml.safe_load(front)
    assert meta["task_categories"] == ["image-classification"] and meta["size_categories"] == ["n<1K"]
    assert meta["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}]
    assert meta["pretty_name"].startswith("Eins: [zwei]") and "license" in meta
    assert ("contains-real-images" in meta["tags"]) is real
    assert ("Contains real pixels" in body) is real and "<b>" not in body


def test_without_labels_and_logits(tmp_path):
    rows = stored(make(tmp_path / "b", labels=False, logits=False))
    data = load(export(tmp_path / "b", "parquet", tmp_path / "o"))
    assert set(data.column_names) == {"image", "difficulty", "origin_step", "origin_seed"}
    same(np.stack([pixels(image) for image in data["image"]]), rows["images"])


def test_one_image(tmp_path):
    rows = stored(make(tmp_path / "b", images=1))
    data = load(export(tmp_path / "b", "parquet", tmp_path / "o"))
    same(np.stack([pixels(image) for image in data["image"]]), rows["images"])


def test_a_split_is_no_path(tmp_path):
    make(tmp_path / "b")
    with pytest.raises(UsageError, match="split"):
        export(tmp_path / "b", "parquet", tmp_path / "o", split="../x")
