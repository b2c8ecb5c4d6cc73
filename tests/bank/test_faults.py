"""Full disks, read-only and vanished folders, interrupts at every system call, the order of those calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py  # noqa: F401  (imported before os functions are watched)
import numpy as np
import pytest

from synthkit.bank import Bank, BankWriter
from synthkit.bank.disk import lock
from synthkit.bank.disk.storage import staged
from synthkit.errors import StorageError

from .banks import fill, make_spec, shard_arrays
from .test_writer import hashes

CALLS = ("open", "fsync", "link", "rename", "unlink", "mkdir")


def temps(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if ".tmp-" in p.name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True,
                             check=False)  # fmt: skip
    if mounted.returncode:
        pytest.skip("may not mount a file system here (needs root)")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill_disk(place: Path, leave: int) -> Path:
    """Take all but `leave` bytes of a disk."""
    ballast = place / "ballast"
    ballast.write_bytes(b"\0" * max(0, shutil.disk_usage(place).free - leave))
    return ballast


# ---- real disks ------------------------------------------------------------------------------------------------


def test_a_full_disk_in_the_middle_of_a_shard(small_disk, tmp_path):
    spec = make_spec(images=100, images_per_shard=20, shape=(3, 20, 20))  # 24 kB per shard
    writer = BankWriter.create(small_disk / "b", spec)
    with writer.lock():
        fill(writer, [0, 1])
        ballast = fill_disk(small_disk, 16 << 10)
        with pytest.raises(StorageError, match="disk is full"):
            fill(writer, [2])
        assert writer.committed() == [0, 1] and temps(small_disk) == [] and not writer.shard_path(2).exists()
        assert Bank(small_disk / "b").verify(deep=True).ok
        with pytest.raises(StorageError, match="disk is full"), staged(small_disk / "export") as work:
            (work / "x.bin").write_bytes(b"\0" * (64 << 10))
        assert temps(small_disk) == [] and not (small_disk / "export").exists()
    ballast.unlink()
    with writer.lock():
        fill(writer)
    whole = BankWriter.create(tmp_path / "whole", spec)
    fill(whole)
    assert hashes(small_disk / "b") == hashes(tmp_path / "whole")


def test_a_claim_on_a_full_disk_is_refused_with_a_reason(small_disk):
    writer = BankWriter.create(small_disk / "b", make_spec())
    fill(writer, [0])
    fill_disk(small_disk, 0)
    with pytest.raises(StorageError, match="disk is full"), writer.lock():
        pytest.fail("the body must not run")
    assert Bank(small_disk / "b").verify(deep=True).ok


def test_a_disk_that_becomes_read_only(small_disk):
    writer = BankWriter.create(small_disk / "b", make_spec())
    fill(writer, [0])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        with pytest.raises(StorageError, match="read-only"):
            fill(writer, [1])
        with pytest.raises(StorageError, match="read-only"), writer.lock():
            pytest.fail("the body must not run")
        with pytest.raises(StorageError, match="read-only"), staged(small_disk / "out"):
            pytest.fail("the body must not run")
        with pytest.raises(StorageError, match="read-only"):
            BankWriter.create(small_disk / "c", make_spec())
        bank = Bank(small_disk / "b")  # reading needs no lock and writes nothing
        assert bank.verify(deep=True).ok and len(bank.sidecars) == 1
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    fill(writer)
    assert Bank(small_disk / "b").verify(deep=True).ok


# ---- interrupts and losses at every system call ----------------------------------------------------------------


class Watch:
    """Notes the system calls of publishing; `act` is done just before call number `at`."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int = -1, act: Any = None):
        self.calls: list[tuple[str, str]] = []
        self.at, self.act = at, act
        for name in CALLS:
            patch.setattr(os, name, self.watched(name, getattr(os, name)))

    def watched(self, name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = len(self.calls)
            target = f"/proc/self/fd/{args[0]}" if name == "fsync" else str(args[-1] if name in ("link", "rename") else
                                                                            args[0])  # fmt: skip
            self.calls.append((name, os.readlink(target) if name == "fsync" else target))
            if number == self.at:
                self.act()
            return real(*args, **kwargs)

        return call


def interrupt() -> None:
    raise KeyboardInterrupt


def test_ctrl_c_before_every_system_call(tmp_path):
    """Either the shard is committed and whole or it does not exist; the next run makes it."""
    writer = BankWriter.create(tmp_path / "b", make_spec(images=20))
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        fill(writer, [0])
    steps = len(watch.calls)
    assert steps > 10
    for at in range(steps):
        path = tmp_path / f"b{at}"
        writer = BankWriter.create(path, make_spec(images=20))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Watch(patch, at, interrupt)
            fill(writer, [0])
        assert temps(path) == [] and writer.committed() in ([], [0]), watch.calls[at]
        assert writer.committed() == [0] or not writer.shard_path(0).exists(), watch.calls[at]
        assert Bank(path).verify(deep=True).ok
        fill(writer)
        assert hashes(path)["00000.h5"] and Bank(path).verify(deep=True).ok


def test_the_folder_vanishes_before_every_system_call(tmp_path):
    """A typed error, and no bank without a record is left in the old place."""
    for at in range(0, 14):
        path = tmp_path / f"b{at}"
        writer = BankWriter.create(path, make_spec(images=20))
        with pytest.MonkeyPatch.context() as patch:
            Watch(patch, at, lambda path=path: os.rename(path, path.with_suffix(".moved")))
            with pytest.raises(StorageError, match="vanished"):
                fill(writer)
        assert not (path / "bank.json").exists() and not list(path.rglob("*.h5"))
        with pytest.raises(StorageError, match="vanished"):
            fill(writer)
        path.rmdir() if path.exists() and not any(path.iterdir()) else None
        assert not path.exists() or temps(path) == []
        moved = BankWriter.open(path.with_suffix(".moved"))
        fill(moved)
        assert Bank(moved.path).verify(deep=True).ok


# ---- the protocol ----------------------------------------------------------------------------------------------


def test_the_order_of_the_system_calls_is_the_protocol(tmp_path):
    """temp, fsync, rename (link: it never replaces), fsync of the folder; then the same for the record."""
    writer = BankWriter.create(tmp_path / "b", make_spec())
    shards = tmp_path / "b" / "shards"
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        fill(writer, [0])
    calls = [(name, Path(target)) for name, target in watch.calls]
    data, record = shards / "00000.h5", shards / "00000.json"
    data_temp, record_temp = (next(p for n, p in calls if n == "open" and p.name.startswith(f"{f.name}.tmp-"))
                              for f in (data, record))  # fmt: skip
    protocol = [
        ("mkdir", shards), ("fsync", tmp_path / "b"),  # a new folder is made safe as well
        ("open", data_temp), ("fsync", data_temp), ("link", data), ("unlink", data_temp), ("fsync", shards),
        ("open", record_temp), ("fsync", record_temp), ("link", record), ("unlink", record_temp), ("fsync", shards),
    ]  # fmt: skip
    relevant = [(n, p) for n, p in calls if not (n == "open" and p in (shards, tmp_path / "b"))]
    assert relevant[: len(protocol)] == protocol


def test_the_folders_of_a_new_bank_are_made_safe(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        BankWriter.create(tmp_path / "deep" / "er" / "b", make_spec())
    synced = [Path(target) for name, target in watch.calls if name == "fsync"]
    deep, er, bank = tmp_path / "deep", tmp_path / "deep" / "er", tmp_path / "deep" / "er" / "b"
    assert [p for p in synced if p.is_dir()] == [tmp_path, deep, er, bank]
    made = [Path(target) for name, target in watch.calls if name == "mkdir"]
    assert made == [deep, er, bank]


def test_the_record_holds_the_sha256_of_what_was_fsynced(tmp_path):
    """The digest is taken of the bytes that were written, before the record can exist."""
    import hashlib

    writer = BankWriter.create(tmp_path / "b", make_spec())
    seen: dict[str, str] = {}
    real = os.fsync

    def fsync(fd: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if ".h5.tmp-" in name.name:
            seen["data"] = hashlib.sha256(name.read_bytes()).hexdigest()
            assert not writer.sidecar_path(0).exists()
        real(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        record = writer.write_shard(0, shard_arrays(writer.spec, 0))
    assert record["sha256"] == seen["data"]


# ---- clocks ----------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    """Back to 1970, forward to 2096, between any two shards, with a claim that counts meanwhile."""
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    plain = BankWriter.create(tmp_path / "plain", make_spec())
    fill(plain)
    jumps = iter(np.random.default_rng(0).uniform(0, 4e9, 100_000))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    writer = BankWriter.create(tmp_path / "b", make_spec())
    with writer.lock() as held:
        for index in range(writer.shards):
            fill(writer, [index])
            BankWriter.open(tmp_path / "b")  # cleans up: must take nothing of a living run
            held.check()
    assert hashes(tmp_path / "b") == hashes(tmp_path / "plain")
    assert Bank(tmp_path / "b").verify(deep=True).ok
    assert all(sidecar.raw["seconds"] < 60 for sidecar in Bank(tmp_path / "b").sidecars)
