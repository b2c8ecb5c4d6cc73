"""The bank as tensors on a device, and the memory that it needs there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthkit.bank import Bank, BankMemoryError
from synthkit.bank.reading import resident
from synthkit.errors import UsageError

from .banks import make_bank, whole


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resident") / "b"
    make_bank(folder)
    return Bank(folder)


COLUMNS = ["images", "labels", "logits", "difficulty", "origin_step", "origin_seed"]


@pytest.mark.parametrize("piece", [1, 200, 1 << 20])
def test_every_column(bank, monkeypatch, piece):
    monkeypatch.setattr(resident, "PIECE_BYTES", piece)
    held = bank.resident("cpu", COLUMNS)
    assert len(held) == 53 and held.nbytes == resident.needed_bytes(bank, COLUMNS)
    rows = [52, 0, 7, 7, 30]
    for index in (rows, np.array(rows), torch.tensor(rows)):
        batch = held.batch(index)
        for name in COLUMNS:
            assert np.array_equal(batch[name].numpy(), whole(bank.spec, name)[rows]), name
    batch["images"].zero_()
    assert held.tensors["images"].any()  # a batch is a copy


def test_default_columns(bank):
    held = bank.resident("cpu")
    assert list(held.tensors) == ["images", "labels"] and held.tensors["images"].dtype == torch.uint8


@pytest.mark.parametrize("events", [False, True])
def test_through_buffers(bank, events):
    """What a GPU load does, with buffers in ordinary memory: each is reused only after its copy has ended."""
    waited, made = [], []

    class Event:
        def __init__(self):
            made.append(self)

        def synchronize(self):
            waited.append(self)

    target = torch.zeros((53, *bank.shape), dtype=torch.uint8)
    buffers = [torch.empty((8, *bank.shape), dtype=torch.uint8) for _ in range(2 if events else 1)]
    resident._fill_through(bank, "images", target, buffers, Event if events else None)
    assert np.array_equal(target.numpy(), whole(bank.spec, "images"))
    assert waited[:5] == made[:5] and set(waited) == set(made) and len(made) == len(waited) == (7 if events else 0)


def test_too_large(bank, monkeypatch):
    monkeypatch.setattr(resident, "free_memory", lambda device: 4000)
    with pytest.raises(BankMemoryError, match=r"images and labels need .* GiB on cpu, .* GiB are free.*stream"):
        bank.resident("cpu")
    assert len(bank.resident("cpu", ["labels"])) == 53


def test_wrong_column(bank):
    with pytest.raises(UsageError, match="labels"):
        bank.resident("cpu", ["label"])


def test_free_memory_is_a_number_of_bytes():
    assert 1 << 20 < resident.free_memory(torch.device("cpu")) < 1 << 50


@pytest.mark.gpu
def test_on_the_gpu(bank):
    held = bank.resident("cuda", COLUMNS)
    batch = held.batch([3, 50])
    for name in COLUMNS:
        assert batch[name].is_cuda and np.array_equal(batch[name].cpu().numpy(), whole(bank.spec, name)[[3, 50]])
