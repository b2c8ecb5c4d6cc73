"""The child of the fuzzer: makes inputs, runs them, reports every thousand. `python -m synthkit.bench.fuzz_worker`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import mmap
import os
import random
import shutil
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

HEADER, SLOT = 32, 4 << 20  # of the last input: number + 1, length; then (accepted, refused) since a report; input
BATCH = 1000
STAGE = "synthkit.bench.fuzz_targets:Stage"
WARM = 300  # inputs after which libraries have taken what they keep
BY_HYPOTHESIS = 0.05  # share of the inputs of a JSON target, where hypothesis is installed


def load_stage(name: str) -> Any:
    """The class "module:class" that makes the targets."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def write_slot(slot: mmap.mmap, number: int, data: bytes) -> None:
    """What is about to run, where the parent finds it after a crash."""
    data = data[:SLOT]
    slot[HEADER : HEADER + len(data)] = data
    slot[8:16] = len(data).to_bytes(8, "little")
    slot[0:8] = (number + 1).to_bytes(8, "little")


def read_slot(slot: mmap.mmap) -> tuple[int, int, int, bytes]:
    """(number of the last input, -1 before the first; accepted and refused inputs not yet reported; the input)."""
    number, length, accepted, refused = (int.from_bytes(slot[i : i + 8], "little") for i in range(0, 32, 8))
    return number - 1, accepted, refused, bytes(slot[HEADER : HEADER + length])


def confine_memory(limit: int) -> None:
    """No more than `limit` bytes of address space, no core dumps, no large files."""
    import resource

    for kind, value in ((resource.RLIMIT_AS, limit), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 64 << 20)):
        resource.setrlimit(kind, (value, value))


class Worker:
    """Runs the inputs of one target."""

    def __init__(self, request: dict[str, Any]):
        self.request, self.kept = request, Path(request["kept"])
        folder = Path(request["stage"])
        shutil.rmtree(folder / "bank", ignore_errors=True)  # what the last child left
        self.stage = load_stage(request["stage_class"])(Path(shutil.copytree(folder / "whole", folder / "bank")))
        self.target = next(t for t in self.stage.targets() if t.name == request["target"])
        with open(request["slot"], "r+b") as stream:
            self.slot = mmap.mmap(stream.fileno(), 0)
        self.base: int | None = None
        self._clear(0)

    def _clear(self, number: int) -> None:
        self.counts, self.findings = {"inputs": 0, "accepted": 0, "refused": 0}, []
        self.start, self.number = status("VmRSS"), number
        self.slot[16:32] = bytes(16)
        with contextlib.suppress(OSError):  # Linux only: start a new peak
            Path("/proc/self/clear_refs").write_text("5")

    def run(self, number: int, data: bytes) -> None:
        """One input."""
        write_slot(self.slot, number, data)
        self.counts["inputs"] += 1
        self.number = number
        try:
            key, place = ("accepted", 16) if self.target.run(data) else ("refused", 24)
            self.counts[key] += 1
            self.slot[place : place + 8] = self.counts[key].to_bytes(8, "little")
        except Exception as error:  # noqa: BLE001 - whatever comes is what is looked for
            self.findings.append(self._saved(number, data, error))
            self.report(force=True)

    def _saved(self, number: int, data: bytes, error: Exception) -> dict[str, Any]:
        trace = traceback.format_exception(error)
        where = hashlib.sha256(data).hexdigest()[:12]
        file = self.kept / f"{self.target.name.replace(' ', '-')}-{where}.bin"
        file.write_bytes(data)
        file.with_suffix(".txt").write_text("".join(trace), errors="backslashreplace")
        inner = [line.strip() for line in trace if "synthkit" in line][-1:] or [""]
        return {"kind": "untyped" if type(error).__name__ != "Broken" else "accepted but not harmless",
                "target": self.target.name, "number": number, "error": f"{type(error).__name__}: {error}"[:300],
                "where": inner[0].splitlines()[0][:200], "file": file.name}  # fmt: skip

    def report(self, *, force: bool = False) -> None:
        """One line for the parent, when a batch is full."""
        if self.counts["inputs"] < BATCH and not force:
            return
        now = status("VmRSS")
        if self.base is None:
            self.base = now
        print(json.dumps({
            **self.counts, "findings": self.findings, "growth": max(0, now - self.base), "number": self.number,
            "peak": max(0, status("VmHWM") - self.start), "target": self.target.name,
        }), flush=True)  # fmt: skip
        self._clear(self.number)

    def work(self) -> str | None:
        """All inputs; what is to be said of hypothesis."""
        start, count = self.request["start"], self.request["count"]
        generated = round(count * BY_HYPOTHESIS) if self.target.is_json else 0
        own = count - generated
        for number in range(start, own):
            self.run(number, self.input(number))
            if number - start == WARM:
                self.report(force=True)
            self.report()
        said = None
        if generated and start < count:
            said = self._hypothesis(max(start, own), count)
        self.report(force=True)
        return said

    def input(self, number: int) -> bytes:
        """A pure function of (seed, target, number)."""
        rng = random.Random(f"{self.request['seed']}:{self.target.name}:{number}")
        return rng.choice(self.target.mutators)(rng, self.target.seeds)

    def _hypothesis(self, start: int, count: int) -> str:
        try:
            import hypothesis
        except ImportError:  # then our own mutators do the rest
            for number in range(start, count):
                self.run(number, self.input(number))
                self.report()
            return "not installed"
        from synthkit.bench.fuzz_json import records

        numbers = iter(range(start, count))
        while (left := count - (number := next(numbers, count))) > 0:

            @hypothesis.seed(self.request["seed"] * 1_000_003 + number)
            @hypothesis.settings(max_examples=min(left, 500), database=None, deadline=None,
                                 suppress_health_check=tuple(hypothesis.HealthCheck),  # pyright: ignore[reportArgumentType]  # an Enum
                                 phases=[hypothesis.Phase.generate])  # fmt: skip
            @hypothesis.given(records(self.target.seeds))
            def throw(data: bytes) -> None:
                nonlocal number
                if number < count:
                    self.run(number, data)
                    self.report()
                    number = next(numbers, count)

            throw()
        return hypothesis.__version__


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    """Read the request, work, say so."""
    request = json.loads(sys.stdin.buffer.read())
    warnings.simplefilter("ignore")
    worker = Worker(request)
    confine_memory(request["memory"])
    said = worker.work()
    print(json.dumps({"done": said}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
