"""Files written without torch, read with torch."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch

from synthkit.bank.export.torchfile import TensorPlan, write_torch

from .exports import same


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1), (2, 3, 4, 5), (0, 3)])
@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<i8", "<i4"])
@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_what_was_written(tmp_path, shape, dtype, mapped):
    value = np.random.default_rng(0).normal(scale=100, size=shape).astype(dtype)
    pieces = [value] if not shape else [value[i : i + 2] for i in range(0, len(value), 2)]
    write_torch(tmp_path / "x.pt", TensorPlan(np.dtype(dtype), shape, pieces))
    found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)
    same(found.numpy(), value)
    assert found.stride() == torch.empty(shape).stride() and not found.requires_grad


def test_a_dict_of_tensors(tmp_path):
    values = {"ä/b": np.arange(3.0), "c": np.array([True, False])}
    write_torch(tmp_path / "x.pt", {k: TensorPlan.of(v) for k, v in values.items()})
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(found) == list(values)
    same(found["ä/b"].numpy(), values["ä/b"])
    same(found["c"].numpy(), values["c"], np.int64)


def test_it_is_the_same_tensor_as_torch_would_have_saved(tmp_path):
    value = torch.randn(5, 3)
    torch.save(value, tmp_path / "theirs.pt")
    write_torch(tmp_path / "ours.pt", TensorPlan.of(value.numpy()))
    ours, theirs = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("ours", "theirs"))
    assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    with zipfile.ZipFile(tmp_path / "theirs.pt") as archive:
        needed = {n.partition("/")[2] for n in archive.namelist() if "/." not in n}
    with zipfile.ZipFile(tmp_path / "ours.pt") as archive:
        assert {n.partition("/")[2] for n in archive.namelist()} == needed and archive.testzip() is None


def test_storages_are_aligned_also_with_large_headers(tmp_path, monkeypatch):
    monkeypatch.setattr("synthkit.bank.export.torchfile._LIMIT", 100)  # as if the storage had more than 2 GiB
    value = np.arange(1000, dtype="<f4")
    write_torch(tmp_path / "long_name.pt", TensorPlan.of(value))
    same(torch.load(tmp_path / "long_name.pt", weights_only=True, mmap=True).numpy(), value)
    data = (tmp_path / "long_name.pt").read_bytes()
    assert data.find(value.tobytes()) % 64 == 0


def test_pieces_that_do_not_add_up_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="announced"):
        write_torch(tmp_path / "x.pt", TensorPlan(np.dtype("<f4"), (5,), [np.zeros(4, np.float32)]))
