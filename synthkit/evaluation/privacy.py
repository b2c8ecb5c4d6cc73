"""`bank audit`: does a bank hold copies of the real images behind it? What was measured, beside what chance gives.

Three questions, in falling order of certainty. Exact copies: pixels that equal a training image, also mirrored or moved
by up to two pixels (`copies`). Near copies: images that lie nearer to one training image than hold-out images of the
same distribution do, both in distance and in distance over that to the next ten neighbours. (The second condition
keeps typical images out: they are near to many real images, a copy is near to one.) Membership: is the nearest real
image a training image, rather than a hold-out image, more often than the sizes of the two sets give? None of this is a
proof of privacy.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.bank.card import origin_line
from synthkit.errors import BankError, DataError, UsageError
from synthkit.evaluation.copies import KINDS, Copies, find_copies
from synthkit.evaluation.features import FeatureSource, Images, features, sample
from synthkit.evaluation.neighbours import Neighbours, nearest
from synthkit.evaluation.set_metrics import far_out_fence

if TYPE_CHECKING:
    from synthkit.bank import Bank
    from synthkit.data.real import RealData

OTHERS = 10  # neighbours behind the nearest that a near copy is compared with
FEWEST = 20  # real images that an interval needs
LEVEL = 0.999  # what chance stays below with this probability is chance
LISTED = 60


def audit(
    bank: Bank, train: RealData, holdout: RealData | None, spaces: list[FeatureSource], *, limit: int = 10_000,
    percentile: float = 1.0, replicates: int = 2000, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Look for traces of `train` in `bank`.

    Args:
        train: the real images that the bank (or its teacher) was made from; all are compared.
        holdout: real images of the same distribution that took no part. None: thresholds come from the distances among
            the training images themselves, and membership is not measured (it needs images that took no part).
        spaces: where distances are measured.
        limit: bank and hold-out images at most for distances (random samples); copies are looked for in all.
        percentile: of the hold-out's distances, below which an image is a near copy.
        replicates: random labellings and resamples behind p-value and interval of membership.

    Returns:
        JSON-able values: `bank`, `train`, `holdout`, `copies`, `spaces` (one entry per space: see `_space`),
        `verdict` ({"level", "text"}), `notes`, `seconds`.

    Raises:
        BankError: no shard is committed. DataError: too few real images, or others than the bank's size.
        UsageError: a number is out of range.
    """
    began = time.monotonic()
    if not 0 < percentile <= 50 or limit < 1 or replicates < 1000:
        raise UsageError("audit: percentile must be above 0 to 50, limit at least 1, replicates 1000",
                         got=(percentile, limit, replicates))  # fmt: skip
    if not len(bank):
        raise BankError(f"{bank.path}: no shard is committed yet", hint="go on with: synthkit synthesize --resume")
    made, real = Images.of_bank(bank), Images.of_data(train)
    for images in (train, *([holdout] if holdout else [])):
        if images.shape != bank.shape:
            raise DataError(f"{images.name}: images are {images.shape}, the bank's {bank.shape}",
                            hint="load them with size=bank.shape")  # fmt: skip
    if len(real) < OTHERS + 2:
        raise DataError(f"audit: at least {OTHERS + 2} training images are needed", got=len(real))
    notes = [*train.notes, *_said(bank, train)]
    copied = find_copies(made, real)
    held, shared = _clean_holdout(holdout, real, notes)
    leaked = len(find_copies(made, held, max_shift=0, mirror=False).rows) if held else None
    if leaked:
        notes.append(f"{leaked:,} bank images equal hold-out images: it took part, so membership means little")
    rows = sample(len(made), limit, seed)
    result: dict[str, Any] = {
        "what": "bank audit",
        "bank": {"path": str(bank.path), "uuid": bank.record["uuid"], "images": len(bank), "compared": len(rows),
                 "contains_real": bank.spec.contains_real, "origin": origin_line(bank.spec)},
        "train": _about(train), "seed": seed, "percentile": percentile,
        "holdout": None if held is None or holdout is None else
        _about(holdout) | {"used": len(held), "equal_to_training": shared, "in_bank": leaked},
        "copies": {"found": len(copied.rows), **copied.counts(), "one_colour": copied.blank,
                   "shift": copied.shift, "searched": len(made)},
        "spaces": [_space(s, made, rows, real, held, copied, limit, percentile, replicates, seed) for s in spaces],
    }  # fmt: skip
    for space in result["spaces"]:
        member = space["membership"]
        if member is not None and member["p"] >= LEVEL:
            notes.append(f"in {space['features']['name']} the bank is nearer to the hold-out than chance: the hold-out "
                         "is not quite of the training images' distribution, which can hide a weak signal")  # fmt: skip
    result["pairs"] = _pairs(result["spaces"], copied)
    result["verdict"] = verdict(result)
    return result | {"notes": notes, "seconds": round(time.monotonic() - began, 2)}


