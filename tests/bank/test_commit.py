"""Two writers of one shard, without any claim: their system calls in many orders."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py  # noqa: F401  (imported before threads are made to take turns)
import pytest

from synthkit.bank import Bank, BankWriter
from synthkit.bank.disk import commit, storage
from synthkit.bank.shard import read_sidecar
from synthkit.errors import BankError, SynthkitError

from .banks import make_spec, shard_arrays


class Schedule:
    """Lets threads take turns at every system call of publishing, in an order drawn from a seed."""

    CALLS = ("link", "rename", "unlink", "fsync", "open")

    def __init__(self, seed: int, patch: pytest.MonkeyPatch):
        self.draw, self.turn, self.waiting = random.Random(seed), threading.Condition(), set()
        self.alive: set[str] = set()
        self.next: str | None = None
        for call in self.CALLS:
            patch.setattr(os, call, self.gated(getattr(os, call)))
        for module in (storage, commit):
            patch.setattr(module, "temp_path", lambda path: path.with_name(
                f"{path.name}.tmp-{threading.current_thread().name}-1"))  # fmt: skip

    def gated(self, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return real(*args, **kwargs)

        return call

    def step(self) -> None:
        name = threading.current_thread().name
        if name not in self.alive:
            return
        with self.turn:
            self.waiting.add(name)
            self.pick()
            while self.next != name:
                self.turn.wait(10)
            self.next = None
            self.waiting.discard(name)

    def pick(self) -> None:
        if self.next is None and self.waiting == self.alive and self.alive:
            self.next = self.draw.choice(sorted(self.waiting))
        self.turn.notify_all()

    def run(self, jobs: dict[str, Any]) -> dict[str, BaseException | None]:
        outcome: dict[str, BaseException | None] = {}

        def work(name: str) -> None:
            try:
                jobs[name]()
                outcome[name] = None
            except SynthkitError as error:
                outcome[name] = error
            finally:
                with self.turn:
                    self.alive.discard(name)
                    self.pick()

        self.alive = set(jobs)
        threads = [threading.Thread(target=work, args=(name,), name=name) for name in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return outcome


def race(path: Path, seed: int, arrays: Mapping[str, Any]) -> dict[str, BaseException | None]:
    """Two writers of shard 0 whose system calls alternate as `seed` says."""
    with pytest.MonkeyPatch.context() as patch:
        schedule = Schedule(seed, patch)
        jobs = {name: lambda name=name: BankWriter(path).write_shard(0, arrays[name]) for name in arrays}
        outcome = schedule.run(jobs)
    assert outcome.keys() == arrays.keys(), f"seed {seed}: a writer crashed or hangs"
    assert all(error is None or isinstance(error, BankError) for error in outcome.values()), outcome
    assert not [p for p in path.rglob("*") if ".tmp-" in p.name]
    return outcome


@pytest.mark.parametrize("leftover", [False, True])
def test_two_writers_of_one_shard_in_many_orders(tmp_path, leftover):
    """Whatever the order of their system calls: the record describes the bytes on disk, and the loser is told."""
    arrays = {name: shard_arrays(make_spec(seed=seed), 0) for seed, name in enumerate(("first", "second"))}
    winners = []
    for seed in range(60):
        path = BankWriter.create(tmp_path / f"b{seed}", make_spec()).path
        (path / "shards").mkdir()
        if leftover:
            (path / "shards" / "00000.h5").write_bytes(b"half a shard of a killed run")
        outcome = race(path, seed, arrays)
        stored = (path / "shards" / "00000.h5").read_bytes()
        sidecar = read_sidecar(path / "shards" / "00000.json", 0, make_spec())
        assert hashlib.sha256(stored).hexdigest() == sidecar.sha256, f"seed {seed}: {outcome}"
        done = [name for name, error in outcome.items() if error is None]
        assert len(done) <= 1, f"seed {seed}: both believe that their bytes are in the bank"
        assert all(arrays[name]["images"].tobytes() in stored for name in done), f"seed {seed}: {outcome}"
        winners += done
    assert set(winners) == {"first", "second"} and len(winners) > 30


def test_two_writers_of_equal_bytes(tmp_path):
    arrays: dict[str, Any] = {name: shard_arrays(make_spec(), 0) for name in ("first", "second")}
    both = 0
    for seed in range(20):
        path = BankWriter.create(tmp_path / f"b{seed}", make_spec()).path
        both += list(race(path, seed, arrays).values()) == [None, None]
        assert Bank(path).verify(deep=True).ok and len(Bank(path).sidecars) == 1
    assert both > 10
