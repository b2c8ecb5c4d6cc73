"""`synthkit bench million`: a bank of a million 32x32 images, within 2 GiB of memory and on two cores.

The bank is written, verified in depth and read at random (and in block order), each in a child process of its own under
a hard memory limit. Every image is a pure function of its number, so every image that is read is checked. Beside each
time stands what moving the bytes alone costs here: sha256 and a plain write and fsync of as many bytes.

The limit is a control group of its own where this user may make one (Linux, root; v2 or v1): it counts everything, the
page cache too, so 2 GiB cannot hold the 3 GB bank and reads come from the disk. Elsewhere it is RLIMIT_DATA, which
counts what the process allocates.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

import synthkit
from synthkit.cli.arguments import Arguments
from synthkit.errors import RunError, UsageError

SHAPE, CLASSES = (3, 32, 32), 10
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def main(argv: list[str]) -> int:
    """Parse, measure, print JSON; exit code 1 when a check failed or a child met its limit."""
    parser = Arguments(
        prog="synthkit bench million", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000_000, help="images of the bank")
    parser.add_argument("--memory", type=float, default=2.0, help="hard limit of each child in GiB")
    parser.add_argument("--cores", type=int, default=2, help="cores that a child may use")
    parser.add_argument("--batch", type=int, default=128, help="images per random batch")
    parser.add_argument("--seconds", type=float, default=120.0, help="longest time of each reading phase")
    parser.add_argument("--work", type=Path, default=None, help="empty folder for the bank, kept (default: temporary)")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    parser.add_argument("--phase", default=None, help=argparse.SUPPRESS)
    args = parser.parse(argv)
    if min(args.images, args.batch, args.cores) < 1 or args.memory <= 0 or args.seconds <= 0:
        raise UsageError("bench million: all numbers must be positive")
    if args.phase is not None:
        answer = PHASES[args.phase](args)
        time.sleep(0.1)  # let the parent look at the peak once more
        print(json.dumps(answer))
        return 0
    work = args.work or Path(tempfile.mkdtemp(prefix="synthkit-million-"))
    if args.work is not None and work.exists() and any(work.iterdir()):
        raise UsageError("bench million: --work is not empty", got=str(work))
    work.mkdir(parents=True, exist_ok=True)
    try:
        result = measure(args, work)
    finally:
        if args.work is None:
            shutil.rmtree(work)
    if args.out:
        from synthkit.runtime import write_json

        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    if not result["ok"]:
        raise RunError("bench million: a check failed", hint="see the JSON above")
    return 0


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run the phases one after the other, each under the limit; plain data."""
    from synthkit.runtime import hardware, versions

    limit = int(args.memory * (1 << 30))
    with memory_group(limit) as group:  # one for all phases: the page cache that one leaves is held against the next
        phases = {name: _child(name, args, work, group, limit) for name in PHASES if name != WARM}
        group_peak = _group_peak(group)
    phases[WARM] = _child(WARM, args, work, None, limit)
    for name, key in (("write", "floor_write_seconds"), ("verify", "floor_sha256_seconds")):
        floor = phases["floor"].get(key)
        if floor and "seconds" in phases[name]:
            phases[name]["floor_seconds"] = floor
            phases[name]["ratio_to_floor"] = round(phases[name]["seconds"] / floor, 3)
    peak = max(phase["peak"]["rss"] for phase in phases.values())
    return {
        "what": f"a bank of {args.images:,} images 3x32x32: written, verified in depth, read at random; every image "
        "that was read was compared with the function that made it",
        "command": f"synthkit bench million --images {args.images}",
        "ok": all(phase["ok"] for phase in phases.values()) and peak <= limit,
        "limit_bytes": limit, "cores": args.cores, "peak_rss_bytes": peak,
        "group_peak_bytes_with_page_cache": group_peak, "phases": phases,
        "hardware": hardware(), "versions": versions(),
    }  # fmt: skip


# --- the images -------------------------------------------------------------------------------------------------------


