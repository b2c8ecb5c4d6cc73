"""Whole or absent: files and folders that appear under their name only when they are complete."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from synthkit.bank.disk import storage
from synthkit.bank.disk.storage import clean_stale_temps, host, staged
from synthkit.errors import OutputExistsError, StorageError

DEAD = 2**22 + 1  # above the largest pid of Linux


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if ".tmp-" in p.name)


def test_a_folder_appears_whole_with_its_parents(tmp_path):
    target = tmp_path / "a" / "b" / "out"
    with staged(target) as work:
        assert work.is_dir() and work.parent == target.parent and work.name.startswith(".out.tmp-")
        (work / "x").mkdir()
        (work / "x" / "one.bin").write_bytes(b"1")
        assert not target.exists()
    assert (target / "x" / "one.bin").read_bytes() == b"1"
    assert hidden(target.parent) == []


def test_a_single_file_appears_whole(tmp_path):
    with staged(tmp_path / "out.npz", folder=False) as work:
        assert not work.exists()
        work.write_bytes(b"data")
    assert (tmp_path / "out.npz").read_bytes() == b"data"
    assert hidden(tmp_path) == []


def test_an_empty_folder_is_filled_and_anything_else_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with staged(tmp_path / "empty") as work:
        (work / "x").write_text("x")
    assert (tmp_path / "empty" / "x").read_text() == "x"
    with pytest.raises(OutputExistsError, match="not empty .it holds x."), staged(tmp_path / "empty"):
        pytest.fail("the body must not run")
    (tmp_path / "file").write_text("mine")
    for folder in (True, False):
        with pytest.raises(OutputExistsError, match="exists already"), staged(tmp_path / "file", folder=folder):
            pytest.fail("the body must not run")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError, match="link to nothing"), staged(tmp_path / "dangling"):
        pytest.fail("the body must not run")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staged(tmp_path / "link") as work:
        (work / "x").write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").read_text() == "x"


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_nothing_is_left_when_the_body_fails(tmp_path, error, folder):
    with pytest.raises(error), staged(tmp_path / "out", folder=folder) as work:
        ((work / "x") if folder else work).write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [True, False])
def test_a_target_that_appears_meanwhile_is_not_touched(tmp_path, folder):
    with pytest.raises(OutputExistsError, match="appeared"), staged(tmp_path / "out", folder=folder) as work:
        ((work / "x") if folder else work).write_text("mine")
        (tmp_path / "out").write_text("theirs")
    assert (tmp_path / "out").read_text() == "theirs"
    assert hidden(tmp_path) == []


def test_disk_trouble_of_the_body_is_a_storage_error_and_a_missing_source_is_not(tmp_path):
    with pytest.raises(StorageError, match="disk is full"), staged(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), staged(tmp_path / "out"):
        (tmp_path / "source").read_text()
    with pytest.raises(StorageError, match="vanished"), staged(tmp_path / "out") as work:
        (work / "no" / "such").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_dead_temporaries_of_this_target_are_removed_and_all_others_stay(tmp_path):
    stale = tmp_path / f".out.tmp-{host()}-{DEAD}"
    stale.mkdir()
    (stale / "x").write_text("x")
    own = tmp_path / f".out.tmp-{host()}-{os.getpid()}"  # a namesake's in an earlier container
    own.mkdir()
    others = [f".out.tmp-elsewhere-{DEAD}", f".out.tmp-{host()}-{os.getppid()}", f".other.tmp-{host()}-{DEAD}", "out2"]
    for name in others:
        (tmp_path / name).mkdir()
    with staged(tmp_path / "out"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out", *others])


def test_a_temporary_in_use_by_this_process_is_never_stale_whatever_the_clock_says(tmp_path, monkeypatch):
    with staged(tmp_path / "out") as work:
        os.utime(work, (0, 0))
        monkeypatch.setattr(time, "time", lambda: 4e9)
        assert clean_stale_temps(tmp_path) == []
        with pytest.raises(OutputExistsError, match="being made by this process"), staged(tmp_path / "out"):
            pytest.fail("the body must not run")
    assert (tmp_path / "out").is_dir()


def test_every_file_and_folder_is_synced_before_the_rename(tmp_path, monkeypatch):
    calls: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))
        real_fsync(fd)

    def rename(source, target) -> None:
        calls.append(("rename", str(target)))
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    target = tmp_path / "out"
    with staged(target) as work:
        (work / "x").mkdir()
        (work / "x" / "one").write_text("1")
        (work / "two").write_text("2")
    moved = calls.index(("rename", str(target)))
    before = [path for kind, path in calls[:moved]]
    assert sorted(before) == sorted(map(str, [work, work / "x", work / "x" / "one", work / "two"]))
    assert before.index(str(work / "x" / "one")) < before.index(str(work / "x")) < before.index(str(work))
    assert calls[moved + 1 :] == [("fsync", str(tmp_path))]


@pytest.mark.parametrize("possible", [True, False])
def test_a_folder_of_many_files_is_put_on_disk_at_once_or_file_by_file(tmp_path, monkeypatch, possible):
    swept, synced, sync = [], [], storage._sync_file
    monkeypatch.setattr(storage, "sync_file_system", lambda path: swept.append(path) or possible)
    monkeypatch.setattr(storage, "_sync_file", lambda path: (synced.append(path), sync(path)))
    with staged(tmp_path / "out") as work:
        for i in range(storage.MANY_FILES + 1):
            (work / str(i)).write_text("x")
    assert swept == [work] and len(synced) == (0 if possible else storage.MANY_FILES + 1)
    assert len(list((tmp_path / "out").iterdir())) == storage.MANY_FILES + 1


@pytest.mark.skipif(sys.platform != "linux", reason="syncfs is Linux's")
def test_the_whole_file_system_is_synced_and_its_errors_are_ours(tmp_path, monkeypatch):
    assert storage.sync_file_system(tmp_path)
    monkeypatch.setattr(storage.platform, "release", lambda: "4.19.0")
    assert not storage.sync_file_system(tmp_path)
    monkeypatch.setattr(storage.platform, "release", lambda: "6.1.0")

    class Library:
        def syncfs(self, fd):
            storage.ctypes.set_errno(5)
            return -1

    monkeypatch.setattr(storage.ctypes, "CDLL", lambda *_, **__: Library())
    with pytest.raises(OSError, match="Input/output error"):
        storage.sync_file_system(tmp_path)


CHILD = """
import sys, time
from synthkit.bank.disk.storage import staged
with staged(sys.argv[1]) as work:
    (work / "x").write_text("x")
    print("inside", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_leaves_no_target_and_the_next_call_cleans_up(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"inside\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "out").exists() and len(hidden(tmp_path)) == 1
    with staged(tmp_path / "out") as work:
        (work / "y").write_text("y")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["y"] and hidden(tmp_path) == []


def test_temporaries_of_run_records_are_recognised_whatever_the_host_is_called(tmp_path, monkeypatch):
    """A host name with dashes: what a killed run left of its run.json is cleaned up like a shard's temporary."""
    from synthkit import runtime

    monkeypatch.setattr(storage.socket, "gethostname", lambda: "node-7.rack-2")
    names = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (names.append(Path(source).name), real(source, target)))
    runtime.atomic_write(tmp_path / "run.json", b"{}")
    left = tmp_path / names[0].replace(str(os.getpid()), str(DEAD))
    left.write_text("{")
    assert clean_stale_temps(tmp_path) == [left] and (tmp_path / "run.json").read_text() == "{}"
