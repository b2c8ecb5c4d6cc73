"""Metrics between two sets of feature vectors, and the diversity of one. Pure numpy in float64, faiss for neighbours.

All take float32 (N,D) features from `features.features`; which network they came from is the caller's to say.
Raw values hang on the network, the number of vectors and the data: they only mean something beside the same numbers
for a control of equal size (`stats`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from synthkit.errors import DataError
from synthkit.evaluation.neighbours import nearest, pairwise_blocks

FEWEST_GAPS = 50


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """`|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`, the squared 2-Wasserstein distance of two Gaussians.

    S is the covariance with N - 1. The trace of the root is taken from the eigenvalues of `R S_b R`, `R = S_a^(1/2)`,
    which is symmetric: no complex numbers, and singular covariances are no special case. Biased upwards for few
    vectors: compare sets of one size.

    Source: Dowson, Landau 1982; as a distance of feature sets Heusel et al. 2017 (arXiv 1706.08500).
    """
    _enough(2, a, b)
    (mean_a, cov_a), (mean_b, cov_b) = _moments(a), _moments(b)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ cov_b @ root)
    cross = np.sqrt(np.maximum(product, 0)).sum()
    gap = mean_a - mean_b
    return max(0.0, float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = x.mean(axis=0, dtype=np.float64)
    centred = x - mean  # float64
    return mean, centred.T @ centred / (len(x) - 1)


def manifold_metrics(real: np.ndarray, made: np.ndarray, k: int = 5) -> dict[str, float]:
    """Improved precision and recall, density and coverage.

    A set's manifold is the union of balls around its vectors, each reaching to the k-th nearest other vector of the
    set. `precision`: share of `made` inside the real manifold; `recall`: share of `real` inside that of `made`;
    `density`: mean number of real balls around a made vector, over k (can exceed 1; 1 in expectation for equal
    distributions); `coverage`: share of real balls that hold a made vector. A vector on the surface is outside.

    Cost: 2 N M D multiplications in float64, in blocks; memory 1024 x max(N, M).

    Raises:
        DataError: a set has not more than k vectors.

    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991); Naeem et al. 2020 (arXiv 2002.09797).
    """
    _enough(k + 1, real, made)
    radius_real = nearest(real, k=k).distances[:, -1]
    radius_made = nearest(made, k=k).distances[:, -1]
    inside, balls = 0, 0
    held, closest = np.zeros(len(real), bool), np.full(len(real), np.inf)
    for _, gaps in pairwise_blocks(made, real):
        hits = gaps < radius_real
        counts = hits.sum(axis=1)
        inside += int((counts > 0).sum())
        balls += int(counts.sum())
        np.minimum(closest, gaps.min(axis=0), out=closest)
    for part, gaps in pairwise_blocks(real, made):
        held[part] = (gaps < radius_made).any(axis=1)
    return {
        "precision": inside / len(made),
        "recall": float(held.mean()),
        "density": balls / (k * len(made)),
        "coverage": float((closest < radius_real).mean()),
    }


def vendi_score(x: np.ndarray) -> float:
    """`exp(-sum l ln l)` over the eigenvalues l of `K / N`, K the cosine similarities: the effective number of images.

    Between 1 (all alike) and min(N, D). The eigenvalues are those of the D x D matrix `X^T X / N`, so it is exact and
    costs N D^2 + D^3.

    Source: Friedman, Dieng 2022 (arXiv 2210.02410).
    """
    _enough(1, x)
    rows = x.astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    gram = rows.T @ rows if rows.shape[1] <= rows.shape[0] else rows @ rows.T
    values = np.linalg.eigvalsh(gram / len(rows))
    values = values[values > 1e-12]
    values = values / values.sum()  # a vector of zeros has no similarity to itself
    return float(np.exp(-(values * np.log(values)).sum())) if len(values) else 1.0


def diversity(x: np.ndarray) -> dict[str, Any]:
    """How far the vectors of one set lie apart.

    Returns:
        `n`; `mean_pairwise` distance over all pairs; `nearest_median`, `nearest_p01` and `nearest_p99`: quantiles of
        the distance to the nearest other vector; `identical`: vectors at distance 0 from another; `vendi`. None where
        there are too few vectors.
    """
    found: dict[str, Any] = {"n": len(x), "mean_pairwise": None, "nearest_p01": None, "nearest_median": None,
                             "nearest_p99": None, "identical": 0, "vendi": None}  # fmt: skip
    if len(x) < 2:
        return found
    total = sum(float(gaps.sum()) for _, gaps in pairwise_blocks(x, x))
    gaps = nearest(x).distances[:, 0]
    low, middle, high = np.quantile(gaps, [0.01, 0.5, 0.99])
    return found | {
        "mean_pairwise": total / (len(x) * (len(x) - 1)), "nearest_p01": float(low), "nearest_median": float(middle),
        "nearest_p99": float(high), "identical": int((gaps == 0).sum()), "vendi": vendi_score(x),
    }  # fmt: skip


def far_out_fence(gaps: np.ndarray) -> float | None:
    """The distance up to which a nearest neighbour is suspiciously near for this set: a near duplicate.

    Just below Tukey's "far out" fence on the logarithm: `exp(Q1 - 3 (Q3 - Q1))` of the distances above 0. It needs no
    scale, and holds while fewer than a quarter of the images have a near duplicate. None with fewer than 50 distances
    above 0: quartiles of so few say nothing.

    Source: Tukey, Exploratory Data Analysis, 1977 (outer fences).
    """
    logs = np.log(gaps[gaps > 0])
    if len(logs) < FEWEST_GAPS:
        return None
    low, high = np.quantile(logs, [0.25, 0.75])
    return math.exp(float(low - 3 * (high - low))) * (1 - 1e-9)  # where all are equal, none is far out


def _enough(count: int, *sets: np.ndarray) -> None:
    for x in sets:
        if len(x) < count:
            raise DataError(f"set metrics: at least {count} images are needed in each set", got=len(x))