def _said(bank: Bank, train: RealData) -> list[str]:
    """What a reader must know about the two sides."""
    said = []
    if not bank.complete:
        said.append(f"the bank is unfinished: {len(bank):,} of {bank.spec.images:,} images were looked at")
    if tuple(train.stored_shape or bank.shape) != bank.shape:
        said.append(f"the real images were resized from {tuple(train.stored_shape or ())} to {bank.shape} by "
                    "synthkit's rule; copies that another program resized are at best near copies")  # fmt: skip
    return said


def _about(data: RealData) -> dict[str, Any]:
    return {"name": data.name, "split": data.split, "images": len(data), "labels": data.label_source,
            "stored_shape": list(data.stored_shape or data.shape)}  # fmt: skip


def _clean_holdout(holdout: RealData | None, real: Images, notes: list[str]) -> tuple[Images | None, int]:
    """The hold-out without images that are also training images; raises `DataError` when too few are left."""
    if holdout is None:
        notes.append("no hold-out: thresholds come from the training images' distances to one another, and whether the "
                     "bank is nearer to training than to other images was not measured (give --holdout)")  # fmt: skip
        return None, 0
    images = Images.of_data(holdout)
    twice = find_copies(images, real, max_shift=0, mirror=False).rows
    left = np.setdiff1d(np.arange(len(images)), twice)
    if len(left) < OTHERS + 2:
        raise DataError(f"audit: of {len(images):,} hold-out images {len(twice):,} are also training images",
                        hint="give a hold-out that took no part in training")  # fmt: skip
    if len(twice):
        notes.append(f"{len(twice):,} hold-out images are also training images; they were left out of the hold-out")
    return Images(images.name, images.shape, lambda i: images.rows(left[i]), len(left), None, True), len(twice)


