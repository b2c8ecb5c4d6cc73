"""Who makes which shards: claims of living, dead, suspended and foreign holders, and two writers of one shard."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py  # noqa: F401  (imported before threads are made to take turns)
import numpy as np
import pytest

import synthkit
from synthkit.bank import Bank, BankBusyError, BankWriter
from synthkit.bank.disk import lock, storage
from synthkit.bank.disk.lock import claim, read_claims
from synthkit.bank.disk.ranges import as_ranges, describe
from synthkit.errors import StorageError, UsageError

from .banks import fill, make_spec, shard_arrays

ROOT = Path(synthkit.__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
BEGIN = (
    "import sys, time\nfrom synthkit.bank import BankWriter\nfrom synthkit.bank.disk import lock\n"
    "writer = BankWriter(sys.argv[1])\n"
)
HOLD = "with writer.claim({shards}):\n    print('held', flush=True)\n    time.sleep(60)\n"
FOREIGN = """
lock._boot_id = lambda: "another boot"
lock.host = lambda: "elsewhere"
lock.fcntl = None  # nor does the file system carry its lock over
lock.HEARTBEAT = 0.05
"""


@pytest.fixture
def writer(tmp_path: Path) -> BankWriter:
    return BankWriter.create(tmp_path / "b", make_spec())  # six shards


@contextmanager
def child(code: str, *words: Path | str) -> Iterator[subprocess.Popen[str]]:
    """A process that has said its first line."""
    command = [sys.executable, "-c", code, *map(str, words)]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [
        (range(2, 24, 8), range(0, 24, 2), True),  # 3/8 and 1/2
        (range(2, 24, 8), range(1, 24, 2), False),  # 3/8 and 2/2
        (range(0, 24, 3), range(1, 24, 2), True),
        (range(0, 6), range(6, 24), False),
        ([1, 2, 9], [3, 9, 11], True),
        ([1, 2, 9], range(3, 9), False),
        (None, [23], True),
        (None, None, True),
        ([], None, True),
        ([], [0], False),
    ],
)
def test_overlapping_claims_are_refused(writer, a, b, overlap):
    for first, second in ((a, b), (b, a)):
        with claim(writer.path, first):
            if overlap:
                with pytest.raises(BankBusyError, match=f"pid {os.getpid()} on host"), claim(writer.path, second):
                    pytest.fail("the body must not run")
            else:
                with claim(writer.path, second):
                    assert len(read_claims(writer.path)) == 2
    assert read_claims(writer.path) == []


def test_a_refusal_names_the_shards(writer):
    with claim(writer.path, range(2, 24, 8)), pytest.raises(BankBusyError) as caught, claim(writer.path, range(0, 24)):
        pytest.fail("the body must not run")
    assert "shards 2, 10, ... 18 (that is 3/8)" in str(caught.value) and "wait for it" in str(caught.value)


def test_ranges_are_stored_short():
    assert as_ranges([5, 1, 3]) == (range(1, 6, 2),)
    assert as_ranges([0, 1, 2, 7]) == (range(0, 3), range(7, 8)) and describe(as_ranges([0, 1, 2, 7])) == (
        "shards 0-2, 7"
    )
    with pytest.raises(UsageError):
        as_ranges([-1])


def test_only_claimed_shards_are_written_while_a_claim_is_held(writer):
    with writer.claim([0, 2]):
        fill(writer, [0, 2])
        with pytest.raises(UsageError, match="shard 1 does not belong to shards"):
            fill(writer, [1])
    fill(writer, [1])


def test_a_lost_claim_stops_states_and_snapshots_too(writer):
    with writer.lock() as held:
        writer.save_state(0, {"x": np.zeros(1)}, {})
        held.path.unlink()
        arrays = {"x": np.ones(1)}
        for write in (lambda: writer.save_state(0, arrays, {}), lambda: writer.write_generator(0, arrays, {}),
                      writer.prune_states, lambda: fill(writer, [0])):  # fmt: skip
            with pytest.raises(BankBusyError, match="taken over"):
                write()
    found = writer.load_state()
    assert found is not None and found[1]["x"] == 0


# ---- living, killed, suspended -------------------------------------------------------------------------------------


def test_a_killed_holder_does_not_block_and_a_suspended_one_does(writer):
    with child(BEGIN + HOLD.format(shards="[0, 1]"), writer.path) as holder:
        with writer.claim([2, 3]):
            pass
        os.kill(holder.pid, signal.SIGSTOP)
        with pytest.raises(BankBusyError, match=f"shards 0-1 of this bank .pid {holder.pid} "), writer.claim([1]):
            pytest.fail("the body must not run")
        holder.kill()
        holder.wait()
        with writer.lock():
            assert [h.facts["pid"] for h in read_claims(writer.path)] == [os.getpid()]
    assert read_claims(writer.path) == []


def test_dead_claims_that_are_in_nobodys_way_are_cleared_too(writer):
    with child(BEGIN + HOLD.format(shards="[5]"), writer.path) as holder:
        with writer.claim([0]):
            assert len(read_claims(writer.path)) == 2
        holder.kill()
        holder.wait()
        with writer.claim([0]):
            assert len(read_claims(writer.path)) == 1


def test_a_forked_child_that_outlives_its_killed_parent_holds_nothing(writer):
    code = """
