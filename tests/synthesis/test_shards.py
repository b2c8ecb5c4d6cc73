"""Independent shards under the engine: several workers, repair, real data, what is refused, how a run ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract import Killed, dies_at
from workshop import save_teacher, shard_hashes

import synthkit
from synthkit.bank import Bank, BankBusyError, BankMismatchError, BankWriter
from synthkit.bank.checking.repair import repair
from synthkit.bank.make import bank_from_arrays
from synthkit.cli.main import main
from synthkit.config.parse import parse_config
from synthkit.data.specs import load_data
from synthkit.errors import ConfigError, DataError, RequirementError, RunError
from synthkit.runtime import RunDir
from synthkit.synthesis import engine
from synthkit.synthesis.record import RunRecord
from synthkit.synthesis.selection.noise import Noise
from synthkit.synthesis.shards import shards_of, worker_of

from .test_contract_random_real import save_npz

ENV = {**os.environ, "PYTHONPATH": str(Path(synthkit.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
SMALL = {"images": 74, "images_per_shard": 10, "runtime": {"device": "cpu", "threads": 1}}  # eight shards


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """120 images of ten classes."""
    return save_npz(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """The bank of noise that one process makes alone; read only."""
    return engine.synthesize(config(teacher, tmp_path_factory.mktemp("whole") / "bank"))


def config(teacher: Path | None, out: Path, method: Any = "noise", **changes: Any) -> Any:
    values = {**SMALL, "method": {"name": method, "batch_size": changes.pop("batch_size", 4)}, "out": str(out)}
    if teacher is not None:
        values["teacher"] = str(teacher)
    return parse_config("synthesize", {**values, **changes})


def command_line(teacher: Path, out: Path) -> list[str]:
    """The same run as words."""
    return ["synthesize", "--teacher", str(teacher), "--method", "noise", "--method.batch_size", "4", "--images", "74",
            "--images_per_shard", "10", "--device", "cpu", "--threads", "1", "--out", str(out)]  # fmt: skip


# ---- workers ---------------------------------------------------------------------------------------------------


def test_parts_are_disjoint_and_whole():
    for total, workers in ((8, 3), (1, 4), (20, 20), (7, 1)):
        parts = [list(shards_of((i + 1, workers), total)) for i in range(workers)]
        assert sorted(sum(parts, [])) == list(range(total))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert worker_of("3/8") == (3, 8)


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "a/b", "-1/3", "1/3/5", "1 of 3", ""])
def test_a_malformed_part_is_refused(text, teacher, tmp_path):
    with pytest.raises(ConfigError, match="I/N|shards"):
        worker_of(text)


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_any_number_of_workers_in_any_order_makes_the_same_bank(workers, teacher, whole, tmp_path, capsys):
    out = tmp_path / "bank"
    order = np.random.default_rng(workers).permutation(workers) + 1
    for number, worker in enumerate(order):
        bank = engine.synthesize(config(teacher, out, shards=f"{worker}/{workers}"))
        assert bank.complete == (number == workers - 1 or len(bank.sidecars) == 8)
        record = RunDir(out / "workers" / f"{worker}-of-{workers}").read_json("run.json")
        assert record["status"] == "complete" and record["config"]["shards"] == f"{worker}/{workers}"
    assert shard_hashes(out) == shard_hashes(whole.path)
    assert (
        (out / "manifest.json").exists() and not (out / "run.json").exists() and not (out / "state/00001.json").exists()
    )
    assert Bank(out).info()["root"] == whole.info()["root"]
    assert workers == 1 or "still to be made by other workers" in capsys.readouterr().err


def test_workers_of_different_divisions_do_not_meet_twice(teacher, tmp_path):
    """1/2 and then 2/3: what is there already is not made again."""
    out = tmp_path / "bank"
    engine.synthesize(config(teacher, out, shards="1/2"))
    before = {i: (out / "shards" / f"{i:05d}.h5").stat().st_mtime_ns for i in (0, 2, 4, 6)}
    engine.synthesize(config(teacher, out, shards="2/3"))
    assert len(Bank(out).sidecars) == 6
    assert before == {i: (out / "shards" / f"{i:05d}.h5").stat().st_mtime_ns for i in before}


def test_another_recipe_may_not_join(teacher, whole, tmp_path):
    for changes, said in (({"seed": 1}, "seed: 0 -> 1"), ({"batch_size": 5}, "batch_size: 4 -> 5")):
        with pytest.raises(BankMismatchError, match=said):
            engine.synthesize(config(teacher, whole.path, shards="1/2", **changes))


def test_the_same_part_twice_at_once_is_refused(teacher, tmp_path):
    out = tmp_path / "bank"
    engine.synthesize(config(teacher, out, shards="1/4"))
    with BankWriter(out).claim(range(1, 8, 4)):
        with pytest.raises(BankBusyError, match=rf"shards 1, 5, ... 5 .that is 2/4.*pid {os.getpid()}"):
            engine.synthesize(config(teacher, out, shards="2/2"))
        engine.synthesize(config(teacher, out, shards="1/2"))
        with pytest.raises(BankBusyError):
            engine.synthesize(config(teacher, out, resume=True))


def test_a_sequential_method_says_what_to_do_instead(teacher, tmp_path):
    with pytest.raises(RequirementError, match="not independent.*--seed 2.*bank merge"):
        engine.synthesize(parse_config("synthesize", {"teacher": str(teacher), "shards": "1/2", "out": str(tmp_path)}))
    assert list(tmp_path.iterdir()) == []


def test_two_processes_begin_together_and_one_is_killed(teacher, whole, tmp_path):
    """kill -9 of one worker in the middle: the other goes on, the same command makes the rest, the bytes are equal."""
    out = tmp_path / "bank"
    words = command_line(teacher, out)
    slow = (
        "import sys, time\nfrom synthkit.synthesis.selection.noise import Noise\nreal = Noise.rows\n"
        "def rows(self, start, count):\n"
        "    time.sleep(0.05 if start < 40 else 60)\n    return real(self, start, count)\n"
        "Noise.rows = rows\nfrom synthkit.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    first = subprocess.Popen([sys.executable, "-m", "synthkit", *words, "--shards", "1/2"], env=ENV)
    second = subprocess.Popen([sys.executable, "-c", slow, *words, "--shards", "2/2"], env=ENV)
    end = time.monotonic() + 120
    while not (out / "shards" / "00003.json").exists() and time.monotonic() < end and second.poll() is None:
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL and first.wait(120) == 0
    assert sorted(shard_hashes(out)) == [0, 1, 2, 3, 4, 6]
    assert RunDir(out / "workers" / "2-of-2").read_json("run.json")["status"] == "running"
    engine.synthesize(config(teacher, out, shards="2/2"))
    assert shard_hashes(out) == shard_hashes(whole.path) and Bank(out).verify(deep=True).ok
    record = RunDir(out / "workers" / "2-of-2").read_json("run.json")
    assert record["status"] == "complete" and len(record["legs"]) == 2
    assert record["legs"][0]["steps"] in (10, 20)  # the kill may have come before the last shard was noted
    assert not [p for p in out.rglob("*") if ".tmp-" in p.name] and not list((out / "state" / "claims").iterdir())


# ---- resume and repair -----------------------------------------------------------------------------------------


def made_shards(patch: pytest.MonkeyPatch) -> Counter[int]:
    """Counts the shards that are generated from now on."""
    made: Counter[int] = Counter()
    real = Noise.generate_shard

    def counting(self: Noise, index: int, count: int) -> Any:
        made[index] += 1
        return real(self, index, count)

    patch.setattr(Noise, "generate_shard", counting)
    return made


def test_repair_and_resume_make_the_lost_shards_and_no_others(teacher, whole, tmp_path, monkeypatch):
    out = tmp_path / "bank"
    engine.synthesize(config(teacher, out))
    for index in (2, 5):
        damaged = BankWriter(out).shard_path(index)
        damaged.write_bytes(damaged.read_bytes()[:-50])
    assert repair(out).remake == [2, 5]
    made = made_shards(monkeypatch)
    engine.synthesize(config(teacher, out, resume=True))
    assert made == {2: 1, 5: 1}
    assert shard_hashes(out) == shard_hashes(whole.path) and Bank(out).verify(deep=True).ok


def test_a_worker_re_makes_only_its_own_lost_shards(teacher, tmp_path, monkeypatch):
    out = tmp_path / "bank"
    engine.synthesize(config(teacher, out))
    for index in (2, 5):
        BankWriter(out).shard_path(index).write_bytes(b"")
    repair(out)
    made = made_shards(monkeypatch)
    engine.synthesize(config(teacher, out, shards="2/2"))
    assert made == {5: 1} and BankWriter(out).missing() == [2]


def test_seconds_and_steps_are_those_of_all_legs(teacher, tmp_path, monkeypatch):
    out, jump = tmp_path / "bank", [0.0]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump[0])  # the clock of the wall goes astray
    for resume, nth in ((False, 3), (True, 2)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(RunRecord, "progress", dies_at(RunRecord.progress, nth))
            engine.synthesize(config(teacher, out, resume=resume))
        jump[0] -= 1e9
    before = RunDir(out).read_json("run.json")
    assert before["status"] == "running" and [leg["steps"] for leg in before["legs"]] == [20, 10]
    engine.synthesize(config(teacher, out, resume=True))
    record = RunDir(out).read_json("run.json")
    assert [leg["steps"] for leg in record["legs"]] == [20, 10, 24]  # a killed leg loses its last, unrecorded shard
    assert record["seconds"] == pytest.approx(sum(leg["seconds"] for leg in record["legs"]))
    assert record["seconds"] > before["seconds"] > 0 and all(leg["seconds"] > 0 for leg in record["legs"])
    assert record["steps_per_second"] == pytest.approx(54 / record["seconds"])


# ---- how a run ends --------------------------------------------------------------------------------------------


def test_ctrl_c_in_the_middle_of_a_shard(teacher, whole, tmp_path, monkeypatch, capsys):
    words = command_line(teacher, tmp_path / "bank")
    real = Noise.rows

    def interrupted(self: Noise, start: int, count: int) -> Any:
        if start == 34:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, start, count)

    with monkeypatch.context() as patch:
        patch.setattr(Noise, "rows", interrupted)
        assert main(words) == 130
    said = capsys.readouterr().err
    assert "3 of 8 shards are committed" in said and "--resume" in said and "Traceback" not in said
    assert RunDir(tmp_path / "bank").read_json("run.json")["status"] == "interrupted"
    assert main([*words, "--resume"]) == 0
    assert shard_hashes(tmp_path / "bank") == shard_hashes(whole.path)


MEMORY = """
import resource, sys
from synthkit.synthesis.selection.noise import Noise
real = Noise.rows
def rows(self, start, count):
    if start >= 30:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
        bytearray(1 << 30)
    return real(self, start, count)