def _space(
    source: FeatureSource, made: Images, rows: np.ndarray, real: Images, held: Images | None, copied: Copies,
    limit: int, percentile: float, replicates: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Near copies and membership in one space.

    Returns:
        `features`; `bank` and `reference` distances to the nearest training image (quantiles); `threshold` and
        `ratio_threshold`; `near` (see `_near`); `membership` (see `_membership`, or None); `closest` [[row, training
        row, distance, near]].
    """
    base, queries = features(source, real), features(source, made, rows)
    to_train = nearest(base, queries, k=OTHERS + 1)
    if held is None:
        own = sample(len(real), limit, seed)
        reference = nearest_others(base, own, OTHERS + 1)
        outside = None
    else:
        outside = features(source, held, sample(len(held), limit, seed))
        reference = nearest(base, outside, k=OTHERS + 1)
    known = np.isin(rows, copied.rows)
    near, found = _near(to_train, reference, known, percentile)
    order = np.lexsort((to_train.distances[:, 0], ~near))  # near ones first; exact copies are listed apart
    order = order[~known[order]][:LISTED]
    listed = zip(rows[order], to_train.indices[order, 0], to_train.distances[order, 0], near[order], strict=True)
    closest = [[int(row), int(other), float(distance), bool(flag)] for row, other, distance, flag in listed]
    member = None
    if outside is not None:
        member = _membership(to_train, nearest(outside, queries), (len(base), len(outside)), replicates, seed)
    return {
        "features": source.record(), "bank": _quantiles(to_train.distances[:, 0]),
        "reference": _quantiles(reference.distances[:, 0]), "reference_images": len(reference.distances),
        "reference_is": "hold-out images" if held else "training images among themselves", "near": found,
        "membership": member, "closest": closest,
    }  # fmt: skip


def _near(
    made: Neighbours, reference: Neighbours, known: np.ndarray, percentile: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """Which images are near copies, and whether there are more than chance gives.

    A near copy is below the percentile of the reference both in distance and in ratio. The reference images that are so
    themselves tell what chance gives (`chance_limit`). One image is enough where it lies at less than half the distance
    of the nearest of all reference images and below their outer fence (`far_out_fence`).

    Returns:
        bool (Q,); and `threshold`, `ratio_threshold`, `count` (without the `known` copies), `reference` (how many
        reference images are so), `expected` and `limit` (99.9 %) of chance, `closer_below` and `closer` (how many lie
        below that), `found`.
    """
    gap, ratio = reference.distances[:, 0], _ratio(reference)
    place = max(1, math.ceil(percentile / 100 * len(gap)))
    threshold, ratio_threshold = (float(np.partition(v, place - 1)[place - 1]) for v in (gap, ratio))
    gaps = made.distances[:, 0]
    near = (gaps < threshold) & (_ratio(made) < ratio_threshold) & ~known
    usual, count = int(((gap < threshold) & (ratio < ratio_threshold)).sum()), int(near.sum())
    limit = chance_limit(len(gaps), len(gap), usual + 1)
    below = min(far_out_fence(gap) or 0.0, float(gap.min()) / 2)
    closer = int((near & (gaps < below)).sum())
    return near, {
        "threshold": threshold, "ratio_threshold": ratio_threshold, "count": count, "reference": usual,
        "expected": len(gaps) * usual / len(gap), "limit": limit, "closer_below": below, "closer": closer,
        "found": count > limit or closer > 0,
    }  # fmt: skip


def nearest_others(base: np.ndarray, rows: np.ndarray, k: int) -> Neighbours:
    """The `k` nearest other rows of `base` for its rows `rows`."""
    found = nearest(base, base[rows], k=k + 1)
    own = found.indices == rows[:, None]
    own[~own.any(axis=1), -1] = True  # more than k equal vectors: any one of them stands for itself
    shape = (len(rows), k)
    return Neighbours(found.distances[~own].reshape(shape), found.indices[~own].reshape(shape))


def _ratio(found: Neighbours) -> np.ndarray:
    """Distance to the nearest over the mean distance to the next ones (Q,); 1 where all are 0."""
    others = found.distances[:, 1:].mean(axis=1)
    return np.divide(found.distances[:, 0], others, out=np.ones(len(others)), where=others > 0)


def _quantiles(values: np.ndarray) -> dict[str, float]:
    names = {"min": 0.0, "p01": 0.01, "p10": 0.1, "median": 0.5, "p90": 0.9}
    return {name: float(np.quantile(values, q)) for name, q in names.items()}


def chance_limit(n: int, m: int, place: int, level: float = LEVEL) -> int:
    """The count that chance exceeds with probability 1 - level at most.

    How many of `n` values fall below the `place`-th smallest of `m` values from the same distribution: whatever that
    distribution is, the count is beta-binomial with n trials and parameters (place, m + 1 - place). For a region that
    holds c of the m values, place is c + 1.
    """
    a, b = place, m + 1 - place

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    total = 0.0
    for count in range(n + 1):
        choose = -math.log(n + 1) - log_beta(n - count + 1, count + 1)
        total += math.exp(choose + log_beta(count + a, n - count + b) - log_beta(a, b))
        if total >= level:
            return count
    return n


def _membership(
    to_train: Neighbours, to_held: Neighbours, sizes: tuple[int, int], replicates: int, seed: int
) -> dict[str, Any]:  # fmt: skip
    """How often the nearest real image of a bank image is a training image, as if both sets were equally large.

    The larger set holds more of the nearest images by its size alone: by chance the share is N / (N + M). The AUC takes
    the sizes out of the odds: `auc / (1 - auc) = share / (1 - share) * M / N`; for N = M it is the share itself.
    (Taking a sample of the larger set instead would hide the copies of the images left out.)

    Many bank images may have one nearest real image; chance deals in real images, not in bank images. So the p-value
    gives every real image a label at random, training with probability N / (N + M), and the interval resamples the real
    images, each with all bank images that are nearest to it.

    Returns:
        `auc` (0.5: no signal); `low`, `high`: 95 % interval, None below 20 real images; `p`: how often random labels
        reach this share; `share` and `by_chance`; `n` bank images; `train` and `holdout`: N and M; `nearest`: real
        images that are nearest to any.
    """
    rng = np.random.default_rng([seed, 0x626F6F74])
    gaps, others = to_train.distances[:, 0], to_held.distances[:, 0]
    is_train = (gaps < others) | ((gaps == others) & (rng.random(len(gaps)) < 0.5))
    who = np.where(is_train, to_train.indices[:, 0], sizes[0] + to_held.indices[:, 0])
    real, weights = np.unique(who, return_counts=True)
    inside, chance = real < sizes[0], sizes[0] / sum(sizes)
    random, again = np.empty(replicates), np.empty(replicates)
    for i in range(replicates):
        random[i] = weights @ (rng.random(len(real)) < chance)
        chosen = rng.integers(0, len(real), len(real))
        again[i] = weights[chosen] @ inside[chosen] / weights[chosen].sum()

    def auc(share: float) -> float:
        train, held = share / sizes[0], (1 - share) / sizes[1]
        return float(train / (train + held))

    low, high = (auc(v) for v in np.quantile(again, [0.025, 0.975])) if len(real) >= FEWEST else (None, None)
    reached = int((random >= weights @ inside).sum())
    return {"auc": auc(is_train.mean()), "low": low, "high": high, "p": (1 + reached) / (1 + replicates),
            "share": float(is_train.mean()), "by_chance": chance, "n": len(gaps), "train": sizes[0],
            "holdout": sizes[1], "nearest": len(real), "replicates": replicates}  # fmt: skip


def _pairs(spaces: list[dict[str, Any]], copied: Copies) -> list[dict[str, Any]]:
    """The pairs worth looking at: copies, then what each space calls near, then the closest of the first space."""
    pairs: dict[int, dict[str, Any]] = {}
    for row, source, kind in zip(copied.rows.tolist(), copied.sources.tolist(), copied.kinds.tolist(), strict=True):
        if len(pairs) < LISTED // 2:  # room for the others
            pairs[row] = {"row": row, "train": source, "kind": KINDS[kind], "distance": None, "features": None}
    for wanted in (True, False):
        for space in spaces if wanted else spaces[:1]:
            for row, source, distance, near in space["closest"]:
                room = LISTED - (LISTED // 6 if wanted else 0)
                if near == wanted and row not in pairs and len(pairs) < room:
                    pairs[row] = {"row": row, "train": source, "kind": "near" if near else "closest",
                                  "distance": distance, "features": space["features"]["kind"]}  # fmt: skip
    return list(pairs.values())


def verdict(result: dict[str, Any]) -> dict[str, str]:
    """The finding in words: never more than was measured.

    Returns:
        `level`: "real images", "near copies", "nearer to training" or "nothing found"; `text`.
    """
    bank, copies = result["bank"], result["copies"]
    said = []
    level = "nothing found"
    for space in result["spaces"]:
        member = space["membership"]
        if member is not None and member["p"] <= 1 - LEVEL:
            level = "nearer to training"
            said.append(f"The images are nearer to training images than to hold-out images more often than chance "
                        f"(AUC {member['auc']:.3f}, p {member['p']:.2g}, in {space['features']['name']}).")  # fmt: skip
    for space in result["spaces"]:
        near = space["near"]
        if near["found"]:
            level = "near copies"
            why = f"chance gives about {near['expected']:.1f}, rarely more than {near['limit']:,}"
            if near["closer"]:
                others = f"any of {space['reference_images']:,} {space['reference_is']}"
                why += f"; {near['closer']:,} lie at less than half the distance of {others}"
            said.insert(0, f"NEAR COPIES FOUND: {near['count']:,} of {bank['compared']:,} images lie unusually near to "
                        f"one training image in {space['features']['name']} ({why}).")  # fmt: skip
    if copies["found"]:
        level = "real images"
        kinds = ", ".join(f"{copies[kind]:,} {kind}" for kind in KINDS if copies[kind])
        said.insert(0, f"CONTAINS REAL IMAGES: {copies['found']:,} of {copies['searched']:,} images are training "
                    f"images ({kinds}).")  # fmt: skip
    if bank["contains_real"]:
        nothing = "" if copies["found"] else " None of its images was found to be one of the training images given."
        said.insert(0, f"By its own record this bank contains real pixels.{nothing}")
    if level == "nothing found":
        said.append(f"No evidence of copying was found among {copies['searched']:,} images: no exact, mirrored or "
                    "shifted copy, and no more near ones than chance gives.")  # fmt: skip
        if all(space["membership"] is None for space in result["spaces"]):
            said.append("Membership was not measured (no hold-out).")
    said.append("This is no privacy guarantee: only these images, these distances and these real data were looked at.")
    return {"level": level, "text": " ".join(said)}
