"""Orders: permutations that are pure functions, a block order whose distance from uniform is what order.py says."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from synthkit.bank.reading.order import BlockOrder, block_order, block_rows, check_ranks, random_order, rank_rows, steps
from synthkit.errors import UsageError


@pytest.mark.parametrize("n, block, window", [(53, 4, 3), (53, 7, 100), (1, 4, 4), (64, 8, 2), (65, 8, 1), (10, 99, 2)])
def test_block_order_is_a_permutation_of_whole_blocks(n, block, window):
    order = BlockOrder(n=n, seed=3, epoch=1, block=block, window=window)
    whole = block_order(n, 3, 1, block=block, window=window)
    assert sorted(whole.tolist()) == list(range(n)) and whole.dtype == np.int64
    for w in range(order.windows):
        rows = whole[order.edges[w] : order.edges[w + 1]]
        assert sorted(rows.tolist()) == order.blocks_of(w).tolist()
        blocks = np.unique(rows // block)
        assert len(blocks) <= window and len(rows) == sum(min(block, n - b * block) for b in blocks.tolist())
    for start in range(0, n, 5):  # any part equals the same part of the whole
        assert np.array_equal(order.part(start, start + 9), whole[start : start + 9])


def test_orders_depend_on_seed_and_epoch_alone():
    for make in (random_order, lambda n, s, e: block_order(n, s, e, block=5, window=4)):
        first = make(200, 1, 2)
        assert np.array_equal(first, make(200, 1, 2))
        assert not np.array_equal(first, make(200, 2, 2)) and not np.array_equal(first, make(200, 1, 3))
        assert not np.array_equal(make(200, 2, 1), first)


def test_orders_are_the_same_in_another_process_and_for_ever():
    code = (
        "from synthkit.bank.reading.order import *\n"
        "print(random_order(9, 5, 1).tolist(), block_order(12, 5, 1, block=2, window=3).tolist())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == f"{random_order(9, 5, 1).tolist()} {block_order(12, 5, 1, block=2, window=3).tolist()}"
    # the raw bits of PCG64 are fixed by numpy for all releases; so are these, sorted by hand
    bits = np.random.PCG64(np.random.SeedSequence([5, 1])).random_raw(9).tolist()
    assert random_order(9, 5, 1).tolist() == sorted(range(9), key=lambda i: bits[i])
    bits = np.random.PCG64(np.random.SeedSequence([5, 1, 0x626C6F636B73])).random_raw(6).tolist()
    blocks = sorted(range(6), key=lambda i: bits[i])
    expected = []
    for window, chosen in enumerate((blocks[:3], blocks[3:])):
        rows = [2 * b + k for b in sorted(chosen) for k in (0, 1)]
        bits = np.random.PCG64(np.random.SeedSequence([5, 1, 0x726F7773, window])).random_raw(6).tolist()
        expected += [rows[i] for i in sorted(range(6), key=lambda i: bits[i])]
    assert block_order(12, 5, 1, block=2, window=3).tolist() == expected


def test_quality_of_the_block_order():
    """Worst case of order.py, constant blocks: the variance of batch means is (1 + B / window) times the uniform."""
    n, block, window, size = 1 << 15, 16, 64, 32
    value = np.repeat(np.random.default_rng(0).normal(size=n // block), block)

    def variance(order_of):
        means = [value[order_of(epoch)].reshape(-1, size).mean(axis=1) for epoch in range(12)]
        return np.concatenate(means).var()

    ratio = variance(lambda e: block_order(n, 0, e, block=block, window=window)) / variance(
        lambda e: random_order(n, 0, e)
    )
    assert ratio == pytest.approx(1 + size / window, rel=0.1)
    independent = np.random.default_rng(1).normal(size=n)  # rows that know nothing of their neighbours: no difference
    value = independent
    ratio = variance(lambda e: block_order(n, 0, e, block=block, window=window)) / variance(
        lambda e: random_order(n, 0, e)
    )
    assert ratio == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("size", [12, 60])
def test_ranks_share_the_same_global_batch(size):
    order = random_order(100, 0, 0)
    for step in range(steps(100, size)):
        batch = order[step * size : (step + 1) * size]
        for world in (1, 2, 3, 4, 6, 12):
            parts = [rank_rows(batch, rank, world) for rank in range(world)]
            assert sorted(np.concatenate(parts).tolist()) == sorted(batch.tolist())
            assert max(map(len, parts)) - min(map(len, parts)) <= (len(batch) < size)


def test_wrong_use():
    with pytest.raises(UsageError, match="multiple of the number of processes"):
        check_ranks(10, 0, 3)
    for rank in (-1, 2):
        with pytest.raises(UsageError, match="rank must be 0 to 1"):
            check_ranks(10, rank, 2)
    for call in (
        lambda: check_ranks(0, 0, 1), lambda: random_order(5, -1, 0), lambda: random_order(5, 0, -1),
        lambda: block_order(5, 0, 0, block=0), lambda: block_order(5, 0, 0, block=1, window=0),
        lambda: random_order(5, 0.5, 0),  # type: ignore[arg-type]
    ):  # fmt: skip
        with pytest.raises(UsageError):
            call()
    assert block_order(0, 0, 0, block=3).tolist() == [] and random_order(0, 0, 0).tolist() == []
    assert block_rows(3072) == 85 and block_rows(10**9) == 1
