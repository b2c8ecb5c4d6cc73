"""`synthkit bench fresh_nets`: several networks trained at once, stacked by vmap, against one after the other.

Interleaved rounds, the fastest step of each way: CPU seconds of the process on a CPU (what else runs there does not
count), wall clock elsewhere. The rule of `evaluation.fresh_nets.stacking_pays` hangs on it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from synthkit.cli.arguments import Arguments
from synthkit.errors import ConfigError
from synthkit.runtime import hardware, versions, write_json


def main(argv: list[str]) -> int:
    """Parse, run, print JSON."""
    parser = Arguments(prog="synthkit bench fresh_nets", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default="convnet_w32,convnet,mlp,lenet_dd", help="networks, separated by commas")
    parser.add_argument("--batch", default="10,100", help="batch sizes, separated by commas")
    parser.add_argument("--nets", type=int, default=5, help="networks trained at once")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, the fastest of which counts")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse(argv)
    if args.nets < 2 or args.repeats < 1:
        raise ConfigError("--nets must be at least 2 and --repeats at least 1", got=(args.nets, args.repeats))
    result = measure(args)
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def measure(args: Any) -> dict[str, Any]:
    """Seconds of one training step of all networks, by architecture and batch, under DSA's protocol on 28x28 digits."""
    import torch

    from synthkit.config.schema import RuntimeConfig
    from synthkit.data.dsa import DIGITS_STRATEGY
    from synthkit.evaluation.dd_protocols import DD_PROTOCOLS
    from synthkit.evaluation.fresh_nets import Pictures, Training, stacking_pays, step_seconds
    from synthkit.models.build import build_model
    from synthkit.runtime import Runtime

    device = Runtime.create(RuntimeConfig(device=args.device, precision="fp32", threads=args.threads)).device
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    constant = torch.full((1, 1, 1, 1), 0.3, device=device)
    training = Training(protocol=DD_PROTOCOLS["dsa"], epochs=1, lr=0.01, strategy=DIGITS_STRATEGY, dc_ops=())
    rows = []
    for arch in args.arch.split(","):
        for batch in map(int, args.batch.split(",")):
            images = torch.randint(0, 256, (batch, 1, 28, 28), generator=torch.Generator().manual_seed(0))
            pictures = Pictures(
                images=images.to(device, torch.uint8), targets=torch.arange(batch, device=device) % 10,
                mean=constant, std=constant,
            )  # fmt: skip

            def build(seed: int, arch: str = arch):
                return build_model(arch, num_classes=10, in_channels=1, image_size=28, seed=seed).to(device)

            best = {"one_by_one": float("inf"), "stacked": float("inf")}
            for _ in range(args.repeats):
                for way, count in (("one_by_one", 1), ("stacked", args.nets)):
                    found = step_seconds(build, pictures, training, count, rounds=3, clock=clock)[0]
                    best[way] = min(best[way], found * args.nets / count)
            ratio = best["one_by_one"] / best["stacked"]
            chosen = stacking_pays(build, pictures, training, args.nets)
            rows.append({"arch": arch, "batch": batch, "seconds": best, "stacked_speed": ratio, "chosen": chosen})
    return {
        "what": f"one training step of {args.nets} networks; stacked_speed is above 1 where stacking is faster",
        "clock": clock.__name__,
        "nets": args.nets,
        "repeats": args.repeats,
        "rows": rows,
        "measured": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "hardware": hardware(),
    }
