"""npz and safetensors, read back with numpy and safetensors."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch

from synthkit.bank.export import export
from synthkit.bank.export.npz import Npz

from .exports import HOSTILE, make, same, stored

CASES = [
    {"shape": (1, 6, 5)}, {"top_k": 2}, {"images": 1}, {"labels": False, "logits": False}, {"f16": True, "rate": 0.02},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compress", [False, True])
def test_numpy_reads_every_column(tmp_path, case, compress):
    bank = make(tmp_path / "b", **case)
    out = export(bank, "npz", tmp_path / "o", compress=compress)
    with np.load(out / "bank.npz", allow_pickle=False) as found:
        for column, value in stored(bank).items():
            same(found[column], value)
        assert found["class_names"].tolist() == HOSTILE
        assert found["mean"].tolist() == bank.mean and found["std"].tolist() == bank.std
        for name, value in (bank.transform() or ({}, {}))[0].items():
            same(found[f"transform.{name}"], value)


@pytest.mark.parametrize("case", CASES)
def test_safetensors_reads_every_column(tmp_path, case):
    bank = make(tmp_path / "b", **case)
    out = export(bank, "safetensors", tmp_path / "o")
    found = safetensors.numpy.load_file(out / "bank.safetensors")
    for column, value in stored(bank).items():
        same(found[column], value)
    assert found["mean"].tolist() == bank.mean
    for name, value in (bank.transform() or ({}, {}))[0].items():
        same(found[f"transform.{name}"], value)
    tensors = safetensors.torch.load_file(out / "bank.safetensors")
    same(tensors["images"].numpy(), stored(bank)["images"])
    with safetensors.safe_open(out / "bank.safetensors", "np") as opened:
        meta = opened.metadata()
    assert json.loads(meta["class_names"]) == HOSTILE and meta["contains_real"] == "false"
    assert meta["bank_uuid"] == bank.record["uuid"]


def test_every_array_is_aligned(tmp_path):
    make(tmp_path / "b", shape=(3, 5, 5), images=7, top_k=2, f16=True)
    data = (export(tmp_path / "b", "safetensors", tmp_path / "o") / "bank.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    widths = {"U8": 1, "U16": 2, "F16": 2, "I32": 4, "U32": 4, "F32": 4, "U64": 8, "F64": 8}
    assert size % 8 == 0
    assert all(e["data_offsets"][0] % widths[e["dtype"]] == 0 for n, e in header.items() if n != "__metadata__")


def test_an_archive_tells_no_time(tmp_path):
    make(tmp_path / "b")
    out = export(tmp_path / "b", "npz", tmp_path / "o")
    with zipfile.ZipFile(out / "bank.npz") as archive:
        assert {i.date_time for i in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)} and archive.testzip() is None


def test_names_of_very_unequal_lengths_stay_out_of_the_array(tmp_path, monkeypatch):
    monkeypatch.setattr("synthkit.bank.export.arrays.MAX_NAME_BYTES", 64)
    make(tmp_path / "b")
    out = export(tmp_path / "b", "npz", tmp_path / "o")
    with np.load(out / "bank.npz") as found:
        assert "class_names" not in found
    record = json.loads((out / "synthkit.json").read_text(encoding="utf-8"))
    assert record["class_names"] == HOSTILE and any("class_names" in note for note in record["notes"])


def test_progress_sums_to_the_passes(tmp_path):
    from synthkit.bank.export import plan

    make(tmp_path / "b")
    seen: list[int] = []
    planned = plan(tmp_path / "b", "npz", tmp_path / "o")
    assert isinstance(planned.made, Npz)
    planned.run(seen.append)
    assert sum(seen) == planned.steps
