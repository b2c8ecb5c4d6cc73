"""Nearest neighbours against a naive loop in float64; the greedy leader rule against its definition."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from synthkit.errors import UsageError
from synthkit.evaluation.duplicates import own_gaps
from synthkit.evaluation.neighbours import leaders, nearest, pairwise_blocks
from synthkit.evaluation.privacy import nearest_others


def naive(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(((a[:, None].astype(np.float64) - b[None].astype(np.float64)) ** 2).sum(-1))


def cloud(n: int, width: int = 7, seed: int = 0, offset: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, width)) * scale + offset).astype(np.float32)


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (100.0, 0.01), (-3e4, 5.0)])
def test_neighbours_are_exact_far_from_the_origin_too(offset, scale):
    base, queries = cloud(1500, offset=offset, scale=scale), cloud(1100, seed=1, offset=offset, scale=scale)
    found, table = nearest(base, queries, k=4), naive(queries, base)
    order = np.argsort(table, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_allclose(found.distances, np.take_along_axis(table, order, 1), rtol=1e-12)
    assert found.distances.dtype == np.float64


def test_equal_vectors_are_at_exactly_zero_and_the_lower_row_comes_first():
    base = cloud(300, offset=1000.0)
    base[[40, 7, 200]] = base[5]
    found = nearest(base, base[5:6], k=4)
    assert found.indices[0].tolist() == [5, 7, 40, 200] and (found.distances == 0).all()
    own = nearest(base, k=2)
    assert own.indices[7].tolist() == [5, 40] and own.indices[5].tolist() == [7, 40]
    assert not (own.indices == np.arange(300)[:, None]).any()


def test_more_equal_vectors_than_candidates():
    base = np.repeat(cloud(1), 100, axis=0)
    own = nearest(base, k=3)
    assert (own.distances == 0).all() and not (own.indices == np.arange(100)[:, None]).any()
    assert (nearest_others(base, np.array([0, 99]), 3).distances == 0).all()
    assert (own_gaps(base, 50, 0) == 0).all()


def test_own_neighbours_of_some_rows_are_those_of_all():
    base = cloud(400)
    rows = np.array([3, 399, 17])
    some, whole = nearest_others(base, rows, 5), nearest(base, k=5)
    np.testing.assert_array_equal(some.indices, whole.indices[rows])
    np.testing.assert_array_equal(own_gaps(base, 400, 0), whole.distances[:, 0])


def test_misfits_are_refused():
    with pytest.raises(UsageError, match="one width"):
        nearest(cloud(5), cloud(5, width=3))
    with pytest.raises(UsageError, match="at least 3"):
        nearest(cloud(2), cloud(5), k=3)
    with pytest.raises(UsageError, match="at least 4"):
        nearest(cloud(3), k=3)


def test_pairwise_blocks_cover_all_pairs():
    a, b = cloud(130), cloud(70, seed=2)
    rows = list(pairwise_blocks(a, b, block=50))
    assert [part for part, _ in rows] == [slice(0, 50), slice(50, 100), slice(100, 130)]
    np.testing.assert_allclose(np.concatenate([gaps for _, gaps in rows]), naive(a, b), rtol=1e-6)


def greedy(vectors: np.ndarray, threshold: float, order: list[int]) -> np.ndarray:
    """The definition, row by row."""
    leader, kept = np.full(len(vectors), -1), []
    for row in order:
        near = [(float(naive(vectors[row : row + 1], vectors[k : k + 1])[0, 0]), k) for k in kept]
        best = min(near, default=(np.inf, -1))
        leader[row] = best[1] if best[0] <= threshold else row
        if leader[row] == row:
            kept.append(row)
    return leader


@pytest.mark.parametrize("quantile", [0.0, 0.05, 0.5, 0.99])
def test_leaders_follow_the_definition(quantile):
    vectors = cloud(260, width=3)
    vectors[100:110] = vectors[3]
    threshold = float(np.quantile(nearest(vectors).distances, quantile))
    np.testing.assert_array_equal(leaders(vectors, threshold), greedy(vectors, threshold, list(range(260))))


def test_leaders_across_blocks():
    vectors = np.tile(cloud(700, width=2), (4, 1))  # 2,800 rows in three blocks, each image four times
    found = leaders(vectors, 0.0)
    np.testing.assert_array_equal(found, np.tile(np.arange(700), 4))
    vectors += np.repeat(np.arange(4), 700)[:, None].astype(np.float32) * 1e-4
    near = leaders(vectors, 0.02)
    kept = np.flatnonzero(near == np.arange(len(vectors)))
    gaps = naive(vectors[kept], vectors[kept])
    assert (gaps[~np.eye(len(kept), dtype=bool)] > 0.02).all()  # no two that stay are near
    away = np.linalg.norm(vectors.astype(np.float64) - vectors[near], axis=1)
    assert (away <= 0.02).all() and (near <= np.arange(len(vectors))).all()


def test_there_is_no_chaining():
    line = np.arange(10, dtype=np.float32)[:, None]  # each within 1 of the next: one component, five leaders
    assert leaders(line, 1.0).tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]


def test_leaders_of_some_rows_in_their_order():
    vectors = cloud(50, width=2)
    rows = np.array([40, 3, 17, 5])
    found = leaders(vectors, 0.8, rows=rows)
    np.testing.assert_array_equal(found, greedy(vectors, 0.8, rows.tolist()))
    assert (found[np.setdiff1d(np.arange(50), rows)] == -1).all()


CODE = """
import sys
first, second = sys.argv[1].split(",")
__import__(first), __import__(second)
import numpy as np, torch
from synthkit.evaluation.neighbours import nearest
torch.set_num_threads(2)
base = np.random.default_rng(0).normal(size=(3000, 40)).astype(np.float32)
found = nearest(base, k=3)
torch.randn(200, 200) @ torch.randn(200, 200)
print(torch.get_num_threads(), found.indices.sum(), float(found.distances.sum()).hex())
"""


def test_faiss_leaves_torchs_threads_alone_whatever_is_imported_first():
    said = set()
    for order, threads in (("torch,faiss", "1"), ("faiss,torch", "2")):
        env = {**os.environ, "OMP_NUM_THREADS": threads}
        words = [sys.executable, "-c", CODE, order]
        out = subprocess.run(words, capture_output=True, text=True, env=env, check=True, timeout=120).stdout
        said.add(out)
    assert len(said) == 1 and said.pop().startswith("2 ")
