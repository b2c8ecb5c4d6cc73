"""`synthkit bench matching`: distilled banks of MNIST made and judged beside random real images of the same number.

Each part synthesizes the bank of a shipped recipe and trains fresh networks on it, and on an equal-size random-real
control, under the method's published protocol. The last epoch counts. What is finished in --work is not done again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from synthkit.cli.arguments import Arguments
from synthkit.config.parse import config_to_dict, load_recipe
from synthkit.errors import ConfigError
from synthkit.runtime import RunDir, Runtime, hardware, peak_memory, versions, write_json

PARTS: dict[str, tuple[str, str]] = {
    "dc": ("mnist/dc-w32-ipc1", "dc"),
    "mtt": ("mnist/mtt-w32-ipc1", "mtt"),
    "datm": ("mnist/datm-w32-ipc10", "datm"),
}
"""Part -> (recipe, protocol of the evaluation)."""


def main(argv: list[str]) -> int:
    """Parse, run, print JSON."""
    parser = Arguments(prog="synthkit bench matching", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="data spec, such as mnist:DIR")
    parser.add_argument("--parts", default="dc,mtt", help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--nets", type=int, default=3, help="networks trained on each bank and each control")
    parser.add_argument("--iterations", type=int, default=None, help="outer iterations instead of the recipes'")
    parser.add_argument("--epochs", type=int, default=None, help="epochs of the evaluation instead of the protocol's")
    parser.add_argument("--seed", type=int, default=0, help="of banks, networks and controls")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--work", type=Path, required=True, help="folder for banks and results (resumed)")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse(argv)
    names = args.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise ConfigError("bench matching: --parts: no such part", got=unknown[0], allowed=PARTS)
    parts = {}
    for name in names:
        parts[name] = measure(name, args)
        write_json(args.work / "parts.json", parts)
    result = {
        "what": "last-epoch accuracy of fresh networks trained on a distilled bank, and on random real images",
        "data": args.data.partition(":")[0],
        "seed": args.seed,
        "parts": parts,
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "hardware": hardware(),
    }
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def measure(name: str, args: Any) -> dict[str, Any]:
    """Bank, networks and control of one part; read from --work where it is finished."""
    from synthkit.evaluation.bank_protocol import evaluate_bank
    from synthkit.synthesis.engine import synthesize

    kept = RunDir(args.work / name)
    if found := kept.read_json("result.json"):
        return found
    recipe, protocol = PARTS[name]
    method = {"method": {"iterations": args.iterations}} if args.iterations else {}
    config = load_recipe(
        recipe,
        {
            **method,
            "data": args.data,
            "seed": args.seed,
            "out": str(args.work / name / "bank"),
            "resume": True,
            "runtime": {"device": "cpu", "threads": args.threads},
        },
    )
    cpu = time.process_time()
    bank = synthesize(config)
    spent = time.process_time() - cpu
    made = RunDir(bank.path)
    judged = evaluate_bank(
        bank, args.data, runtime=Runtime.create(config.runtime), quiet=False,
        protocol=protocol, nets=args.nets, seed=args.seed, epochs=args.epochs,
    )  # fmt: skip
    arch, result = next(iter(judged["results"].items()))
    records = [record for record in made.metrics() if "matching_loss" in record]
    summary = {
        "recipe": recipe,
        "method": config_to_dict(config.method),
        "images": bank.spec.images,
        "arch": arch,
        "protocol": judged["protocol"],
        "nets": args.nets,
        "bank": result["bank"],
        "control": result["control"],
        "gain": result["gain"],
        "learning_rate": result["lr"],
        "matching_loss": {"first": records[0]["matching_loss"], "last": records[-1]["matching_loss"]},
        "seconds": {
            "synthesize": (made.read_json("run.json") or {}).get("seconds"),
            "evaluate": judged["seconds"],
        },
        "cpu_seconds": {"synthesize_here": round(spent, 1), "evaluate": judged["cpu_seconds"]},
    }
    kept.write_json("result.json", summary)
    text = f"{name}: {100 * result['bank']['mean']:.2f} %, control {100 * result['control']['mean']:.2f} %"
    print(text, file=sys.stderr, flush=True)
    return summary