import os
with writer.lock():
    if os.fork() == 0:
        os.write(1, b"%d\\n" % os.getpid())  # whole lines: both processes write
        time.sleep(60)
    os.write(1, b"held\\n")
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", BEGIN + code, str(writer.path)], env=ENV, stdout=subprocess.PIPE,
                               text=True)  # fmt: skip
    assert process.stdout is not None
    said = {process.stdout.readline().strip() for _ in range(2)}
    grandchild = int((said - {"held"}).pop())
    try:
        process.kill()
        process.wait()
        with writer.lock():
            pass
    finally:
        os.kill(grandchild, signal.SIGKILL)
        process.stdout.close()


def test_many_processes_claim_at_the_same_moment(tmp_path):
    """Eight workers, four ranges: each range is made by exactly one of its two workers; nobody sees a half bank."""
    code = """
import sys
sys.path.insert(0, sys.argv[3])
from bank.banks import fill, make_spec
from synthkit.bank import BankBusyError, BankWriter
writer = BankWriter.open_or_create(sys.argv[1], make_spec(images=200, images_per_shard=10))
mine = range(int(sys.argv[2]), writer.shards, 4)
try:
    with writer.claim(mine):
        fill(writer, list(mine))
    print("made", end="")
except BankBusyError:
    print("busy", end="")
"""
    words = [sys.executable, "-c", code, str(tmp_path / "b")]
    tests = str(Path(__file__).parents[1])
    started = [subprocess.Popen([*words, str(i % 4), tests], env=ENV, stdout=subprocess.PIPE, text=True)
               for i in range(8)]  # fmt: skip
    said = [process.communicate(timeout=60)[0] for process in started]
    assert all(said[i] in ("made", "busy") and "made" in (said[i], said[i + 4]) for i in range(4)), said
    bank = Bank(tmp_path / "b")
    assert bank.complete and bank.verify(deep=True).ok and (bank.path / "manifest.json").exists()
    spec = make_spec(images=200, images_per_shard=10)
    assert all((bank[i * 10 : i * 10 + 10].images == shard_arrays(spec, i)["images"]).all() for i in range(20))


# ---- other machines ------------------------------------------------------------------------------------------------


@pytest.fixture
def patience(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.6)


def plant(writer: BankWriter, shards: Any = None, **facts: Any) -> Path:
    """A claim as another machine left it."""
    folder = writer.path / "state" / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    record = {"beat": f"{7:012d}", "pid": os.getpid(), "host": "elsewhere", "boot": "other", "shards": shards, **facts}
    (folder / "feed.json").write_text(json.dumps(record))
    return folder / "feed.json"


@pytest.mark.parametrize("jump", [0.0, 4e9, -1.6e9])
def test_a_dead_holder_of_another_machine_is_waited_for_and_replaced(writer, patience, monkeypatch, capsys, jump):
    """Whatever the clocks of the two machines say."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    place = plant(writer, [[0, 3, 1]])
    begun = time.monotonic()
    with writer.claim([3]):  # another range: no waiting
        assert time.monotonic() - begun < 0.5
    with writer.claim([2]):
        assert time.monotonic() - begun > 0.6 and not place.exists()
        fill(writer, [2])
    said = capsys.readouterr().err
    assert f"claimed by pid {os.getpid()} on host elsewhere, on another machine; watching for" in said
    assert "taken over" in said


def test_a_counting_holder_of_another_machine_is_respected(writer, patience):
    with child(BEGIN + FOREIGN + HOLD.format(shards="None"), writer.path) as holder:
        with pytest.raises(BankBusyError, match=f"holds this bank .pid {holder.pid} on host elsewhere"), writer.lock():
            pytest.fail("the body must not run")
        assert len(read_claims(writer.path)) == 1
        holder.kill()
        holder.wait()
        with writer.lock():
            pass


def test_the_same_host_name_is_not_the_same_machine(writer, patience, capsys):
    plant(writer, host=storage.host())
    with writer.lock():
        pass
    assert "watching" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'{"shards": [[0]]}',
        b'{"shards": [[0, 5, 0]]}',
        b'{"shards": [[0, %d, 1]]}' % 2**200,
        b'{"shards": [["0", "5", "1"]]}',
        b"[" * 9999,
        b"\xff" * 99,
    ],
)
def test_a_claim_that_cannot_be_understood_counts_as_the_whole_bank(writer, patience, text, capsys):
    """Of whom it is cannot be known either, so it is watched; then it is nobody's."""
    plant(writer).write_bytes(text)
    with writer.claim([5]):
        pass
    assert "watching" in capsys.readouterr().err and read_claims(writer.path) == []


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_claim_that_is_no_file_is_refused_with_a_reason(writer, kind):
    place = plant(writer)
    place.unlink()
    place.mkdir() if kind == "folder" else place.symlink_to("/etc/hostname")
    with pytest.raises(StorageError, match="feed.json: a claim that cannot be read"), writer.lock():
        pytest.fail("the body must not run")


