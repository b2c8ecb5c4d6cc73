"""Choosing by ranks, and how good a choice was. Plain numbers only: no network, no image, no torch.

The rule was fixed before any accuracy was looked at and is not tuned on any: on every probe bank the candidates are
ranked by agreement with their teacher, ranks are scaled to [0, 1], and the score is the mean over the probe banks. A
rank is blind to how hard a probe bank is, so no bank can outweigh the others, and candidates that did not see the same
probe banks (nobody is shown its own) can still be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

RULE = (
    "highest score = mean over probe banks of the rank (0 worst, 1 best) by agreement with the teacher;"
    " ties: lower KL, then the later step"
)
Table = Sequence[Mapping[str, float]]
"""One row per candidate: probe -> value. A candidate lacks the probes that it must not be judged by."""


def average_ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks 0 to n - 1, ascending; equal values share the mean of their ranks."""
    array = np.asarray(values, dtype=np.float64)
    below = (array[None, :] < array[:, None]).sum(1)
    equal = (array[None, :] == array[:, None]).sum(1)
    return below + (equal - 1) / 2


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation in [-1, 1]; None for fewer than three pairs or where one side is constant."""
    if len(first) < 3:
        return None
    a, b = (ranks - ranks.mean() for ranks in (average_ranks(first), average_ranks(second)))
    size = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if size else None


def shared_probes(table: Table) -> list[str]:
    """Probes that at least two candidates have, in order of their first appearance."""
    names = dict.fromkeys(name for row in table for name in row)
    return [name for name in names if sum(name in row for row in table) > 1]


def rank_scores(table: Table) -> list[float | None]:
    """The score of every candidate (see the module text); None for one that shares no probe with another."""
    parts: list[list[float]] = [[] for _ in table]
    for name in shared_probes(table):
        having = [i for i, row in enumerate(table) if name in row]
        ranks = average_ranks([table[i][name] for i in having]) / (len(having) - 1)
        for i, rank in zip(having, ranks, strict=True):
            parts[i].append(float(rank))
    return [round(float(np.mean(part)), 12) if part else None for part in parts]


def centred(table: Table) -> list[float | None]:
    """Mean over the shared probes of a candidate's value less the mean of all candidates that have the probe.

    It takes the hardness of the probe banks out where not everybody saw the same ones.
    """
    level = {name: float(np.mean([row[name] for row in table if name in row])) for name in shared_probes(table)}
    gaps = [[row[name] - level[name] for name in row if name in level] for row in table]
    return [float(np.mean(gap)) if gap else None for gap in gaps]


def best(scores: Sequence[float | None], kl: Sequence[float | None], steps: Sequence[int]) -> int | None:
    """Index of the choice: the highest score, then the lower KL, then the later step; None where no score is known."""
    keys = [
        (score, -(math.inf if k is None else k), step, i)
        for i, (score, k, step) in enumerate(zip(scores, kl, steps, strict=True))
        if score is not None
    ]
    return max(keys)[3] if keys else None


def arg_best(values: Sequence[float | None], better: int) -> int | None:
    """Index of the best value (better 1: the highest, -1: the lowest), the last among equals; None without values."""
    known = [i for i, value in enumerate(values) if value is not None]
    return max(known, key=lambda i: (better * (values[i] or 0.0), i)) if known else None


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are there."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
