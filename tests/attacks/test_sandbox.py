"""`verify --untrusted` against parsers that really crash, hoard, loop, lie, and try to get out."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import psutil
import pytest

from synthkit.bank.checking import sandbox
from synthkit.bank.checking.confine import Limits
from synthkit.bank.checking.repair import repair
from synthkit.bank.checking.sandbox import Budget, budget_of, verify_untrusted
from synthkit.bank.checking.verify import VerifyReport, verify
from synthkit.bank.errors import BankNotFoundError
from synthkit.cli.main import main
from synthkit.errors import BankError

from .forge import nothing_written, small_bank

HERE = Path(__file__).parent
BUDGET = Budget(limits=Limits(memory=1 << 30, cpu_seconds=5), silence=8)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run("segfault")`: the report of an examination in which that work stands for the parser."""
    small_bank(tmp_path / "bank")
    monkeypatch.syspath_prepend(str(HERE))

    def go(work: str, budget: Budget = BUDGET) -> VerifyReport:
        monkeypatch.setattr(sandbox, "WORK", f"hostile_work:{work}")
        with nothing_written(tmp_path):
            return verify_untrusted(tmp_path / "bank", budget=budget)

    return go


def test_segfault_names_the_shard_and_the_rest_is_checked(run):
    report = run("segfault")
    assert list(report.problems) == ["shard 3"] and "SIGSEGV" in report.problems["shard 3"][0]
    with pytest.raises(BankError, match="shard 3: the file crashed the parser"):
        report.raise_if_damaged()


@pytest.mark.parametrize("work, said", [
    ("abort", "SIGABRT"), ("allocate", "MemoryError"), ("allocate_in_c", "SIGSEGV"), ("untyped", "ZeroDivisionError"),
    ("leave", "exit code 0 in the middle"), ("garbage_bytes", "is not readable JSON"), ("garbage_json", "JSON object"),
    ("garbage_unknown", "unknown message"), ("garbage_other_end", "not begun"), ("garbage_negative", "number"),
    ("garbage_numbers", "number"), ("garbage_ranges", "number"), ("garbage_shape", "impossible findings"),
    ("garbage_deep", "too many objects|not readable JSON|nested"), ("endless_line", "too long"),
])  # fmt: skip
def test_bad_ends(run, work, said):
    started = time.monotonic()
    report = run(work)
    with pytest.raises(BankError, match=f"shard 0: the file crashed the parser .*({said})"):
        report.raise_if_damaged()
    assert time.monotonic() - started < 8


def test_loop_is_stopped_by_the_processor_limit(run):
    report = run("loop", Budget(limits=Limits(memory=1 << 30, cpu_seconds=1), silence=30))
    assert "1 s of processor time" in report.problems["shard 0"][0]


def test_sleep_is_stopped_by_the_clock(run):
    report = run("sleep", Budget(limits=Limits(memory=1 << 30, cpu_seconds=5), silence=1))
    assert "no progress for 1 s" in report.problems["shard 0"][0]


def test_crash_before_any_part(run):
    with pytest.raises(BankError, match=r"bank: reading its records crashed the parser \(SIGSEGV"):
        run("segfault_at_once")


def test_a_bank_of_crashes_ends(run):
    report = run("crash_everywhere", Budget(limits=BUDGET.limits, silence=8, crashes=3))
    assert len(report.damaged_shards) == 3 and "not checked" in report.problems["sandbox"][0]