Noise.rows = rows
from synthkit.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_out_of_memory_is_said_and_loses_nothing(teacher, whole, tmp_path):
    """A real limit on the address space of a real process."""
    out = tmp_path / "bank"
    words = command_line(teacher, out)
    done = subprocess.run([sys.executable, "-c", MEMORY, *words], env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "out of memory; lower --method.batch_size" in done.stderr and "Traceback" not in done.stderr
    assert Bank(out).verify(deep=True).ok and len(Bank(out).sidecars) == 3
    assert RunDir(out).read_json("run.json")["error"] == "out of memory"
    engine.synthesize(config(teacher, out, resume=True))
    assert shard_hashes(out) == shard_hashes(whole.path)


def test_a_method_that_makes_another_number_is_refused(teacher, tmp_path, monkeypatch):
    real = Noise.generate_shard
    monkeypatch.setattr(Noise, "generate_shard", lambda self, index, count: real(self, index, count - (index == 2)))
    with pytest.raises(RunError, match="made 9 of 10 images of shard 2"):
        engine.synthesize(config(teacher, tmp_path / "bank"))
    assert RunDir(tmp_path / "bank").read_json("run.json")["status"] == "failed"


# ---- real data -------------------------------------------------------------------------------------------------


def test_random_real_without_a_teacher(data, tmp_path):
    bank = engine.synthesize(config(None, tmp_path / "bank", "random_real", data=data, images=None, ipc=3))
    assert len(bank) == 30 and np.bincount(bank.column("labels")).tolist() == [3] * 10 and not bank.has("logits")
    spec = bank.spec
    assert spec.label_kind == "real" and spec.contains_real and spec.real_data_used and spec.teacher == {}
    assert spec.recipe["data"]["images"] == 120 and "curriculum" not in spec.recipe and data not in str(spec.recipe)
    real = {image.tobytes() for image in load_data(data, "train").images.numpy()}
    assert all(image.tobytes() in real for image in bank.column("images"))


def test_random_real_with_a_teacher_has_its_logits(data, teacher, tmp_path):
    bank = engine.synthesize(config(teacher, tmp_path / "bank", "random_real", data=data, images=25))
    assert bank.has("logits") and bank.spec.label_kind == "real" and bank.spec.teacher["arch"] == "lenet5_bn"
    assert np.bincount(bank.column("labels"), minlength=10).max() == 3


def test_another_data_set_may_not_go_on(data, teacher, tmp_path):
    out = tmp_path / "bank"
    engine.synthesize(config(None, out, "random_real", data=data, shards="1/2"))
    moved = tmp_path / "moved"
    moved.mkdir()
    other = save_npz(moved, per_class=13)
    with pytest.raises(BankMismatchError, match=r"recipe.data.images: 120 -> 130"):
        engine.synthesize(config(None, out, "random_real", data=other, shards="2/2"))
    same = save_npz(moved)
    assert engine.synthesize(config(None, out, "random_real", data=same, shards="2/2")).complete


def test_a_bank_as_data_hands_on_what_it_is(data, tmp_path):
    """Random images of a synthetic bank are not real; those of a bank of real images are."""
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    made = bank_from_arrays(tmp_path / "made", images, np.arange(40) % 10, num_classes=10, mean=[0.5], std=[0.5],
                            label_kind="argmax")  # fmt: skip
    spec = engine.synthesize(config(None, tmp_path / "a", "random_real", data=f"bank:{made.path}", images=20)).spec
    assert (spec.contains_real, spec.real_data_used, spec.label_kind) == (False, False, "argmax")
    assert spec.parents[0]["uuid"] == made.record["uuid"]
    engine.synthesize(config(None, tmp_path / "b", "random_real", data=data, images=40))
    spec = engine.synthesize(config(None, tmp_path / "c", "random_real", data=f"bank:{tmp_path / 'b'}", images=20)).spec
    assert spec.contains_real and spec.real_data_used and spec.label_kind == "real"


def test_noise_takes_only_the_size_from_data(data, tmp_path):
    bank = engine.synthesize(config(None, tmp_path / "bank", data=data, images=20))
    assert bank.shape == (1, 32, 32) and bank.spec.label_kind == "none" and not bank.has("labels")
    assert not bank.spec.contains_real and not bank.spec.real_data_used


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"method": "cudfkd"}, ConfigError, "--teacher is needed by method cudfkd"),
        ({"method": "random_real"}, ConfigError, "--data is needed by method random_real"),
        ({"method": "noise"}, RequirementError, "give --teacher, or --data"),
        ({"method": "noise", "ipc": 2}, ConfigError, "--images and --ipc exclude each other"),
        ({"method": "noise", "eval_data": "mnist:DIR"}, ConfigError, "there is no --teacher"),
        ({"method": "noise", "images": 0}, ConfigError, "images: must be at least 1"),
    ],
)
def test_what_is_missing_is_said_with_the_remedy(changes, error, said, tmp_path):
    with pytest.raises(error, match=said):
        engine.synthesize(parse_config("synthesize", {**SMALL, "out": str(tmp_path / "bank"), **changes}))
    assert not (tmp_path / "bank").exists()


