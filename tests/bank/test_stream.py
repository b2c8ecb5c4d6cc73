"""Streams: the bytes of `batch(order[...])`, on any rank, from any step, mapped or not."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from synthkit.bank import Bank
from synthkit.bank.reading.order import BlockOrder
from synthkit.errors import BankError, UsageError

from .banks import make_bank, whole

COLUMNS = ("images", "labels", "logits", "difficulty", "origin_step")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "b"
    make_bank(folder)
    return folder


def shard_bytes(bank: Bank) -> int:
    return bank.sidecars[0].bytes


@pytest.fixture(scope="module", params=["mapped", "read", "half"])
def bank(path, request):
    limit = 3 * shard_bytes(Bank(path)) if request.param == "half" else None
    found = Bank(path, mapped=request.param != "read", mapped_bytes=limit)
    assert found.fits_memory == (request.param == "mapped")
    return found


def same(batch, bank, rows):
    return all(np.array_equal(getattr(batch, name), whole(bank.spec, name)[rows]) for name in COLUMNS)


def order_of(bank, shuffle, epoch, seed):
    if shuffle is None:
        return np.arange(len(bank))
    return bank.order(epoch, seed) if shuffle == "random" else bank.block_order(epoch, seed)


@pytest.mark.parametrize("shuffle", ["random", "blocks", None])
@pytest.mark.parametrize("prefetch", [0, 1, 5, 100])
def test_stream_is_batch_of_order(bank, shuffle, prefetch):
    order = order_of(bank, shuffle, 2, 9)
    found = list(bank.stream(8, seed=9, epoch=2, shuffle=shuffle, prefetch=prefetch))
    assert [len(b) for b in found] == [8, 8, 8, 8, 8, 8, 5]
    assert all(same(b, bank, order[8 * i : 8 * i + 8]) for i, b in enumerate(found))


@pytest.mark.parametrize("shuffle", ["random", "blocks", None])
def test_resumed_at_any_step(bank, shuffle):
    options = dict(seed=1, epoch=3, shuffle=shuffle, block=4, window=3)
    full = [b.images for b in bank.stream(8, **options)]
    for start in range(9):
        rest = [b.images for b in bank.stream(8, start=start, **options)]
        assert len(rest) == max(0, 7 - start)
        assert all(np.array_equal(a, b) for a, b in zip(rest, full[start:], strict=True))


@pytest.mark.parametrize("shuffle", ["random", "blocks", None])
def test_ranks_add_up_to_the_global_batch(bank, shuffle):
    options = dict(seed=1, shuffle=shuffle, block=3, window=4)
    alone = [b.images for b in bank.stream(12, **options)]
    for world in (2, 3, 4, 12):
        ranks = [list(bank.stream(12, rank=rank, world=world, **options)) for rank in range(world)]
        assert {len(r) for r in ranks} == {len(alone)}
        for step, batch in enumerate(alone):
            joined = np.empty_like(batch)
            for rank in range(world):
                joined[rank::world] = ranks[rank][step].images
            assert np.array_equal(joined, batch)


def test_columns(bank):
    batch = next(iter(bank.stream(4, columns=("labels", "origin_seed"))))
    assert batch.images is None and batch.labels.shape == (4,) and batch.origin_seed.tolist() == [7] * 4


def test_blocks_are_asked_for_once_and_in_time(bank, monkeypatch):
    """Every row is announced before its batch is read, and before the step before it unless its window begins here."""
    asked: list[int] = []
    monkeypatch.setattr(Bank, "will_need", lambda self, rows, columns=None: asked.extend(rows.tolist()))
    order, size = BlockOrder(n=53, seed=0, epoch=0, block=4, window=3), 5
    whole_order, known_before = order.part(0, 53).tolist(), set()
    for step, batch in enumerate(bank.stream(size, shuffle="blocks", block=4, window=3, prefetch=0)):
        rows = whole_order[step * size : step * size + len(batch)]
        assert set(rows) <= set(asked)
        if step and order.window_at(step * size) == order.window_at(step * size + len(rows) - 1):
            assert set(rows) <= known_before
        known_before = set(asked)
    assert sorted(asked) == list(range(53))


def test_stopping_early_ends_the_thread(bank):
    before = threading.active_count()
    for _ in range(3):
        assert len(list(itertools.islice(bank.stream(2), 2))) == 2
    assert threading.active_count() == before


def test_an_error_of_the_thread_reaches_the_caller(tmp_path):
    make_bank(tmp_path / "b")
    (tmp_path / "b" / "shards" / "00003.h5").unlink()
    with pytest.raises(BankError, match="00003.h5"):
        list(Bank(tmp_path / "b").stream(8))


@pytest.mark.parametrize("options, message", [
    ({"batch_size": 0}, "at least 1"), ({"world": 3}, "multiple"), ({"rank": 1}, "rank"),
    ({"shuffle": "block"}, "blocks"), ({"prefetch": -1}, "prefetch"), ({"start": -1}, "start"), ({"seed": -1}, "seed"),
    ({"shuffle": "blocks", "block": 0}, "block"), ({"columns": ("labls",)}, "labels"),
])  # fmt: skip
def test_wrong_use(bank, options, message):
    with pytest.raises(UsageError, match=message):
        options = {"batch_size": 8, **options}
        next(iter(bank.stream(**options)))
