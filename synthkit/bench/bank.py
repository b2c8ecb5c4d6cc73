"""`synthkit bench bank`: random-batch images per second of a bank and of its rivals, in one run on this machine.

Every reader is a process of its own (bank_rivals.py) that is opened once; then the readers take turns, one repetition
each, so that a slow minute hits all of them. Files are read once before (warm cache). Pixels and labels of every reader
are compared with the arrays that all stores were written from. With two processes the bank, the memory map and PIL
run in two independent processes; the others (and the bank again) through two DataLoader workers.

mosaicml-streaming needs huggingface_hub < 1 and does not fit an environment with diffusers. Give it one of its own that
borrows torch from this one (two commands), and name its interpreter with --mds-python:

    python -m venv ENV && echo "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \\
        > "$(ENV/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_main.pth"
    ENV/bin/pip install mosaicml-streaming
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import synthkit
from synthkit.bench import bank_rivals
from synthkit.cli.arguments import Arguments, table
from synthkit.errors import RunError, UsageError

GROUPS = {
    "memmap": ("memmap", "memmap_all"),
    "bank": ("bank", "bank_all", "bank_unmapped", "bank_stream", "bank_blocks", "bank_loader"),
    "imagefolder": ("imagefolder_pil", "imagefolder_loader"),
    "webdataset": ("webdataset_raw", "webdataset_png"),
    "mds": ("mds_raw", "mds_png", "mds_raw_index"),
}
INSTALL = {
    "webdataset": "pip install webdataset",
    "streaming": "two commands in `synthkit bench bank --help`, then --mds-python",
}
BARS = {"memmap": 0.8, "imagefolder": 50.0, "webdataset": 1.0, "mds": 1.0}
"""The bank's images/s (images and labels) must be at least this many times the group's best; ImageFolder at 32 only."""


def main(argv: list[str]) -> int:
    """Parse, measure, print JSON; exit code 1 when a reader gave wrong pixels."""
    parser = Arguments(
        prog="synthkit bench bank", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", default="50000,2500", help="images per size")
    parser.add_argument("--sizes", default="32,224", help="sides of the (square, RGB) images")
    parser.add_argument("--batch", default="128,64", help="images per batch, per size (or one number for all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per repetition of a cell")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions; the median counts")
    parser.add_argument("--processes", default="1,2", help="numbers of processes")
    parser.add_argument("--rivals", default="imagefolder,webdataset,mds", help="rivals besides memmap, or none")
    parser.add_argument("--mds-python", default=sys.executable, help="interpreter that has mosaicml-streaming")
    parser.add_argument("--work", type=Path, default=None, help="folder for the stores, kept (default: temporary)")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse(argv)
    plan = _plan(args)
    work = args.work or Path(tempfile.mkdtemp(prefix="synthkit-bench-bank-"))
    try:
        result = measure(plan, work)
    finally:
        if args.work is None:
            shutil.rmtree(work)
    if args.out:
        from synthkit.runtime import write_json

        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    if not result["pixels_equal"]:
        raise RunError("bench bank: a reader gave other pixels or labels than were stored")
    return 0


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    sizes, images, batches = (_numbers(name, getattr(args, name)) for name in ("sizes", "images", "batch"))
    batches = batches * len(sizes) if len(batches) == 1 else batches[: len(sizes)]
    if len(sizes) != len(images) or len(sizes) != len(batches):
        got = f"--sizes {args.sizes} --images {args.images} --batch {args.batch}"
        raise UsageError("bench bank: --images and --batch must name one number for each of --sizes", got=got)
    names = [] if args.rivals == "none" else args.rivals.split(",")
    for name in names:
        if name not in GROUPS:
            raise UsageError(
                "bench bank: --rivals", got=name, allowed=[g for g in GROUPS if g not in ("memmap", "bank")]
            )
    if args.repeats < 1 or args.seconds <= 0:
        raise UsageError("bench bank: --repeats and --seconds must be positive")
    if any(n < 2 * batch for n, batch in zip(images, batches, strict=True)):
        raise UsageError("bench bank: --images must be at least two batches", got=args.images)
    if shutil.which(args.mds_python) is None:
        raise UsageError("bench bank: --mds-python is no interpreter", got=args.mds_python)
    return {
        "sizes": sizes, "images": images, "batch": batches, "seconds": args.seconds, "repeats": args.repeats,
        "processes": _numbers("processes", args.processes), "groups": list(dict.fromkeys(["memmap", "bank", *names])),
        "mds_python": args.mds_python,
    }  # fmt: skip


def _numbers(name: str, text: str) -> list[int]:
    try:
        values = [int(v) for v in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise UsageError(f"bench bank: --{name} must be whole numbers, 1 or more, joined by commas", got=text)
    return values


def measure(plan: dict[str, Any], work: Path) -> dict[str, Any]:
    """Run the plan (see `main`) in `work`; plain data."""
    from synthkit.runtime import hardware, versions

    sizes = {}
    for side, images, batch in zip(plan["sizes"], plan["images"], plan["batch"], strict=True):
        sizes[str(side)] = _measure_size({**plan, "batch": batch}, work / f"{side}-{images}", side, images)
    cells = [cell for size in sizes.values() for cell in size["cells"]]
    return {
        "what": "random-batch images per second, warm page cache, readers taking turns in one run",
        "command": "synthkit bench bank", "plan": plan,
        "pixels_equal": all(cell["check"]["wrong"] == 0 for cell in cells),
        "bars": {side: size["bars"] for side, size in sizes.items()},
        "sizes": sizes, "hardware": hardware(), "versions": versions(),
    }  # fmt: skip


def _measure_size(plan: dict[str, Any], folder: Path, side: int, images: int) -> dict[str, Any]:
    write_source(folder, side, images)
    rows, bars, absent, wrote = [], {}, {}, {}
    for processes in plan["processes"]:  # one after the other: the readers of both would fill the memory
        cells = _open_cells(plan, folder, processes, absent)
        try:
            _warm(folder)
            for cell in cells:
                cell.check(min(images, 4096))
                cell.run(min(plan["seconds"], 1.0))
            for _ in range(plan["repeats"]):
                for cell in cells:
                    cell.rates.append(cell.run(plan["seconds"]))
        finally:
            for cell in cells:
                cell.close()
        for cell in cells:
            wrote[cell.store] = max(cell.prepared, wrote.get(cell.store, 0.0))
        rows += [cell.result() for cell in cells]
        bars.update(_bars(side, cells))
    print(_table(side, rows), file=sys.stderr)
    return {
        "shape": [3, side, side], "images": images, "batch": plan["batch"], "not_installed": absent, "bars": bars,
        "cells": rows, "write_seconds": wrote, "bytes": _bytes(folder),
    }  # fmt: skip


def _open_cells(plan: dict[str, Any], folder: Path, processes: int, absent: dict[str, str]) -> list[_Cell]:
    """The readers of the plan, opened; what is not installed goes to `absent` with the remedy."""
    cells: list[_Cell] = []
    for name in (name for group in plan["groups"] for name in GROUPS[group]):
        if name in absent or (processes > 1 and name in bank_rivals.ALONE):
            continue
        cell = _Cell(name, processes, folder, plan)
        missing = cell.open()
        if missing:
            absent[name] = f"{missing} is not installed: {INSTALL.get(missing, 'pip install ' + missing)}"
            cell.close()
        else:
            cells.append(cell)
    return cells


def write_source(folder: Path, side: int, images: int) -> None:
    """The raw arrays of all stores: smooth pictures with some noise (PNG saves about a third), labels, four columns."""
    if (folder / "source.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([side, images])
    columns = {"images": ("|u1", (3, side, side)), "labels": ("<i4", ()), "logits": ("<f2", (10,)),
               "difficulty": ("<f4", ()), "origin_step": ("<u4", ())}  # fmt: skip
    files = {name: open(folder / f"{name}.raw", "wb") for name in columns}  # noqa: SIM115 - closed below
    try:
        piece = max(1, (32 << 20) // (3 * side * side))
        for start in range(0, images, piece):
            n, coarse = min(piece, images - start), -(-side // 8)
            broad = rng.integers(30, 226, (n, 3, coarse, coarse), dtype=np.int16).repeat(8, axis=2).repeat(8, axis=3)
            noise = rng.integers(-12, 13, (n, 3, side, side), dtype=np.int16)
            logits = rng.normal(size=(n, 10)).astype("<f2")
            values = {
                "images": (broad[:, :, :side, :side] + noise).astype(np.uint8),
                "labels": logits.argmax(1).astype("<i4"),
                "logits": logits,
                "difficulty": rng.random(n).astype("<f4"),
                "origin_step": np.arange(n).astype("<u4"),
            }
            for name, value in values.items():
                files[name].write(value.tobytes())
    finally:
        for file in files.values():
            file.close()
    (folder / "source.json").write_text(
        json.dumps({"images": images, "shape": [3, side, side], "columns": columns}), encoding="utf-8"
    )


def _warm(folder: Path) -> None:
    """Read every file once, so that all readers find their files in the page cache."""
    buffer = bytearray(4 << 20)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


class _Cell:
    """One reader with one number of processes."""

    def __init__(self, name: str, processes: int, folder: Path, plan: dict[str, Any]):
        self.name, self.processes, self.folder, self.plan = name, processes, folder, plan
        self.store = bank_rivals.READERS[name][0] or "raw"
        self.rates: list[float] = []
        self.prepared = 0.0
        self.checked: dict[str, Any] = {}
        through_workers = name in bank_rivals.THROUGH_WORKERS
        copies, workers = (1, processes if processes > 1 else 0) if through_workers else (processes, 0)
        self._processes = [self._start(seed, workers) for seed in range(copies)]

    def _start(self, seed: int, workers: int) -> subprocess.Popen[str]:
        python = self.plan["mds_python"] if self.name.startswith("mds") else sys.executable
        words = [python, bank_rivals.__file__, self.name, "--folder", str(self.folder), "--batch",
                 str(self.plan["batch"]), "--workers", str(workers), "--seed", str(seed)]  # fmt: skip
        home = str(Path(synthkit.__file__).resolve().parent.parent)
        paths = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        # a process is a process here, not a pool of threads
        own = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": paths}
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own)

    def _ask(self, command: dict[str, Any]) -> list[dict[str, Any]]:
        """`command` to every process at once; their answers."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            answers.append(json.loads(line) if line else {"error": f"ended with code {process.wait()}"})
        for answer in answers:
            if "error" in answer and not answer.get("missing"):
                raise RunError(f"bench bank: {self.name} with {self.processes} processes: {answer['error']}")
        return answers

    def open(self) -> str | None:
        """Write the store if it is not there and open it; the name of a module that is not installed, or None."""
        first, *others = self._processes
        self._processes = [first]  # one writes
        answer = self._ask({"do": "prepare"})[0]
        self._processes = [first, *others]
        if "missing" not in answer:
            self.prepared = answer["seconds"]
            answer = self._ask({"do": "open"})[0]
        return answer.get("missing")

    def check(self, images: int) -> None:
        """Compare pixels and labels of `images` images with the source."""
        answers = self._ask({"do": "check", "images": images})
        self.checked = {key: sum(a[key] for a in answers) for key in ("checked", "wrong", "distinct")}

    def run(self, seconds: float) -> float:
        """Images per second, all processes together."""
        answers = self._ask({"do": "run", "at": time.time() + 0.05, "seconds": seconds})
        return sum(a["rate"] for a in answers)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:  # workers of a DataLoader that do not end
                process.kill()
                process.wait()
            process.stdout.close()

    def result(self) -> dict[str, Any]:
        """Plain data of this cell."""
        return {
            "reader": self.name, "processes": self.processes,
            "through": "DataLoader" if self.name in bank_rivals.THROUGH_WORKERS else "direct",
            "images_per_second": round(statistics.median(self.rates), 1),
            "lowest": round(min(self.rates), 1), "highest": round(max(self.rates), 1), "n": len(self.rates),
            "check": self.checked,
        }  # fmt: skip