def test_ctrl_c_while_waiting_leaves_no_claim(writer, monkeypatch):
    plant(writer)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lock.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt), writer.lock():
        pytest.fail("the body must not run")
    assert [h.path.name for h in read_claims(writer.path)] == ["feed.json"]


def test_without_kernel_locks_the_pid_and_the_counter_decide(writer, patience, monkeypatch, capsys):
    """A file system (or a system) that keeps no advisory locks."""
    monkeypatch.setattr(lock, "fcntl", None)
    nolock = "lock.fcntl = None\nlock.HEARTBEAT = 0.05\n"
    with child(BEGIN + nolock + HOLD.format(shards="None"), writer.path) as holder:
        with pytest.raises(BankBusyError, match=f"pid {holder.pid} "), writer.lock():
            pytest.fail("the body must not run")
        holder.kill()
        holder.wait()
        capsys.readouterr()
        with writer.lock():
            assert capsys.readouterr().err == ""  # the pid is gone: no waiting
    same = {"boot": lock._boot_id(), "namespace": lock._namespace()}
    plant(writer, pid=os.getppid(), host=storage.host(), **same)  # a living process has got the dead holder's pid
    with writer.lock():
        assert "taken over" in capsys.readouterr().err


def test_a_run_that_stands_still_while_it_claims_is_said(writer, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(lock, "MUTEX_WAIT", 0.2)
    with writer.lock():
        pass
    with open(writer.path / "state" / "lock", "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(BankBusyError, match="claiming this bank for.*suspended"), writer.claim([0]):
            pytest.fail("the body must not run")
    with writer.claim([0]):
        pass
    assert read_claims(writer.path) == []


RACER = """
import numpy as np
writer.write_shard(1, {"images": np.full((10, 3, 6, 5), 9, np.uint8), "labels": np.zeros(10, int)})
"""


def test_a_suspended_holder_that_lost_its_claim_publishes_nothing(writer, patience):
    """Machine A stands still, machine B takes over and commits; A wakes up and wants to commit its own version."""
    script = BEGIN + FOREIGN + (
        "from synthkit.bank import BankBusyError\n"
        "with writer.claim([0, 1]):\n    print('held', flush=True)\n    sys.stdin.readline()\n    try:\n"
        + "".join(f"        {line}\n" for line in RACER.strip().splitlines())
        + "    except BankBusyError as error:\n        print('refused:', error, flush=True)\n"
    )  # fmt: skip
    command = [sys.executable, "-c", script, str(writer.path)]
    process = subprocess.Popen(command, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None and process.stdout.readline() == "held\n"
    os.kill(process.pid, signal.SIGSTOP)
    with writer.claim([1]):
        os.kill(process.pid, signal.SIGCONT)
        said, _ = process.communicate("go\n", timeout=30)
        assert "refused:" in said and f"taken over by pid {os.getpid()}" in said
        assert writer.committed() == []
        fill(writer, [1])
    assert (Bank(writer.path).verify(deep=True)).ok
    stored = np.fromfile(writer.shard_path(1), np.uint8)
    assert shard_arrays(writer.spec, 1)["images"].tobytes() in stored.tobytes()


def test_a_vanished_bank_is_said(writer):
    import shutil

    with writer.lock() as held:
        shutil.rmtree(writer.path)
        with pytest.raises(StorageError, match="vanished"):
            held.check()
        for write in (lambda: fill(writer, [0]), lambda: writer.save_state(0, {}, {}), writer.prune_states):
            with pytest.raises(StorageError, match="vanished"):
                write()
    assert not writer.path.exists()
    with pytest.raises(StorageError, match="vanished"), writer.lock():
        pass
