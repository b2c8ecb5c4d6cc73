"""Independent shards: each is a pure function of (seed, index), so any process makes any of them, in any order.

No state is stored. `--shards I/N` takes the shards i with i mod N = I - 1; after a repair the lost ones alone are made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.bank import BankWriter
from synthkit.config.worker import shards_of, worker_of
from synthkit.errors import RunError
from synthkit.runtime import format_seconds
from synthkit.synthesis.columns import columns_of
from synthkit.synthesis.record import RunRecord

if TYPE_CHECKING:
    from synthkit.synthesis.base import Task

__all__ = ["ShardRun", "shards_of", "worker_of"]


class ShardRun:
    """One worker over the missing shards of its part of a bank."""

    def __init__(self, writer: BankWriter, method: Any, task: Task, record: RunRecord, shards: range):
        self.writer, self.method, self.task, self.record, self.shards = writer, method, task, record, shards

    def missing(self) -> list[int]:
        """Its shards that do not exist yet."""
        absent = set(self.writer.missing())
        return [index for index in self.shards if index in absent]

    def unfinished(self) -> bool:
        """Whether shards are missing, or only the closing record."""
        return bool(self.missing()) or self.record.status != "complete"

    def run(self) -> None:
        """Make them. Whoever commits the last shard of the bank seals it."""
        missing = self.missing()
        if missing and len(missing) < len(self.shards):
            self.task.runtime.say(f"{len(self.shards) - len(missing)} of {len(self.shards)} shards are there already")
        self.record.begin(missing[0] if len(missing) < len(self.shards) and missing else 0)
        sizes = [self.writer.shard_size(index) for index in missing]
        spec, done, work = self.writer.spec, 0, self.method.work_per_image
        unit = "images" if work == 1 else f"image steps ({work:,} an image)"
        with self.task.runtime.progress(sum(sizes) * work, f"{self.record.config.method_name} {unit}") as bar:
            self.record.bar, self.task.tick = bar, bar.update
            self.task.log, self.task.warn = self.record.log, self.record.warn
            for index, size in zip(missing, sizes, strict=True):
                batches = self._take(index, size)
                columns = columns_of(batches)
                columns["origin_seed"] = np.full(size, spec.seed, np.uint64)
                self.writer.write_shard(index, columns, {**batches[-1].meta, "shard": index})
                done += size
                self.record.progress(done)
        left = len(self.writer.missing())
        if not left:
            self.writer.finish()  # two workers that ended together may each have taken the other for the last
        self.record.write("complete")
        self.task.runtime.say(
            f"bank {self.writer.path}: {done} images in {format_seconds(self.record.seconds)}"
            + (f"; {left} of {spec.shards} shards are still to be made by other workers" if left else "")
        )

    def _take(self, index: int, size: int) -> list[Any]:
        batches, found = [], 0
        for batch in self.method.generate_shard(index, size):
            batches.append(batch)
            found += len(batch.images)
        if found != size:
            raise RunError(
                f"{self.record.config.method_name} made {found} of {size} images of shard {index}",
                hint="an error of the method: generate_shard must yield exactly as many as it is asked for",
            )
        return batches
