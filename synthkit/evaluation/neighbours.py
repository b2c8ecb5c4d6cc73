"""Exact nearest neighbours through faiss, with distances recomputed in float64.

faiss finds candidates from float32 products, where |a|^2 + |b|^2 - 2ab loses digits for near vectors: two equal vectors
can come out at a distance of 1e-3. So a few candidates more than asked for are taken, and their distances are computed
again by differences in float64 and sorted: equal vectors are at exactly 0. Distances are Euclidean (not squared).

faiss and torch each bring an OpenMP runtime. Both obey OMP_NUM_THREADS. Nothing here sets a number of threads:
`faiss.omp_set_num_threads` would, depending on which was imported first, change torch's too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from synthkit.errors import UsageError

SPARE = 8  # candidates beyond k that are ranked again in float64
BLOCK = 1024  # queries at a time; bounds the memory of distances and candidates


@dataclass(frozen=True)
class Neighbours:
    """The `k` nearest base vectors of each query, nearest first; equal distances by the lower index."""

    distances: np.ndarray
    """float64 (Q,k), Euclidean."""
    indices: np.ndarray
    """int64 (Q,k), rows of the base."""


def nearest(base: np.ndarray, queries: np.ndarray | None = None, k: int = 1) -> Neighbours:
    """The `k` nearest rows of `base` (N,D) for each row of `queries` (Q,D), by exhaustive search.

    Without queries every row of the base is asked for its neighbours other than itself (a duplicate counts).
    Cost: Q N D multiplications; memory beyond the inputs: 1024 queries at a time.

    Raises:
        UsageError: fewer than k candidates, or the widths differ.
    """
    import faiss

    own = queries is None
    asked = base if queries is None else queries
    _check(base, asked, k + own)
    # distances do not change, but float32 has more digits left for vectors near the origin
    centre = _centre(base)
    shifted = np.ascontiguousarray(base - centre, np.float32)
    distances = np.empty((len(asked), k))
    indices = np.empty((len(asked), k), np.int64)
    wanted = min(len(base), k + own + SPARE)
    for start in range(0, len(asked), BLOCK):
        block = asked[start : start + BLOCK]
        _, found = faiss.knn(np.ascontiguousarray(block - centre, np.float32), shifted, wanted)
        part = slice(start, start + len(block))
        skip = np.arange(part.start, part.stop) if own else None
        distances[part], indices[part] = _ranked(block, base, found, k, skip)
    return Neighbours(distances, indices)


def _centre(vectors: np.ndarray) -> np.ndarray:
    """The mean, float32: distances from it do not change, but float32 has more digits left near the origin."""
    return vectors.mean(axis=0, dtype=np.float64).astype(np.float32)


def _ranked(
    queries: np.ndarray, base: np.ndarray, found: np.ndarray, k: int, skip: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` nearest of the candidates `found` (Q,c), by distance in float64, then by row; without `skip` (Q,)."""
    exact = _distances(queries, base, found)
    if skip is not None:
        exact[found == skip[:, None]] = np.inf
    order = np.lexsort((found, exact), axis=1)[:, :k]
    return np.take_along_axis(exact, order, axis=1), np.take_along_axis(found, order, axis=1)


def _check(base: np.ndarray, queries: np.ndarray, needed: int) -> None:
    if base.ndim != 2 or queries.ndim != 2 or base.shape[1] != queries.shape[1]:
        raise UsageError("neighbours: base (N,D) and queries (Q,D) must have one width",
                         got=f"{base.shape} and {queries.shape}")  # fmt: skip
    if len(base) < needed:
        raise UsageError(f"neighbours: at least {needed} vectors are needed", got=len(base))


