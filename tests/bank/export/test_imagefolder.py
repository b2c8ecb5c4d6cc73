"""ImageFolder, read back with torchvision; labels.csv with the csv module."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from synthkit.bank.export import export
from synthkit.bank.export.imagefolder import _halves
from synthkit.errors import UsageError

from .exports import EMPTY, HOSTILE, make, pixels, same, stored

datasets = pytest.importorskip("torchvision.datasets")


def read(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images RGB (N,C,H,W), labels, index) in the order of the bank, through torchvision."""
    data = datasets.ImageFolder(str(folder), allow_empty=True)
    index = np.array([int(Path(path).stem) for path, _ in data.samples])
    order = index.argsort()
    images = np.stack([pixels(data[i][0]) for i in order])
    return images, np.array(data.targets)[order], index[order]


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "labels.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_reads_the_same_pixels_and_labels(tmp_path, channels):
    bank = make(tmp_path / "b", shape=(channels, 6, 5))
    rows = stored(bank)
    out = export(bank, "imagefolder", tmp_path / "o")
    images, labels, index = read(out)
    same(images, np.repeat(rows["images"], 3 // channels, axis=1))  # torchvision shows grey as three equal channels
    same(labels, rows["labels"], np.int64)
    assert index.tolist() == list(range(23))
    data = datasets.ImageFolder(str(out), allow_empty=True)
    assert len(data.classes) == len(HOSTILE) and list(data.class_to_idx.values()) == list(range(len(HOSTILE)))


def test_the_table_gives_back_every_number(tmp_path):
    rows = stored(make(tmp_path / "b", top_k=2))
    out = export(tmp_path / "b", "imagefolder", tmp_path / "o")
    lines = table(out)
    assert [int(line["index"]) for line in lines] == list(range(23))
    assert all((out / line["file"]).is_file() for line in lines)
    same([int(line["label"]) for line in lines], rows["labels"], np.int64)
    same(np.array([line["difficulty"] for line in lines], dtype=np.float32), rows["difficulty"])
    logits = [[line[f"logit_{k}"] for k in range(5)] for line in lines]
    same(np.array(logits, dtype=np.float64).astype(np.float16), rows["logits"])
    assert [int(line["argmax"]) for line in lines] == rows["logits"].argmax(1).tolist()
    same([[int(line[f"top{i}_class"]) for i in (1, 2)] for line in lines], rows["topk_index"], np.int64)
    same(np.array([[line[f"top{i}_logit"] for i in (1, 2)] for line in lines], dtype=np.float16), rows["topk_logit"])
    same(np.array([line["tail_logsumexp"] for line in lines], dtype=np.float32), rows["tail_logsumexp"])
    assert [int(line["origin_seed"]) for line in lines] == rows["origin_seed"].tolist()
    assert [int(line["origin_step"]) for line in lines] == rows["origin_step"].tolist()


def test_the_text_of_every_float16_reads_back_as_itself():
    every = np.arange(1 << 16, dtype=np.uint16)
    finite = np.isfinite(every.view(np.float16))
    back = np.array([float(text) for text in _halves()[finite]]).astype(np.float16)
    assert np.array_equal(back.view(np.uint16), every[finite])


def test_a_class_name_is_no_formula_and_no_path(tmp_path):
    make(tmp_path / "b", images=200, per_shard=200)
    out = export(tmp_path / "b", "imagefolder", tmp_path / "o")
    text = (out / "labels.csv").read_text(encoding="utf-8")
    cells = {line["label"]: line["class"] for line in table(out)}
    assert cells["0"] == "'" + HOSTILE[0] and cells["1"] == HOSTILE[1] and cells["4"] == "Ärger 猫 <b>"
    assert len(text.splitlines()) == 201 and not set(text) & {"\x00", "\u202e", "\r"}
    folders = sorted(p.name for p in out.iterdir() if p.is_dir())
    assert folders == ["000_cmd_C_calc_A0", "001_etc_passwd", "002_CON", "003_etc_passwd", "004_Ärger_猫_b"]
    assert not (tmp_path / "etc").exists()


def test_an_empty_class_keeps_its_number_and_is_told(tmp_path):
    bank = make(tmp_path / "b")
    out = export(bank, "imagefolder", tmp_path / "o")
    assert list((out / f"{EMPTY:03d}_CON").iterdir()) == []
    with pytest.raises(FileNotFoundError):
        datasets.ImageFolder(str(out))
    assert "allow_empty=True" in (out / "README.md").read_text(encoding="utf-8")


def test_without_labels_there_is_one_folder(tmp_path):
    rows = stored(make(tmp_path / "b", labels=False, logits=False))
    out = export(tmp_path / "b", "imagefolder", tmp_path / "o")
    images, labels, _ = read(out)
    same(images, rows["images"])
    assert set(labels) == {0} and [p.name for p in out.iterdir() if p.is_dir()] == ["unlabelled"]
    assert "label" not in table(out)[0] and "argmax" not in table(out)[0]


def test_one_image(tmp_path):
    rows = stored(make(tmp_path / "b", images=1))
    images, labels, _ = read(export(tmp_path / "b", "imagefolder", tmp_path / "o"))
    same(images, rows["images"])
    same(labels, rows["labels"], np.int64)


def test_the_logits_can_be_left_out(tmp_path):
    make(tmp_path / "b", top_k=2)
    out = export(tmp_path / "b", "imagefolder", tmp_path / "o", logits="none", compress_level=9)
    assert list(table(out)[0]) == ["file", "index", "label", "class", "difficulty", "origin_step", "origin_seed"]


def test_what_png_cannot_hold_is_refused(tmp_path):
    make(tmp_path / "b", shape=(5, 3, 3), mean=[0.5] * 5, std=[0.5] * 5)
    with pytest.raises(UsageError, match="1 to 4 channels"):
        export(tmp_path / "b", "imagefolder", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_hugging_face_reads_the_pictures_and_not_our_record(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    huggingface = pytest.importorskip("datasets")
    bank = make(tmp_path / "b")
    out = export(bank, "imagefolder", tmp_path / "o")
    data = huggingface.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    names = [f"{label:03d}_" for label in sorted(stored(bank)["labels"])]
    assert [data.features["label"].int2str(label)[:4] for label in data["label"]] == names
    assert "use parquet there" in (out / "README.md").read_text(encoding="utf-8")  # its numbers skip the empty class