def test_what_code_in_the_child_can_do(run, tmp_path, monkeypatch):
    """Nothing, where the kernel has Landlock and namespaces; what is not denied is not claimed either."""
    (tmp_path / "secret").write_text("secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    with socket.create_server(("127.0.0.1", 0)) as server, open(tmp_path / "secret") as _held:
        (tmp_path / "bank" / "port").write_text(str(server.getsockname()[1]))
        report = run("explore")
    worked, guards = set(report.problems.get("tries", ())), " ".join(report.guards)
    allowed = set()
    if "only the bank" not in guards:
        allowed |= {"read outside", "read passwd"}
    if "no network" not in guards and "no TCP" not in guards:
        allowed |= {"connect"}
    if os.geteuid() == 0:
        allowed |= {"more memory"}  # root may raise its limits again
    if "nothing can be written" not in guards:
        allowed |= {"truncate", "remove", "rename"}
    assert worked <= allowed
    descriptors, environment, folder = report.notes
    assert not {"HF_TOKEN", "PYTHONPATH", "HOME"} & set(environment.partition(": ")[2].split(","))
    number = descriptors.split()[-1]
    assert descriptors.startswith(f"descriptors: [{number}] "), descriptors  # the one pipe, nothing of the parent
    assert folder == "folder: /" and not Path("/tmp/synthkit-owned").exists()


def test_guards_on_this_machine(run):
    """Every POSIX system has these; the others are claimed only when they were proved above."""
    guards = " ".join(run("segfault").guards)
    assert "no core dump" in guards and "no file can grow" in guards and "32 open files" in guards


def test_real_work_equals_verify_in_process(tmp_path):
    writer = small_bank(tmp_path / "bank")
    writer.shard_path(1).write_bytes(b"x")
    (tmp_path / "bank" / "strange\n\x1b[31m.txt").write_text("x")
    plain, boxed = verify(tmp_path / "bank", deep=True), verify(tmp_path / "bank", deep=True, untrusted=True)
    assert boxed.guards and not plain.guards
    boxed.guards = []
    assert boxed.to_dict() == plain.to_dict() and boxed.damaged_shards == [1]


def test_no_bank_and_unreadable_bank(tmp_path):
    with pytest.raises(BankNotFoundError):
        verify_untrusted(tmp_path)
    (tmp_path / "bank.json").write_text("{")
    with pytest.raises(BankError, match="not readable JSON"):
        verify_untrusted(tmp_path)


def test_modules_in_the_bank_or_the_folder_are_not_imported(tmp_path, monkeypatch):
    """A bank that brings its own h5py.py, checked from inside of it, runs nothing."""
    small_bank(tmp_path / "bank")
    for name in ("h5py", "json", "numpy", "synthkit", "sitecustomize"):
        (tmp_path / "bank" / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path / "bank")
    monkeypatch.syspath_prepend(str(tmp_path / "bank"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bank"))
    report = verify_untrusted(".")
    assert report.ok and not (tmp_path / "ran").exists()


def test_budget_is_not_bought_with_holes(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.truncate(1 << 40)
    assert budget_of(tmp_path).silence < 61 and budget_of(tmp_path).limits.memory < 2 << 30


def test_command_line(tmp_path, capsys):
    writer = small_bank(tmp_path / "bank")
    assert main(["bank", "verify", str(tmp_path / "bank"), "--untrusted", "--deep", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["deep"] and "no core dump" in found["guards"]
    writer.shard_path(0).write_bytes(b"x")
    assert main(["bank", "verify", str(tmp_path / "bank"), "--untrusted"]) == 3
    said = capsys.readouterr()
    assert "DAMAGED shard 0" in said.out and "child process" in said.out and "repair" in said.err
    assert main(["bank", "repair", str(tmp_path / "bank"), "--untrusted"]) == 0
    assert "shards 0" in capsys.readouterr().out
    assert verify(tmp_path / "bank").ok


def test_repair_untrusted_sets_a_crashing_shard_aside(tmp_path, monkeypatch):
    writer = small_bank(tmp_path / "bank")
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr(sandbox, "WORK", "hostile_work:abort")
    assert repair(writer.path, untrusted=True).remake == [0]
    assert not writer.shard_path(0).exists() and writer.shard_path(1).exists()


def test_no_process_is_left_behind(run):
    before = psutil.Process().children(recursive=True)
    run("sleep", Budget(limits=BUDGET.limits, silence=0.5))
    assert psutil.Process().children(recursive=True) == before