def _distances(queries: np.ndarray, base: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Euclidean distances (Q,c) of each query to its candidates, by differences in float64."""
    out = np.empty(found.shape)
    step = max(1, (32 << 20) // (8 * found.shape[1] * base.shape[1]))  # 32 MiB of differences at a time
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        gaps = base[found[part]].astype(np.float64)
        gaps -= queries[part, None]
        out[part] = np.sqrt(np.einsum("qcd,qcd->qc", gaps, gaps))
    return out


def pairwise_blocks(a: np.ndarray, b: np.ndarray, block: int = BLOCK):
    """Yield (slice of `a`, float64 Euclidean distances (B, len(b))): all pairs, without N x M memory.

    Computed from products in float64 on centred vectors: distances below about 1e-8 of the vectors' length are noise.
    """
    centre = b.mean(axis=0, dtype=np.float64)
    right = b.astype(np.float64) - centre
    squares = np.einsum("nd,nd->n", right, right)
    for start in range(0, len(a), block):
        part = slice(start, min(start + block, len(a)))
        left = a[part].astype(np.float64) - centre
        gaps = left @ right.T
        gaps *= -2
        gaps += np.einsum("nd,nd->n", left, left)[:, None]
        gaps += squares
        yield part, np.sqrt(np.maximum(gaps, 0, out=gaps), out=gaps)


def leaders(
    vectors: np.ndarray, threshold: float, *, rows: np.ndarray | None = None,
    tell: Callable[[str], None] | None = None,
) -> np.ndarray:  # fmt: skip
    """Greedy leader clustering in the order of `rows`: who is represented by whom.

    A row becomes a leader unless an earlier leader lies within `threshold` (inclusive); then its nearest leader
    represents it. So no two leaders lie within the threshold, every other row lies within it of its leader (there is no
    chaining, as connected components would have), and the lowest row of a group is the one that stays.

    Args:
        vectors: (N,D) float32.
        rows: which rows take part, in order (all by default).
        tell: is given a time estimate when the work will take more than about ten seconds.

    Returns:
        int64 (N,): the row of each row's leader; its own number for a leader, -1 for a row that takes no part.

    Cost: at most len(rows) x leaders x D multiplications. Memory: as much again as `vectors`; never N x N.
    """
    import faiss

    order = np.arange(len(vectors)) if rows is None else np.asarray(rows, np.int64)
    leader = np.full(len(vectors), -1, np.int64)
    centre = _centre(vectors)
    kept = np.empty((len(order), vectors.shape[1]), np.float32)  # the leaders, centred
    kept_rows = np.empty(len(order), np.int64)
    count = 0
    began = time.monotonic()
    for start in range(0, len(order), BLOCK):
        part = order[start : start + BLOCK]
        block = vectors[part]
        shifted = np.ascontiguousarray(block - centre, np.float32)
        near, who = np.full(len(part), np.inf), np.full(len(part), -1)
        if count:
            _, found = faiss.knn(shifted, kept[:count], min(count, 1 + SPARE))
            gaps, rows_of = _ranked(block, vectors, kept_rows[found], 1)
            near, who = gaps[:, 0], rows_of[:, 0]
        inside = _leaders_within(block, near, threshold)
        leader[part] = np.where(inside < 0, who, part[inside])
        new = np.flatnonzero(inside == np.arange(len(part)))
        kept[count : count + len(new)], kept_rows[count : count + len(new)] = shifted[new], part[new]
        count += len(new)
        if tell is not None and start // BLOCK == 15:  # the cost of a block grows linearly with the leaders
            elapsed = time.monotonic() - began
            total = elapsed * (len(order) / (16 * BLOCK)) ** 2
            if total - elapsed > 10:
                tell(f"comparing {len(order):,} images: about {total / 60:.1f} minutes")
    return leader


def _leaders_within(block: np.ndarray, near: np.ndarray, threshold: float) -> np.ndarray:
    """The greedy rule inside one block: for each row the number of its leader, or -1 where that is an earlier block's.

    Args:
        near: (B,) distance to the nearest leader of the blocks before.
    """
    distances = _all_distances(block)
    leader = np.full(len(block), -1)
    inside = np.empty(len(block), np.int64)  # the leaders of this block, the first `count` entries
    count = 0
    for row in range(len(block)):
        gaps = distances[row, inside[:count]]
        best = int(gaps.argmin()) if count else -1
        closest = gaps[best] if count else np.inf
        if min(closest, near[row]) > threshold:
            inside[count], leader[row] = row, row
            count += 1
        elif closest < near[row]:
            leader[row] = inside[best]
    return leader


def _all_distances(block: np.ndarray) -> np.ndarray:
    """(B,B) float64 distances; those that are small are computed by differences, so that equal vectors are at 0."""
    distances = np.concatenate([gaps for _, gaps in pairwise_blocks(block, block)])
    scale = float(np.abs(block).max(initial=0)) * block.shape[1] ** 0.5
    rows, columns = np.nonzero(distances <= 1e-5 * scale)
    step = max(1, (32 << 20) // (8 * block.shape[1]))
    for start in range(0, len(rows), step):
        row, column = rows[start : start + step], columns[start : start + step]
        gaps = block[row].astype(np.float64)
        gaps -= block[column]
        distances[row, column] = np.sqrt(np.einsum("pd,pd->p", gaps, gaps))
    return distances