def _bars(side: int, cells: list[_Cell]) -> dict[str, Any]:
    """The bank (images and labels) against the best reader of each group; the ratio is the median over repetitions."""
    bars: dict[str, Any] = {}
    of = {cell.name: cell for cell in cells}
    number = f"{cells[0].processes} process{'es' if cells[0].processes > 1 else ''}"
    for group, bar in BARS.items():
        names = [n for n in GROUPS[group] if n in of and n != "memmap_all"]
        if names:
            best = max(names, key=lambda n: statistics.median(of[n].rates))
            ratio, asked = _paired(of["bank"], of[best]), group != "imagefolder" or side == 32
            bars[f"{group}, {number}"] = {
                "ratio": ratio, "against": best, "bar": bar if asked else None, "held": ratio >= bar if asked else None,
            }  # fmt: skip
    bars[f"all columns, {number}"] = {
        "ratio_to_memmap_of_the_same_columns": _paired(of["bank_all"], of["memmap_all"]),
        "ratio_to_memmap_of_images_and_labels": _paired(of["bank_all"], of["memmap"]),
    }
    return bars


def _paired(ours: _Cell, theirs: _Cell) -> float:
    return round(statistics.median(a / b for a, b in zip(ours.rates, theirs.rates, strict=True)), 3)


def _bytes(folder: Path) -> dict[str, int]:
    sums: dict[str, int] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            inside = path.relative_to(folder).parts
            name = inside[0] if len(inside) > 1 else "raw"
            sums[name] = sums.get(name, 0) + path.stat().st_size
    return sums


def _table(side: int, rows: list[dict[str, Any]]) -> str:
    lines = [["reader", "processes", "images/s", "lowest", "highest", "through"]]
    for row in rows:
        rates = [f"{row[key]:,.0f}" for key in ("images_per_second", "lowest", "highest")]
        lines.append([row["reader"], str(row["processes"]), *rates, row["through"]])
    return f"\n{side}x{side}\n{table(lines)}"
