"""What is in a bank, from bank.json and the sidecars alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.bank.card import licence_of, origin_line
from synthkit.bank.labels.sets import summaries
from synthkit.bank.seal import read_manifest, root_hash

if TYPE_CHECKING:
    from synthkit.bank.reader import Bank


def info(bank: Bank) -> dict[str, Any]:
    """Identity, size, class balance, difficulty, agreement and provenance of `bank` as plain data."""
    spec, sidecars = bank.spec, bank.sidecars
    weights = np.array([s.n for s in sidecars], dtype=float)

    def mean(key: str) -> float | None:
        values = [s.raw.get(key) for s in sidecars]
        if not values or any(v is None for v in values):
            return None
        return float(np.average(np.array(values, dtype=float), weights=weights))

    def span(key: str) -> list[float] | None:
        values = [s.raw.get(key) for s in sidecars]
        if not values or any(v is None for v in values):
            return None
        pairs = np.array(values)
        return [pairs[:, 0].min().item(), pairs[:, 1].max().item()]

    histograms = [s.raw["label_histogram"] for s in sidecars if "label_histogram" in s.raw]
    counts = np.sum(histograms, axis=0).tolist() if histograms and len(histograms) == len(sidecars) else None
    seconds = [float(s.raw["seconds"]) for s in sidecars if "seconds" in s.raw]
    return {
        "path": str(bank.path), "uuid": bank.record["uuid"], "schema": bank.record["schema"],
        "created": bank.record.get("created"), "complete": bank.complete,
        "sealed": read_manifest(bank.path, spec) is not None,
        "root": root_hash(sidecars) if bank.complete else None,
        "images": len(bank), "images_planned": spec.images, "shape": list(spec.shape),
        "num_classes": spec.num_classes, "class_names": spec.class_names, "mean": spec.mean, "std": spec.std,
        "shards": len(sidecars), "shards_planned": spec.shards, "images_per_shard": spec.images_per_shard,
        "bytes": sum(s.bytes for s in sidecars), "columns": bank.columns, "label_kind": spec.label_kind,
        "label_histogram": counts, "balance": balance(counts),
        "top_k": spec.top_k, "transform": spec.transform or None, "label_sets": bank.label_sets(),
        "label_set_facts": summaries(bank),
        "mean_difficulty": mean("mean_difficulty"), "difficulty_range": span("difficulty_range"),
        "difficulty_by_shard": [s.raw.get("mean_difficulty") for s in sidecars],
        "difficulty_by_tenth": tenths([(s.n, s.raw.get("mean_difficulty")) for s in sidecars]),
        "mean_confidence": mean("mean_confidence"), "teacher_agreement": mean("teacher_agreement"),
        "step_range": span("step_range"), "seconds": round(sum(seconds), 1) if seconds else None,
        "generators": sum(1 for _ in (bank.path / "generators").glob("*.json")),
        "teacher": spec.teacher, "recipe": spec.recipe, "recipe_hash": bank.record.get("recipe_hash"),
        "seed": spec.seed, "real_data_used": spec.real_data_used, "contains_real": spec.contains_real,
        "origin": origin_line(spec), "licence": licence_of(spec), "parents": spec.parents,
        "versions": bank.record.get("versions"),
        "hardware": bank.record.get("hardware"), "extra": spec.extra,
    }  # fmt: skip


def balance(counts: list[int] | None) -> float | None:
    """Entropy of the class histogram over that of a uniform one: 1 is even, 0 is a single class."""
    if not counts or len(counts) < 2 or not sum(counts):
        return None
    share = np.array(counts, dtype=float) / sum(counts)
    share = share[share > 0]
    return round(float(-(share * np.log(share)).sum() / np.log(len(counts))) + 0.0, 4)


def tenths(parts: list[tuple[int, float | None]]) -> list[float] | None:
    """Mean of each tenth of the bank in stored order, from (images, mean) of its shards; fewer from under ten shards.

    Shards are not divided: a tenth is a tenth of the shards. None where a mean is missing.
    """
    if not parts or any(value is None for _, value in parts):
        return None
    found = []
    for group in np.array_split(np.arange(len(parts)), min(10, len(parts))):
        chosen = [parts[i] for i in group]
        found.append(sum(n * float(v or 0) for n, v in chosen) / sum(n for n, _ in chosen))
    return found
