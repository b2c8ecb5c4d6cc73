"""`synthkit bank ls`: the shards of a bank, or the banks in a folder."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from synthkit.cli.arguments import Arguments, print_json
from synthkit.cli.bank.common import clean
from synthkit.errors import UsageError


def configure(parser: Arguments) -> None:
    """Add the options."""
    parser.add_argument("bank", metavar="DIR", nargs="?", default="banks", help="a bank, or a folder of banks (banks)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    """List shards, or banks."""
    from synthkit.bank import Bank
    from synthkit.bank.card import REAL_LABEL

    root = Path(args.bank)
    if (root / "bank.json").exists():
        bank = Bank(root)
        rows = [{"shard": s.index, "n": s.n, "bytes": s.bytes, "sha256": s.sha256,
                 **{k: s.raw.get(k) for k in ("mean_difficulty", "teacher_agreement", "step_range", "seconds")}}
                for s in bank.sidecars]  # fmt: skip
        if args.json:
            print_json(rows)
            return 0
        if bank.spec.contains_real:
            print(f"{clean(bank.path)}: {REAL_LABEL}")
        print(f"{'shard':>5} {'images':>8} {'MB':>8} {'difficulty':>10} {'agreement':>9} {'steps':>17}  sha256")
        for r in rows:
            steps = "-" if not r["step_range"] else "{}-{}".format(*r["step_range"])
            print(f"{r['shard']:>5} {r['n']:>8,} {r['bytes'] / 1e6:>8.1f} {_or_dash(r['mean_difficulty']):>10}"
                  f" {_or_dash(r['teacher_agreement']):>9} {steps:>17}  {r['sha256'][:16]}")  # fmt: skip
        if not bank.complete:
            print(f"{bank.spec.shards - len(rows)} of {bank.spec.shards} shards are still to be made")
        return 0
    found = sorted(p.parent for p in root.glob("*/bank.json"))
    if not found:
        raise UsageError(f"{root}: neither a bank nor a folder of banks", hint="synthkit bank ls DIR")
    banks = [Bank(p) for p in found]
    if args.json:
        print_json([b.info() for b in banks])
        return 0
    for bank in banks:
        shape = "x".join(map(str, bank.shape))
        state = "complete" if bank.complete else f"unfinished, {len(bank.sidecars)} of {bank.spec.shards} shards"
        real = f"  {REAL_LABEL}" if bank.spec.contains_real else ""
        print(f"{clean(bank.path)}  {len(bank):,} images {shape}  {bank.num_classes} classes  {state}{real}")
    return 0


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
