"""WebDataset tars, read back with webdataset."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthkit.bank.export import export
from synthkit.errors import UsageError

from .exports import make, pixels, same, stored

webdataset = pytest.importorskip("webdataset")


def read(folder: Path, decode: str | None = "pil") -> list[dict[str, Any]]:
    tars = sorted(str(p) for p in folder.glob("*.tar"))
    data = webdataset.WebDataset(tars, shardshuffle=False)
    return list(data.decode(decode) if decode else data.decode())


@pytest.mark.parametrize("channels", [1, 3])
def test_webdataset_reads_the_same_rows_in_order(tmp_path, channels):
    rows = stored(make(tmp_path / "b", shape=(channels, 6, 5), top_k=2))
    out = export(tmp_path / "b", "webdataset", tmp_path / "o", workers=3)
    found = read(out, "pill" if channels == 1 else "pil")  # "pil" makes RGB of everything
    assert [s["__key__"] for s in found] == [f"{i:08d}" for i in range(23)]
    same(np.stack([pixels(s["png"]) for s in found]), rows["images"])
    same(np.array([s["cls"] for s in found]), rows["labels"], np.int64)
    for column in ("logits", "topk_index", "topk_logit"):
        same(np.stack([s[f"{column}.npy"] for s in found]), rows[column])
    for column in ("difficulty", "tail_logsumexp", "origin_step", "origin_seed"):
        same(np.array([s["json"][column] for s in found]).astype(rows[column].dtype), rows[column])
    assert [s["json"]["label"] for s in found] == rows["labels"].tolist()
    assert {s["json"]["class"] for s in found if s["cls"] == 4} <= {"Ärger 猫 <b>"}


def test_raw_pixels(tmp_path):
    rows = stored(make(tmp_path / "b", shape=(5, 3, 4), mean=[0.5] * 5, std=[0.5] * 5))
    found = read(export(tmp_path / "b", "webdataset", tmp_path / "o", raw=True), None)
    same(np.stack([s["npy"] for s in found]), rows["images"])


@pytest.mark.parametrize("limit", [{"shard_images": 5}, {"shard_bytes": 20_000}])
def test_several_tars_hold_every_row_once(tmp_path, limit):
    rows = stored(make(tmp_path / "b"))
    out = export(tmp_path / "b", "webdataset", tmp_path / "o", name="train", **limit)
    tars = sorted(p.name for p in out.glob("*.tar"))
    assert len(tars) > 2 and tars[:2] == ["train-000000.tar", "train-000001.tar"]
    found = read(out)
    same(np.stack([pixels(s["png"]) for s in found]), rows["images"])
    assert f"train-{{000000..{len(tars) - 1:06d}}}.tar" in (out / "README.md").read_text(encoding="utf-8")


def test_headers_tell_neither_time_nor_owner(tmp_path):
    make(tmp_path / "b")
    out = export(tmp_path / "b", "webdataset", tmp_path / "o")
    with tarfile.open(out / "bank-000000.tar") as tar:
        members = list(tar)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }
    assert [m.name for m in members[:4]] == [f"00000000.{e}" for e in ("png", "cls", "json", "logits.npy")]


def test_the_standard_library_would_have_written_the_same_headers(tmp_path):
    make(tmp_path / "b", images=3)
    data = (export(tmp_path / "b", "webdataset", tmp_path / "o") / "bank-000000.tar").read_bytes()
    theirs = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as tar,
        tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as again,
    ):
        for member in tar:
            fresh = tarfile.TarInfo(member.name)
            fresh.size = member.size
            again.addfile(fresh, tar.extractfile(member))
    assert theirs.getvalue()[: len(data)] == data  # theirs is filled up with zeros to 10 KiB


def test_without_labels_and_one_image(tmp_path):
    rows = stored(make(tmp_path / "b", images=1, labels=False, logits=False))
    (sample,) = read(export(tmp_path / "b", "webdataset", tmp_path / "o"))
    same(pixels(sample["png"])[None], rows["images"])
    assert "cls" not in sample and "logits.npy" not in sample and sample["json"]["label"] is None


def test_a_name_is_no_path(tmp_path):
    make(tmp_path / "b")
    with pytest.raises(UsageError, match="letters"):
        export(tmp_path / "b", "webdataset", tmp_path / "o", name="../x")


def test_hugging_face_reads_the_tars_and_not_our_record(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    rows = stored(make(tmp_path / "b", huge_seeds=False))  # its JSON reader stops at 2**63
    out = export(tmp_path / "b", "webdataset", tmp_path / "o", shard_images=9)
    data = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    same(np.stack([pixels(image) for image in data["png"]]), rows["images"])
    same(np.array(data["cls"]), rows["labels"], np.int64)
