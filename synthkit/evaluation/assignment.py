"""The best one-to-one assignment (Hungarian method), in numpy."""

from __future__ import annotations

import numpy as np


def best_assignment(gain: np.ndarray) -> np.ndarray:
    """For every row the column such that the sum of `gain` is largest and every column is used once.

    Args:
        gain: (K, K) numbers.

    Returns:
        (K,) int64: column of row i. Cost O(K^3) in time (each step vectorised over K), O(K^2) in memory.

    Shortest augmenting paths with dual potentials (Jonker & Volgenant 1987).
    """
    cost = gain.max(initial=0.0) - np.asarray(gain, dtype=np.float64)
    size = len(cost)
    row_of = np.full(size + 1, -1)  # row assigned to each column; the last column is the virtual start
    u, v = np.zeros(size), np.zeros(size + 1)
    for row in range(size):
        row_of[size] = row
        column = size
        slack = np.full(size, np.inf)
        came_from = np.full(size, size)
        done = np.zeros(size + 1, dtype=bool)
        while row_of[column] != -1:
            done[column] = True
            here = row_of[column]
            reduced = cost[here] - u[here] - v[:size]
            better = ~done[:size] & (reduced < slack)
            slack[better] = reduced[better]
            came_from[better] = column
            free = np.where(done[:size], np.inf, slack)
            nearest = int(free.argmin())
            step = free[nearest]
            u[row_of[done]] += step
            v[done] -= step
            slack[~done[:size]] -= step
            column = nearest
        while column != size:  # walk the path back and shift the assignments along it
            row_of[column] = row_of[came_from[column]]
            column = int(came_from[column])
    result = np.empty(size, dtype=np.int64)
    result[row_of[:size]] = np.arange(size)
    return result
