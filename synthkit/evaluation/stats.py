"""`bank stats`: how diverse a bank is, and how near to real images, always beside two controls of equal size."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.bank.card import origin_line
from synthkit.errors import BankError, DataError, UsageError
from synthkit.evaluation.features import FeatureSource, Images, features, sample
from synthkit.evaluation.metrics import unique_names
from synthkit.evaluation.set_metrics import diversity, frechet_distance, manifold_metrics

if TYPE_CHECKING:
    from synthkit.bank import Bank
    from synthkit.data.real import RealData

MEANINGS = {
    "bank": "this bank",
    "real": "other real images (the best that can be had)",
    "noise": "uniform noise (no knowledge)",
}


def bank_stats(
    bank: Bank, source: FeatureSource, *, real: RealData | None = None, limit: int = 10_000, k: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Diversity of a bank, and with real data its distance to them.

    Real data are split at random into a reference and a control of equal size. The bank, that control (other real
    images) and noise are each held against the reference, with equal numbers of images: n = min(limit, images of the
    bank, half of the real images).

    Args:
        source: the feature space.
        limit: images at most; a random sample is taken from larger sets.
        k: neighbour that sets the radius of precision, recall, density and coverage.

    Returns:
        JSON-able values: `bank`, `features` (the space), `diversity` (all and `per_class`), `real` (the same of the
        real images, or None), `against_real` ({"n", "k", "bank", "real", "noise"}; the Frechet distance is called
        `fd_teacher` or `fd_pixels` after the space), `notes`, `seconds`.

    Raises:
        BankError: no shard is committed. DataError: too few images for k. UsageError: a number is out of range.
    """
    began = time.monotonic()
    if limit < 2 or k < 1:
        raise UsageError("stats: limit must be at least 2 and k at least 1", got=(limit, k))
    if not len(bank):
        raise BankError(f"{bank.path}: no shard is committed yet", hint="go on with: synthkit synthesize --resume")
    images = Images.of_bank(bank)
    rows = sample(len(images), limit, seed)
    found = features(source, images, rows)
    notes = [] if len(rows) == len(images) else [f"a random sample of {len(rows):,} of the {len(images):,} images"]
    spec = bank.spec
    result: dict[str, Any] = {
        "what": "bank stats",
        "bank": {"path": str(bank.path), "uuid": bank.record["uuid"], "images": len(bank),
                 "contains_real": spec.contains_real, "origin": origin_line(spec)},
        "features": source.record(), "seed": seed,
        "diversity": _diversity(found, None if images.labels is None else images.labels[rows], bank.class_names),
        "real": None, "against_real": None,
    }  # fmt: skip
    if real is not None:
        control = Images.of_data(real)
        chosen = sample(len(control), len(rows), seed)
        values = features(source, control, chosen)
        labels = None if control.labels is None else control.labels[chosen]
        result["real"] = {"name": real.name, "split": real.split, "images": len(real), "labels": real.label_source,
                          "diversity": _diversity(values, labels, real.class_names)}  # fmt: skip
        if len(chosen) < len(rows):
            notes.append(f"diversity of {len(chosen):,} real and {len(rows):,} bank images: nearest distances grow "
                         "where there are fewer images")  # fmt: skip
        result["against_real"] = _against(found, control, source, k, seed)
        notes += real.notes
    return result | {"notes": notes, "seconds": round(time.monotonic() - began, 2)}


def _diversity(values: np.ndarray, labels: np.ndarray | None, names: list[str]) -> dict[str, Any]:
    found = {**diversity(values), "per_class": None}
    if labels is not None:
        table = {name: diversity(values[labels == i]) for i, name in enumerate(unique_names(names))}
        found["per_class"] = {name: row for name, row in table.items() if row["n"]}
    return found


def _against(made: np.ndarray, real: Images, source: FeatureSource, k: int, seed: int) -> dict[str, Any]:
    n = min(len(made), len(real) // 2)
    if n <= k:
        raise DataError(f"stats: more than {k} images are needed in the bank and in each half of the real data",
                        got=f"{len(made)} and {len(real)}", hint="give more data, or a smaller --k")  # fmt: skip
    order = np.random.default_rng([seed, 0x68616C66]).permutation(len(real))
    reference, other = (features(source, real, np.sort(order[i * n : (i + 1) * n])) for i in (0, 1))
    noise = features(source, Images.noise(n, real.shape, seed))
    name = f"fd_{source.kind}"
    table: dict[str, Any] = {"n": n, "k": k}
    for key, values in (("bank", made[sample(len(made), n, seed)]), ("real", other), ("noise", noise)):
        table[key] = {name: frechet_distance(reference, values), **manifold_metrics(reference, values, k)}
    return table


def stats_lines(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    bank, own, real = result["bank"], result["diversity"], result["real"]
    lines = [f"{bank['path']}: {bank['images']:,} images. {bank['origin']}",
             f"  features    {result['features']['name']}", "",
             f"  diversity   {'n':>7} {'pairwise':>9} {'nearest':>9} {'1 %':>9} {'Vendi':>8}  identical"]  # fmt: skip
    lines.append(_row("bank", own))
    lines += [_row("real", real["diversity"])] if real else []
    for name, row in list((own["per_class"] or {}).items())[:20]:
        lines.append(_row(f"  {name}"[:11], row))
    if len(own["per_class"] or {}) > 20:
        lines.append(f"  ... {len(own['per_class'])} classes; --json lists all")
    lines += ["", "  pairwise: mean distance of all pairs; nearest: median distance to the nearest other image;",
              "  1 %: its 1st percentile; Vendi: effective number of images (1 is all alike)"]  # fmt: skip
    table = result["against_real"]
    if table:
        fd = next(key for key in table["bank"] if key.startswith("fd_"))
        what = f"{real['name']} ({real['split']})"
        head = f"against {table['n']:,} real images of {what}, all sets of that size; k = {table['k']}"
        lines += ["", f"  {head}", f"  {'':11} {fd:>10} {'precision':>9} {'recall':>9} {'density':>9} {'coverage':>9}"]
        for key in ("bank", "real", "noise"):
            row = table[key]
            figures = " ".join(f"{row[m]:>9.3f}" for m in ("precision", "recall", "density", "coverage"))
            lines.append(f"  {key:<11} {row[fd]:>10.4g} {figures}  {MEANINGS[key]}")
        lines.append(f"  {fd} is a Frechet distance in the space named above; it is no FID and has no scale of its own")
    return lines + [f"  note: {note}" for note in result["notes"]]


def _row(name: str, row: dict[str, Any]) -> str:
    figures = [row[key] for key in ("mean_pairwise", "nearest_median", "nearest_p01", "vendi")]
    widths = (9, 9, 9, 8)
    shown = " ".join(f"{'-' if v is None else format(v, '.4g'):>{w}}" for v, w in zip(figures, widths, strict=True))
    return f"  {name:<11} {row['n']:>7,} {shown}  {row['identical']:,}"