def test_real_data_for_a_method_that_does_not_look_at_it(data, teacher, tmp_path):
    with pytest.raises(RequirementError, match="does not look at real data"):
        engine.synthesize(config(teacher, tmp_path / "bank", data=data))


def test_too_few_images_of_a_class(data, tmp_path):
    with pytest.raises(DataError, match="has 12 images, 13 are asked for"):
        engine.synthesize(config(None, tmp_path / "bank", "random_real", data=data, images=None, ipc=13))
    assert not (tmp_path / "bank").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_in_the_middle_of_a_run(teacher, whole, tmp_path, monkeypatch, capsys):
    """Exit code 1, a message with the remedy, whole shards; with room again --resume ends with the same bytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("may not mount here")
    words, real = command_line(teacher, disk / "bank"), Noise.rows

    def rows(self: Noise, start: int, count: int) -> Any:
        if start == 30:
            (disk / "ballast").write_bytes(b"\0" * (shutil.disk_usage(disk).free - (8 << 10)))
        return real(self, start, count)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Noise, "rows", rows)
            assert main(words) == 1
        said = capsys.readouterr().err
        assert "the disk is full" in said and "--resume" in said and "Traceback" not in said
        assert sorted(shard_hashes(disk / "bank")) == [0, 1, 2] and Bank(disk / "bank").verify(deep=True).ok
        (disk / "ballast").unlink()
        assert main([*words, "--resume"]) == 0
        assert shard_hashes(disk / "bank") == shard_hashes(whole.path)
        assert not [p for p in disk.rglob("*") if ".tmp-" in p.name]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_under_torchrun_every_rank_is_a_worker(data, tmp_path):
    """Two ranks of one command: the bank of one process, and no rank in the way of another."""
    out = tmp_path / "bank"
    words = ["synthesize", "--method", "noise", "--data", data, "--images", "74", "--images_per_shard", "10",
             "--method.batch_size", "4", "--device", "cpu", "--threads", "1", "--out", str(out)]  # fmt: skip
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "synthkit"]
    done = subprocess.run([*start, *words], env=ENV, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(p.name for p in (out / "workers").iterdir()) == ["1-of-2", "2-of-2"]
    alone = engine.synthesize(config(None, tmp_path / "alone", data=data))
    assert shard_hashes(out) == shard_hashes(alone.path) and Bank(out).complete