def images_of(rows: np.ndarray) -> np.ndarray:
    """uint8 (N, 3, 32, 32): the images with these numbers. Two numbers never give the same image."""
    words = np.arange(1, 3 * 32 * 32 // 8 + 1, dtype=np.uint64)
    mixed = (rows.astype(np.uint64)[:, None] * np.uint64(len(words) + 1) + words) * _MULTIPLIER  # wraps around
    mixed ^= mixed >> np.uint64(29)
    return (mixed * _MULTIPLIER).view(np.uint8).reshape(-1, *SHAPE)


def labels_of(rows: np.ndarray) -> np.ndarray:
    """int32 (N,): the labels of the images with these numbers."""
    return (rows * 7 % CLASSES).astype(np.int32)


# --- phases (each in a child) -----------------------------------------------------------------------------------------


def _floor(args: argparse.Namespace) -> dict[str, Any]:
    """What the bytes alone cost: sha256, and writing and syncing files of shard size."""
    piece = images_of(np.arange(64 * 1024 // 3)).tobytes()
    total = args.images * 3 * 32 * 32
    started = time.perf_counter()
    digest = hashlib.sha256()
    for _ in range(max(1, min(total, 1 << 30) // len(piece))):
        digest.update(piece)
    hashed = max(1, min(total, 1 << 30) // len(piece)) * len(piece) / (time.perf_counter() - started)
    folder = args.work / "floor"
    folder.mkdir(parents=True)
    started, written = time.perf_counter(), 0
    while written < total:
        with open(folder / f"{written}", "wb") as file:
            file.write(piece[: total - written])
            file.flush()
            os.fsync(file.fileno())
        written += len(piece)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return {
        "ok": True, "bytes": total, "sha256_bytes_per_second": round(hashed), "plain_write_bytes_per_second":
        round(total / seconds), "floor_sha256_seconds": round(total / hashed, 3),
        "floor_write_seconds": round(total / hashed + seconds, 3),
    }  # fmt: skip


def _write(args: argparse.Namespace) -> dict[str, Any]:
    from synthkit.bank import BankSpec, BankWriter

    spec = BankSpec(
        shape=SHAPE, num_classes=CLASSES, mean=[0.5] * 3, std=[0.25] * 3, images=args.images, label_kind="target",
        recipe={"method": {"name": "bench million"}},
    )  # fmt: skip
    started = time.perf_counter()
    writer = BankWriter.create(args.work / "bank", spec)
    making = 0.0
    for index in range(writer.shards):
        begun = time.perf_counter()
        rows = index * spec.per_shard + np.arange(writer.shard_size(index))
        arrays = {"images": images_of(rows), "labels": labels_of(rows)}
        making += time.perf_counter() - begun
        writer.write_shard(index, arrays)
    seconds = time.perf_counter() - started - making
    size = sum(p.stat().st_size for p in (args.work / "bank").rglob("*") if p.is_file())
    return {
        "ok": True, "shards": writer.shards, "bytes": size, "seconds": round(seconds, 3), "making_images_seconds":
        round(making, 3), "images_per_second": round(args.images / seconds), "bytes_per_second": round(size / seconds),
    }  # fmt: skip


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    from synthkit.bank.checking.verify import verify

    started = time.perf_counter()
    report = verify(args.work / "bank", deep=True)
    seconds = time.perf_counter() - started
    return {
        "ok": report.ok and report.complete, "problems": report.problems, "seconds": round(seconds, 3),
        "bytes": report.bytes_read, "bytes_per_second": round(report.bytes_read / seconds),
    }  # fmt: skip


def _warm(args: argparse.Namespace) -> dict[str, Any]:
    """Random batches with the whole bank in the page cache, and maps of at most half the limit."""
    for path in sorted((args.work / "bank" / "shards").glob("*.h5")):
        with open(path, "rb", buffering=0) as file:
            while file.read(4 << 20):
                pass
    limit = int(args.memory * (1 << 29))
    return {**_read(args, None, limit), "mapped_bytes": limit}


def _read(
    args: argparse.Namespace, shuffle: Literal["random", "blocks"] | None, mapped_bytes: int | None = None
) -> dict[str, Any]:
    """Batches in random order (`batch`), or a stream in random or block order; every pixel and label compared."""
    from synthkit.bank import Bank

    bank = Bank(args.work / "bank", mapped_bytes=mapped_bytes)
    if shuffle is None:
        order = bank.order(0, 1)
        batches = (bank.batch(order[at : at + args.batch]) for at in range(0, len(bank), args.batch))
    else:
        order = bank.block_order(0, 1) if shuffle == "blocks" else bank.order(0, 1)
        batches = bank.stream(args.batch, seed=1, shuffle=shuffle)
    read, wrong, checking, started = 0, 0, 0.0, time.perf_counter()
    for found in batches:
        begun = time.perf_counter()
        rows = order[read : read + args.batch]
        assert found.images is not None and found.labels is not None
        same = (found.images == images_of(rows)).all(axis=(1, 2, 3)) & (found.labels == labels_of(rows))
        wrong += int((~same).sum())
        read += len(rows)
        checking += time.perf_counter() - begun
        if time.perf_counter() - started > args.seconds:
            break
    seconds = time.perf_counter() - started - checking
    return {
        "ok": wrong == 0, "images": read, "wrong": wrong, "seconds": round(seconds, 3), "checking_seconds":
        round(checking, 3), "images_per_second": round(read / seconds), "whole_epoch": read == len(bank),
    }  # fmt: skip


PHASES = {
    "floor": _floor,
    "write": _write,
    "verify": _verify,
    "read_random": lambda args: _read(args, None),
    "stream_random": lambda args: _read(args, "random"),
    "stream_blocks": lambda args: _read(args, "blocks"),
    "read_random_warm": _warm,
}
WARM = "read_random_warm"
"""Run under RLIMIT_DATA, so that the page cache may hold the bank; the others in the control group."""


# --- the children and their limit -------------------------------------------------------------------------------------


def _child(phase: str, args: argparse.Namespace, work: Path, group: Path | None, limit: int) -> dict[str, Any]:
    """Run one phase under the limit; its answer with the peak of its memory."""
    words = [sys.executable, "-m", "synthkit", "bench", "million", "--phase", phase, "--images", str(args.images)]
    words += ["--batch", str(args.batch), "--seconds", str(args.seconds), "--work", str(work)]
    words += ["--memory", str(args.memory)]
    home = str(Path(synthkit.__file__).resolve().parent.parent)
    paths = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))

    def begin() -> None:  # in the child, before anything else
        if group is None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        else:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])

    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, preexec_fn=begin, env={**os.environ, "PYTHONPATH": paths}
    )
    peak = _watch(process)
    assert process.stdout is not None
    text = process.stdout.read()
    answer = json.loads(text) if process.returncode == 0 else {"ok": False, "exit_code": process.returncode}
    limited_by = "RLIMIT_DATA" if group is None else f"control group below {group.parent}, page cache included"
    return {**answer, "peak": peak, "limited_by": limited_by}


def _watch(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Peak memory of the child (bytes): resident in all, and of that anonymous (its own, not pages of files).

    Read from /proc while it runs; what the system tells at the end counts this process too, which the child was before
    it became another program.
    """
    peak = {"VmHWM": 0, "RssAnon": 0}
    place = Path(f"/proc/{process.pid}")
    while True:
        with contextlib.suppress(OSError, ValueError, IndexError):  # the child may just have ended, or no /proc
            if b"--phase" in (place / "cmdline").read_bytes():
                lines = [line.split() for line in (place / "status").read_text().splitlines()]
                found = {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if words[0][:-1] in peak}
                peak = {name: max(value, found.get(name, 0)) for name, value in peak.items()}
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            unit = 1 if sys.platform == "darwin" else 1 << 10
            return {"rss": peak["VmHWM"] or usage.ru_maxrss * unit, "anonymous": peak["RssAnon"] or None}
        time.sleep(0.01)


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path | None]:
    """A control group with a hard memory limit in bytes, removed at the end; None where this user cannot make one."""
    for root, name in (
        (Path("/sys/fs/cgroup"), "memory.max"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    ):
        group = root / f"synthkit-bench-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if not (group / name).exists():  # an ordinary folder, or a group without the memory controller
                continue
            (group / name).write_text(str(limit))
            swap = group / "memory.swap.max"
            if swap.exists():
                swap.write_text("0")
            yield group
            return
        finally:
            _remove(group)
    yield None


def _remove(group: Path) -> None:
    for _ in range(100):  # the kernel lets go of an ended process a moment later
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.05)


def _group_peak(group: Path | None) -> int | None:
    """The most that the group ever held, page cache included (bytes)."""
    for name in ("memory.peak", "memory.max_usage_in_bytes"):
        if group is not None and (group / name).exists():
            return int((group / name).read_text())
    return None
