"""The parent of the fuzzer: starts the child, watches it, restarts it after a crash, and adds up."""

from __future__ import annotations

import json
import math
import mmap
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from synthkit.bench.fuzz_worker import HEADER, SLOT, STAGE, load_stage, read_slot
from synthkit.errors import RunError, UsageError

HANG = 20.0  # seconds that one input may take
MEMORY = 2 << 30  # RLIMIT_AS of the child
GROWTH = 64 << 20  # bytes of resident memory that a target may leave behind
PEAK = 512 << 20  # bytes above its start that a batch may reach (a record may name a million classes)
MAX_FINDINGS = 200


def fuzz(
    inputs: int, seed: int, work: Path, *, only: list[str] | None = None, stage_class: str = STAGE
) -> dict[str, Any]:
    """Run `inputs` inputs or a few more; returns counts per target, memory and findings as plain data.

    Args:
        work: where the bank under test lies and findings are saved (`findings/NAME.bin` with NAME.txt beside it).
        only: names of targets; the shares of the others are dropped.
        stage_class: "module:class" that makes the targets; the tests plant faults with it.

    Raises:
        UsageError: no such target. RunError: the child cannot even start.
    """
    from synthkit.bench.fuzz_targets import build_bank
    from synthkit.runtime import hardware, versions

    begun = time.monotonic()
    stage = work / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    build_bank(stage / "whole")
    targets = {t.name: t.share for t in load_stage(stage_class)(stage / "whole").targets()}
    for name in only or ():
        if name not in targets:
            raise UsageError("bench fuzz: no such target", got=name, allowed=targets)
    chosen = {name: share for name, share in targets.items() if not only or name in only}
    total = sum(chosen.values())
    plan = {name: math.ceil(inputs * share / total) for name, share in chosen.items()}
    campaign = _Campaign(work, stage, seed, plan, stage_class)
    campaign.run()
    shutil.rmtree(stage)
    return {
        "what": "mutated files against the readers of a bank, in a child process with limits",
        "inputs": sum(row["inputs"] for row in campaign.rows.values()), "seed": seed, "engine": "own",
        "findings": campaign.findings, "restarts": campaign.restarts,
        "limits": {"address_space": MEMORY, "peak_above_start": PEAK, "growth": GROWTH, "seconds_per_input": HANG},
        "targets": campaign.rows, "hypothesis": campaign.hypothesis, "seconds": round(time.monotonic() - begun, 1),
        "versions": versions(), "hardware": hardware(),
    }  # fmt: skip


class _Campaign:
    def __init__(self, work: Path, stage: Path, seed: int, plan: dict[str, int], stage_class: str):
        self.stage, self.seed, self.plan, self.stage_class = stage, seed, plan, stage_class
        self.kept = work / "findings"
        self.kept.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = {}
        self.findings: list[dict[str, Any]] = []
        self.restarts = 0
        self.hypothesis: str | None = None
        self._slot = stage / "slot"

    def run(self) -> None:
        """All targets, one after the other."""
        for name, count in self.plan.items():
            row = {"inputs": 0, "accepted": 0, "refused": 0, "findings": 0, "seconds": 0.0, "memory_growth": 0,
                   "memory_peak": 0}  # fmt: skip
            self.rows[name] = row
            begun, number = time.monotonic(), 0
            while number < count and len(self.findings) < MAX_FINDINGS:
                number = self._child(name, row, number, count)
            row["seconds"] = round(time.monotonic() - begun, 1)

    def _child(self, name: str, row: dict[str, Any], start: int, count: int) -> int:
        """Inputs from `start` in one child; the number at which to go on (`count` when it came to the end)."""
        request = {
            "stage": str(self.stage), "slot": str(self._slot), "seed": self.seed, "target": name, "start": start,
            "count": count, "memory": MEMORY, "kept": str(self.kept), "stage_class": self.stage_class,
        }  # fmt: skip
        self._slot.write_bytes(bytes(HEADER + SLOT))
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "synthkit.bench.fuzz_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            assert process.stdin and process.stdout and process.stderr
            process.stdin.write(json.dumps(request).encode())
            process.stdin.close()
            done = self._watch(process, row)
            if done:
                return count
            number, accepted, refused, data = self._last()
            process.kill()
            error = process.stderr.read().decode(errors="replace")[-500:]
            code = process.wait()
            if number < start:
                raise RunError("bench fuzz: the child cannot start", got=error or code)
            kind = "hang" if done is None else f"crash ({_signal(code)})"
            self._save(name, row, {"kind": kind, "error": error, "number": number}, data)
            self.restarts += 1
            row["accepted"], row["refused"] = row["accepted"] + accepted, row["refused"] + refused
            row["inputs"] += accepted + refused + 1
            return number + 1
        finally:
            process.kill()
            process.wait()

    def _watch(self, process: subprocess.Popen[bytes], row: dict[str, Any]) -> bool | None:
        """Take in the child's reports. True: it finished; False: it died; None: an input hangs."""
        assert process.stdout
        buffer = b""
        last, since = -1, time.monotonic()
        while True:
            ready = select.select([process.stdout], [], [], 1.0)[0]
            number = self._last()[0]
            if number != last:
                last, since = number, time.monotonic()
            if time.monotonic() - since > HANG + (60 if number < 0 else 0):
                return None
            if not ready:
                continue
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                return False
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                report = json.loads(line)
                if "done" in report:
                    self.hypothesis = report["done"] or self.hypothesis
                    return True
                for key in ("inputs", "accepted", "refused"):
                    row[key] += report[key]
                self._memory(row, report)
                for found in report["findings"]:
                    self._note(row, found)

    def _memory(self, row: dict[str, Any], report: dict[str, Any]) -> None:
        row["memory_growth"] = max(row["memory_growth"], report["growth"])
        row["memory_peak"] = max(row["memory_peak"], report["peak"])
        for key, bound in (("growth", GROWTH), ("peak", PEAK)):
            if report[key] > bound and not any(f["kind"] == f"memory {key}" for f in self.findings):
                what = f"{report[key]} bytes in the inputs up to number {report['number']}"
                self._note(row, {"kind": f"memory {key}", "target": report["target"], "error": what, "file": None})

    def _last(self) -> tuple[int, int, int, bytes]:
        with open(self._slot, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as slot:
            return read_slot(slot)

    def _save(self, name: str, row: dict[str, Any], found: dict[str, Any], data: bytes) -> None:
        file = self.kept / f"{name.replace(' ', '-')}-{found['number']}.bin"
        file.write_bytes(data)
        file.with_suffix(".txt").write_text(json.dumps({**found, "target": name}, indent=1))
        self._note(row, {**found, "target": name, "file": file.name})

    def _note(self, row: dict[str, Any], found: dict[str, Any]) -> None:
        row["findings"] += 1
        self.findings.append(found)


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit code {code}"
