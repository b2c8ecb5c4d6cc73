"""`synthkit bench mixture`: which share of freshly generated images trains the best student from a bank.

The same student, steps and seeds for every share of `--fresh`; 0 reads the stored bank only, 1 draws every image from
the bank's generator snapshots. Last epoch, mean and sample std. The bank's own held-out agreement stands beside the
accuracy, because a data-free user has only that.
"""

from __future__ import annotations

import json
from pathlib import Path

from synthkit.bench.pipeline import spread
from synthkit.cli.arguments import Arguments
from synthkit.config.parse import config_to_dict, load_recipe
from synthkit.errors import ConfigError
from synthkit.runtime import hardware, versions, write_json


def main(argv: list[str]) -> int:
    """Parse, run, print JSON."""
    parser = Arguments(prog="synthkit bench mixture", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bank", nargs="+", required=True, help="banks, each with generator snapshots")
    parser.add_argument("--distill", required=True, help="recipe of the student")
    parser.add_argument("--eval-data", required=True, help="labelled data spec; measured at the end only")
    parser.add_argument("--fresh", default="0,0.25,0.5,0.75,1", help="comma-separated shares")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps instead of the recipe's")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs (resumed when it exists)")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse(argv)
    try:
        shares = [float(s) for s in args.fresh.split(",")]
    except ValueError as error:
        raise ConfigError("--fresh: numbers separated by commas", got=args.fresh) from error
    result = mixture(args, shares)
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def mixture(args, shares: list[float]) -> dict[str, object]:
    """One student for every share and bank (the bank's position is the seed)."""
    from synthkit.distillation.distill import distill

    rows = []
    config = None
    for share in shares:
        found = []
        for seed, bank in enumerate(args.bank):
            config = load_recipe(
                args.distill,
                {
                    "bank": bank,
                    "fresh": share,
                    "seed": seed,
                    "eval_data": args.eval_data,
                    "out": str(args.work / f"fresh{share:g}-seed{seed}"),
                    "resume": True,
                    **({"steps": args.steps} if args.steps else {}),
                    **({"runtime": {"threads": args.threads}} if args.threads else {}),
                },
            )
            found.append(distill(config).metrics)
        rows.append(
            {
                "fresh": share,
                "top1": spread([f["top1"] for f in found]),
                "holdout_agreement": spread([f["holdout_agreement"] for f in found]),
            }
        )
    best = max(rows, key=lambda row: row["top1"]["mean"])
    return {
        "what": "share of every batch drawn from the bank's generator snapshots; last epoch; one bank per seed",
        "banks": list(args.bank),
        "eval_data": args.eval_data,
        "rows": rows,
        "best_fresh": best["fresh"],
        "distill": config and config_to_dict(config),
        "versions": versions(),
        "hardware": hardware(),
    }
