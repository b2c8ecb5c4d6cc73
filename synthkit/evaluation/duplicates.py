"""Near duplicates of a bank in a feature space: the threshold, and who stands for whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from synthkit.bank import Bank
from synthkit.bank.joining.dedup import Duplicates, only_exact, with_near
from synthkit.data.real import require_bytes
from synthkit.errors import BankError, UsageError
from synthkit.evaluation.features import FeatureSource, Images, features, sample
from synthkit.evaluation.neighbours import leaders, nearest
from synthkit.evaluation.set_metrics import far_out_fence

GAP_SAMPLE = 5_000  # images whose nearest neighbour is looked up to set the threshold
AUTO = "Tukey's far-out fence of the log distances of this bank's nearest neighbours: exp(Q1 - 3 (Q3 - Q1))"
TOO_FEW = "too few different images to tell what is near for this bank: equal features only"
UNITS = {
    "teacher": "distance of features scaled to length 1: 0 is equal, 2 opposite; cosine = 1 - d^2 / 2",
    "pixels": "root mean square difference of a pixel in [0,1]",
}


def find_duplicates(
    bank: Bank, source: FeatureSource, *, threshold: float | None = None, seed: int = 0,
    tell: Callable[[str], None] | None = None,
) -> Duplicates:  # fmt: skip
    """Exact duplicates (pixels), and near ones: images whose features lie within `threshold`.

    Args:
        source: the space; teacher features are scaled to length 1.
        threshold: in the unit of the space (`UNITS`); none takes `far_out_fence` of the distances between this bank's
            images and their nearest neighbours (a sample of 5,000), so that ordinary neighbours are never near.
        tell: is given a time estimate when the comparison is long.

    Cost: N x kept x D multiplications. Memory: the features twice (8 N D bytes).

    Raises:
        BankError: no shard is committed. UsageError: the threshold is not a number from 0.
        DataError: the features do not fit into memory.
    """
    if not len(bank):
        raise BankError(f"{bank.path}: no shard is committed yet", hint="go on with: synthkit synthesize --resume")
    if threshold is not None and not 0 <= threshold < float("inf"):
        raise UsageError("dedup: the threshold must be a number from 0", got=threshold)
    space = source.normalised() if source.kind == "teacher" else source
    exact = only_exact(bank)
    rows = exact.keep
    values = features(space, Images.of_bank(bank), rows)
    require_bytes("dedup: comparing the features", values.nbytes)
    about: dict[str, Any] = {"features": space.record(), "unit": UNITS[source.kind], "threshold_from": "given"}
    gaps = own_gaps(values, GAP_SAMPLE, seed)
    if len(gaps):
        about["nearest_quantiles"] = {f"{q:g}": float(np.quantile(gaps, q)) for q in (0, 0.01, 0.05, 0.25, 0.5, 0.75)}
    if threshold is None:
        fence = far_out_fence(gaps)
        threshold, about["threshold_from"] = (0.0, TOO_FEW) if fence is None else (fence, AUTO)
    inner = leaders(values, threshold, tell=tell)
    leader, distances = np.full(len(bank), -1, np.int64), np.zeros(len(bank))
    leader[rows] = rows[inner]
    moved = np.flatnonzero(inner != np.arange(len(inner)))
    for start in range(0, len(moved), 4096):
        part = moved[start : start + 4096]
        gap = values[part].astype(np.float64) - values[inner[part]]
        distances[rows[part]] = np.sqrt(np.einsum("nd,nd->n", gap, gap))
    return with_near(exact, leader, distances, threshold, **about)


def own_gaps(values: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Distances of up to `limit` random rows to their nearest other row (empty for a single row)."""
    if len(values) < 2:
        return np.empty(0)
    rows = sample(len(values), limit, seed)
    found = nearest(values, values[rows], k=2)
    own = found.indices == rows[:, None]
    return np.where(own[:, 0], found.distances[:, 1], found.distances[:, 0])
