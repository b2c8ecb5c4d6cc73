"""What a run tells: run.json (config, versions, time over all its legs, warnings), metrics.jsonl, the lines on screen.

A run that is killed and resumed has several legs; its seconds and steps are those of all of them, up to the last shard
that each had committed. Only the monotonic clock is used: a clock that jumps changes nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from synthkit.bank.disk.storage import clean_stale_temps
from synthkit.config.parse import config_to_dict
from synthkit.config.schema import SynthesizeConfig
from synthkit.errors import RunError, StorageError, SynthkitError
from synthkit.runtime import RunDir, Runtime, hardware, peak_memory, versions

SHOWN = ("kd", "g_loss", "class_balance", "test_top1", "loss", "matching_loss", "teacher_top1", "verifier_top1")
"""Figures of the log that stand beside the progress bar."""


class RunRecord:
    """The record of one worker in its own folder (the bank's, or workers/I-of-N below it)."""

    def __init__(self, folder: Path, config: SynthesizeConfig, runtime: Runtime):
        self.dir, self.config, self.runtime = RunDir(folder), config, runtime
        self.warnings: dict[str, int] = {}
        self.bar: Any = None
        self._first: dict[str, str] = {}  # beginning of a warning -> its first full text, under which all count
        self._base: dict[str, Any] = {}
        self._legs: list[dict[str, Any]] = []
        self._logged = 0

    @property
    def status(self) -> str | None:
        """What run.json says: running, complete, failed, interrupted; None where there is none."""
        return (self.dir.read_json("run.json") or {}).get("status")

    def begin(self, first_shard: int) -> None:
        """Open a new leg, after those that an earlier process left in run.json."""
        self.dir.create()
        clean_stale_temps(self.dir.path)
        self.dir.truncate_metrics(lambda record: True)  # takes off a line that a killed run left torn
        self._logged = max((record.get("step", 0) for record in self.dir.metrics()), default=0)
        before = self.dir.read_json("run.json") or {}
        self._legs = [dict(leg) for leg in before.get("legs", [])]
        for text, count in (before.get("warnings") or {}).items():
            self._first.setdefault(_kind(text), text)
            known = self._first[_kind(text)]
            self.warnings[known] = self.warnings.get(known, 0) + count
        self._legs.append({"from_shard": first_shard, "seconds": 0.0, "cpu_seconds": 0.0, "steps": 0})
        self._start, self._cpu = time.monotonic(), time.process_time()
        self._base = {"config": config_to_dict(self.config), "versions": versions(), "hardware": hardware()}
        self.write("running")

    def progress(self, steps: int) -> None:
        """Note what this leg has cost so far: called after every shard, so a kill loses one shard's time at most."""
        leg = self._legs[-1]
        leg.update(seconds=time.monotonic() - self._start, cpu_seconds=time.process_time() - self._cpu, steps=steps)
        self.write("running")

    def write(self, status: str, **facts: Any) -> None:
        """Write run.json."""
        if not self.dir.path.is_dir():  # never made anew: a folder with run.json alone would be in the way of a new run
            raise StorageError(f"{self.dir.path}: the folder vanished while the run was writing")
        seconds = sum(leg["seconds"] for leg in self._legs)
        steps = sum(leg["steps"] for leg in self._legs)
        self.dir.write_json(
            "run.json",
            {
                **self._base,
                "status": status,
                "seconds": seconds,
                "cpu_seconds": sum(leg["cpu_seconds"] for leg in self._legs),
                "steps_per_second": steps / max(seconds, 1e-9),
                "resumed_from_shard": (self._legs[-1]["from_shard"] or None) if self._legs else None,
                "legs": self._legs,
                "peak_memory_bytes": peak_memory(),
                "warnings": self.warnings,
                **facts,
            },
        )

    @property
    def seconds(self) -> float:
        """Seconds of all legs."""
        return float(sum(leg["seconds"] for leg in self._legs))

    @contextlib.contextmanager
    def closing(self, go_on: Callable[[], str]) -> Iterator[None]:
        """Write down how the body ended when it did not end well; `go_on` tells what is whole and how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            self.write("interrupted")
            self.runtime.say(go_on())
            raise
        except (MemoryError, RuntimeError) as error:  # torch says "can't allocate memory" in a RuntimeError
            if not isinstance(error, MemoryError) and not _out_of_memory(error):
                raise
            self.write("failed", error="out of memory")
            hint = f"lower --method.batch_size or close other programs; {go_on()}"
            raise RunError(f"{self.config.method_name}: out of memory", hint=hint) from error
        except SynthkitError as error:
            with contextlib.suppress(SynthkitError, OSError):  # the disk may be full: the error itself matters
                self.write("failed", error=str(error))
            raise

    def log(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl, and figures beside the bar."""
        if record.get("step", 0) > self._logged:  # steps that a killed run had logged already come again
            self.dir.log(record)
        shown = {k: v for k, v in record.items() if k in SHOWN}
        if self.bar is not None:
            self.bar.update(0, **shown)

    def warn(self, text: str) -> None:
        """Say `text` (again at its 10th and 100th time) and count it for run.json."""
        first = self._first.setdefault(_kind(text), text)
        self.warnings[first] = self.warnings.get(first, 0) + 1
        if self.warnings[first] in (1, 10, 100):
            self.runtime.say(f"warning: {text}")


def _kind(text: str) -> str:
    return text.split(": ", 1)[-1][:40]


def _out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
