"""Teacher logits as the k largest and the mass of the rest: 4 k + 4 bytes instead of 2 K (6 k + 4 from 65,537 classes).

What is kept is exactly the fp16 record that a dense column would hold: the k largest fp16 logits, and the logsumexp of
all others. At temperature 1 the probabilities of the k classes are therefore those of the dense record; the mass of
the tail is spread evenly over its K - k classes ("marginal smoothing" of szq0214/FKD, there on probabilities).

At another temperature T the tail has not the right mass: of all tails with one logsumexp the even one is the heaviest
for T > 1 and the lightest for T < 1 (Jensen). The error is small where the tail holds little, and is not small at the
T = 20 of SRe2L: see `tail_error`, which measures it, and tests/bank/test_topk.py, which holds it to numbers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from synthkit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", np.ndarray, "Tensor")


def compress_topk(logits: Array, k: int) -> tuple[Array, Array, Array]:
    """The k largest logits of every row and the mass of the rest.

    Args:
        logits: (N, K) numbers, numpy or torch; they are rounded to fp16 first, so that compressing a dense fp16 record
            gives the same as compressing what it was made from.
        k: 1 to K - 1.

    Returns:
        index (N, k) int64, by falling logit (of equal ones the lower class first); logit (N, k) float16;
        tail_logsumexp (N,) float32 of the K - k others. Same library and device as `logits`.

    Raises:
        UsageError: logits are not (N, K), or k leaves no tail.
    """
    if logits.ndim != 2:
        raise UsageError("top-k: logits must be (N, K)", got=tuple(logits.shape))
    classes = logits.shape[1]
    if not 1 <= k < classes:
        raise UsageError(f"top-k: k must be 1 to {classes - 1}", got=k, hint="keep the dense logits instead")
    if isinstance(logits, np.ndarray):
        with np.errstate(over="ignore"):  # an overflow becomes inf, which the writer refuses
            half = logits.astype(np.float16)
        values = half.astype(np.float32)
        index = np.argsort(-values, axis=1, kind="stable")[:, :k]
        rest = values.copy()
        np.put_along_axis(rest, index, -np.inf, axis=1)
        peak = rest.max(axis=1, keepdims=True)
        tail = peak[:, 0] + np.log(np.exp(rest - peak).sum(axis=1))
        return index, np.take_along_axis(half, index, axis=1), tail.astype(np.float32)
    half = logits.detach().half()
    values = half.float()
    index = values.neg().argsort(dim=1, stable=True)[:, :k]
    tail = values.scatter(1, index, -math.inf).logsumexp(dim=1)
    return index, half.gather(1, index), tail


def expand_topk(index: Array, logit: Array, tail_logsumexp: Array, num_classes: int) -> Array:
    """Dense logits (N, K) float32 of a top-k record: the tail's classes share its mass evenly.

    Args:
        index: (N, k) integers from 0 to K - 1, no repeats within a row (the reader checks the range).
        logit: (N, k) numbers. tail_logsumexp: (N,). All numpy or all torch.
        num_classes: K.
    """
    spread = math.log(num_classes - index.shape[1])
    if isinstance(index, np.ndarray):
        kept = np.asarray(logit).astype(np.float32)
        # The even share cannot exceed the smallest kept logit; rounding must not let it either (top-1 would move).
        fill = np.minimum(np.asarray(tail_logsumexp).astype(np.float32) - np.float32(spread), kept.min(axis=1))
        dense = np.repeat(fill[:, None], num_classes, axis=1)
        np.put_along_axis(dense, index.astype(np.int64), kept, axis=1)
        return dense
    assert not isinstance(logit, np.ndarray) and not isinstance(tail_logsumexp, np.ndarray)  # all of one library
    kept = logit.float()
    fill = (tail_logsumexp.float() - spread).minimum(kept.amin(dim=1))
    return fill[:, None].repeat(1, num_classes).scatter_(1, index.long(), kept)


def tail_error(logits: np.ndarray, k: int, temperature: float) -> float:
    """Mean total variation between softmax(x / T) of `logits` (N, K) and of their top-k record: what k costs at T."""
    dense = np.asarray(logits).astype(np.float16).astype(np.float64)
    kept = expand_topk(*compress_topk(np.asarray(logits), k), dense.shape[1]).astype(np.float64)

    def softmax(x: np.ndarray) -> np.ndarray:
        odds = np.exp((x - x.max(axis=1, keepdims=True)) / temperature)
        return odds / odds.sum(axis=1, keepdims=True)

    return float(np.abs(softmax(dense) - softmax(kept)).sum(axis=1).mean() / 2)
