"""`synthkit bench WHAT`: speed, memory and reliability of this machine's synthkit, as JSON."""

from __future__ import annotations

import importlib

from synthkit.errors import UsageError

BENCHES = {
    "bank": "random-batch images/s of a bank, a memory map, ImageFolder, WebDataset and MDS",
    "million": "a bank of a million images written, verified and read at random within 2 GiB of memory",
    "labels": "stored labels of views, dense and top-k, against the live teacher on the same views",
    "steps": "CPU seconds of the steps of each engine family against the bare networks",
    "inversion": "a DeepInversion bank judged by a network that took no part, its controls, and a student of it",
    "diffusion": "banks of a diffusion model with and without guidance, a judge that took no part, their students",
    "matching": "distilled banks of MNIST (DC, MTT, DATM) and random real images of their size, fresh networks on each",
    "fresh_nets": "several networks trained on a bank at once, stacked, against one after the other",
    "trajectory_memory": "memory and time of sweeping, unrolling and TESLA at several numbers of inner steps",
    "resume": "kill -9 at random moments, resume, compare shard hashes with an uninterrupted run",
    "kills": "kill -9 writers, sealers, mergers, exporters at any moment; count lost images and wrong bytes",
    "fuzz": "mutated files against every reader of a bank: typed errors only, no crash, bounded memory",
    "mixture": "which share of freshly generated images trains the best student from a bank",
    "losses": "every distillation loss on one bank: same teacher, student and epochs, over seeds, with controls",
    "ranks": "two processes (gloo) against one with the same global batch; a rank killed with kill -9, then resumed",
    "distill": "images/s of the distill trainer against the bare networks and a torch DataLoader over PNG files",
    "dfkd": "all data-free methods for the same CPU seconds: students, controls, published numbers, selection",
    "engines": "the four engines on one teacher: same images, student and steps; accuracy, time, memory, data needed",
    "pipeline": "synthesize and distill a recipe over seeds, with the noise control; one result JSON",
}


def main(argv: list[str]) -> int:
    """Dispatch to `synthkit.bench.WHAT`."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: synthkit bench WHAT [options]   (synthkit bench WHAT --help)\n")
        width = max(map(len, BENCHES))
        for name, text in BENCHES.items():
            print(f"  {name:{width}}  {text}")
        return 0
    if argv[0] not in BENCHES:
        raise UsageError("bench: no such measurement", got=argv[0], allowed=BENCHES, hint="synthkit bench --help")
    return importlib.import_module(f"synthkit.bench.{argv[0]}").main(argv[1:])
