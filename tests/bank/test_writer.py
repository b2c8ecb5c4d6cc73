from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

import synthkit
from synthkit.bank import Bank, BankBusyError, BankMismatchError, BankNotFoundError, BankSpec, BankWriter
from synthkit.bank.disk import storage as storage_module
from synthkit.bank.disk.lock import read_claims
from synthkit.bank.disk.storage import host
from synthkit.errors import (
    BankError,
    ConfigError,
    NonFiniteError,
    OutputExistsError,
    StorageError,
    UsageError,
)

from .banks import CLASSES, SHAPE, fill, make_bank, make_spec, shard_arrays, whole

ROOT = Path(synthkit.__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def hashes(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((path / "shards").glob("*.h5"))}


def temps(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if ".tmp-" in p.name]


def test_round_trip(tmp_path):
    writer = make_bank(tmp_path / "b")
    assert (writer.shards, writer.shard_size(0), writer.shard_size(5)) == (6, 10, 3)
    assert writer.committed() == list(range(6)) and writer.missing() == []
    bank = Bank(tmp_path / "b")
    assert len(bank) == 53 and bank.complete
    for name in ("images", "labels", "logits", "difficulty", "origin_step", "origin_seed"):
        assert np.array_equal(bank.column(name), whole(writer.spec, name)), name
    assert bank.column("logits").dtype == np.float16 and bank.column("labels").dtype == np.int32
    assert bank.spec == writer.spec


def test_shard_is_plain_hdf5(tmp_path):
    """Any HDF5 reader sees the same arrays, contiguous and unfiltered, at the recorded aligned offsets."""
    writer = make_bank(tmp_path / "b")
    expected = shard_arrays(writer.spec, 2)
    sidecar = json.loads(writer.sidecar_path(2).read_text())
    with h5py.File(writer.shard_path(2), "r") as file:
        assert sorted(file) == sorted(expected)
        for name, values in expected.items():
            dataset = file[name]
            assert np.array_equal(dataset[()], values)
            assert dataset.chunks is None and dataset.compression is None
            assert dataset.id.get_offset() == sidecar["datasets"][name]["offset"]
            assert dataset.id.get_offset() % 64 == 0
    assert hashes(tmp_path / "b")["00002.h5"] == sidecar["sha256"]


def test_bytes_depend_on_the_arrays_alone(tmp_path):
    make_bank(tmp_path / "a")
    time.sleep(1.1)  # HDF5 keeps times in seconds
    writer = BankWriter.create(tmp_path / "b", make_spec())
    fill(writer, [5, 2, 0])
    fill(BankWriter.open(tmp_path / "b"))
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert Bank(tmp_path / "a").info()["root"] == Bank(tmp_path / "b").info()["root"]
    assert Bank(tmp_path / "a").record["uuid"] != Bank(tmp_path / "b").record["uuid"]


def test_sidecar_facts_by_hand(tmp_path):
    spec = make_spec(images=4, images_per_shard=4)
    logits = np.log(np.array([[7, 1, 1, 1], [1, 7, 1, 1], [1, 1, 7, 1], [1, 1, 1, 7]], dtype=np.float32))
    sidecar = BankWriter.create(tmp_path / "b", spec).write_shard(0, {
        "images": np.zeros((4, *SHAPE), np.uint8), "labels": np.array([0, 1, 2, 0]), "logits": logits,
        "difficulty": np.array([1.0, 2.0, 3.0, 4.0]), "origin_step": np.array([5, 9, 7, 6]), "origin_seed": 3,
    }, {"note": Path("x")})  # fmt: skip
    assert sidecar["label_histogram"] == [2, 1, 1, 0]
    assert sidecar["argmax_matches"] == 3 and sidecar["teacher_agreement"] == 0.75
    assert sidecar["mean_confidence"] == pytest.approx(0.7, abs=1e-3)
    assert sidecar["mean_difficulty"] == 2.5 and sidecar["difficulty_range"] == [1.0, 4.0]
    assert sidecar["step_range"] == [5, 9] and sidecar["meta"] == {"note": "x"}
    assert Bank(tmp_path / "b").column("origin_seed").tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("change, error", [
    ({"images": np.zeros((10, *SHAPE), np.float32)}, UsageError),
    ({"images": np.zeros((9, *SHAPE), np.uint8)}, UsageError),
    ({"labels": np.full(10, CLASSES)}, UsageError),
    ({"labels": np.full(10, -1)}, UsageError),
    ({"labels": np.zeros(10)}, UsageError),
    ({"labels": None}, UsageError),
    ({"logits": np.full((10, CLASSES), np.nan)}, NonFiniteError),
    ({"logits": np.full((10, CLASSES), 1e6)}, NonFiniteError),
    ({"logits": np.zeros((10, CLASSES + 1))}, UsageError),
    ({"difficulty": np.full(10, np.inf)}, NonFiniteError),
    ({"origin_step": np.full(10, 2**40)}, UsageError),
    ({"labls": np.zeros(10)}, UsageError),
])  # fmt: skip
def test_bad_arrays_write_nothing(tmp_path, change, error):
    writer = BankWriter.create(tmp_path / "b", make_spec())
    with pytest.raises(error):
        writer.write_shard(0, {**shard_arrays(writer.spec, 0), **change})
    assert writer.committed() == [] and not (tmp_path / "b" / "shards").exists()


def test_unknown_column_offers_the_nearest(tmp_path):
    writer = BankWriter.create(tmp_path / "b", make_spec())
    with pytest.raises(UsageError, match="did you mean 'difficulty'"):
        writer.write_shard(0, {**shard_arrays(writer.spec, 0), "dificulty": np.zeros(10)})


def test_shards_are_immutable(tmp_path):
    writer = make_bank(tmp_path / "b")
    before = hashes(tmp_path / "b")
    again = writer.write_shard(1, shard_arrays(writer.spec, 1))  # equal bytes: a run that re-makes a neighbour
    assert again["sha256"] == before["00001.h5"]
    with pytest.raises(BankError, match="immutable"):
        writer.write_shard(1, shard_arrays(writer.spec, 0))
    with pytest.raises(ConfigError):
        writer.write_shard(6, shard_arrays(writer.spec, 0))
    assert hashes(tmp_path / "b") == before


def test_create_refuses_what_is_there(tmp_path):
    make_bank(tmp_path / "b")
    with pytest.raises(OutputExistsError, match="--resume"):
        BankWriter.create(tmp_path / "b", make_spec())
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="thesis.txt"):
        BankWriter.create(tmp_path / "c", make_spec())
    (tmp_path / "f").write_text("x")
    with pytest.raises(OutputExistsError):
        BankWriter.create(tmp_path / "f", make_spec())
    (tmp_path / "empty").mkdir()
    assert BankWriter.create(tmp_path / "empty", make_spec()).missing() == list(range(6))


def test_open_needs_the_same_recipe(tmp_path):
    BankWriter.create(tmp_path / "b", make_spec())
    assert BankWriter.open(tmp_path / "b", expect=make_spec(extra={"note": 1})).shards == 6
    with pytest.raises(BankMismatchError, match=r"recipe.method.lr: 0.001 -> 0.01"):
        BankWriter.open(tmp_path / "b", expect=make_spec(recipe={"method": {"name": "cudfkd", "lr": 0.01}}))
    with pytest.raises(BankMismatchError, match="seed: 7 -> 8"):
        BankWriter.open_or_create(tmp_path / "b", make_spec(seed=8))
    with pytest.raises(BankNotFoundError):
        BankWriter.open(tmp_path / "nothing")
    assert BankWriter.open_or_create(tmp_path / "new", make_spec()).shards == 6


@pytest.mark.parametrize("change", [
    {"shape": (3, 0, 5)}, {"shape": (3, 5)}, {"num_classes": 0}, {"mean": [0.1]}, {"std": [0.1, 0.0, 0.1]},
    {"std": [0.1, float("nan"), 0.1]}, {"images": 0}, {"images": 2.5}, {"images_per_shard": 0},
    {"images": 2**40, "images_per_shard": 1}, {"seed": -1},
    {"label_kind": "argmx"}, {"class_names": ["one"]}, {"recipe": []}, {"real_data_used": "no"},
])  # fmt: skip
def test_bad_spec(change):
    with pytest.raises(ConfigError):
        make_spec(**change)


def test_spec_values_must_have_a_json_form():
    with pytest.raises(UsageError, match="recipe.lr"):
        make_spec(recipe={"lr": float("inf")})
    with pytest.raises(UsageError, match=r"recipe.thing"):
        make_spec(recipe={"thing": object()})
    assert make_spec(recipe={"size": (1, np.int64(2))}).recipe == {"size": [1, 2]}


def test_plan():
    assert make_spec(images=1000, images_per_shard=None).shards == 20
    big = make_spec(shape=(3, 224, 224), images=1_000_000, images_per_shard=None)
    assert big.image_bytes * big.per_shard <= 64 << 20 and big.shards * big.per_shard >= 1_000_000
    assert make_spec(images=3, images_per_shard=None).shards == 3


def test_create_refuses_a_bank_that_does_not_fit(tmp_path):
    with pytest.raises(StorageError, match="free there"):
        BankWriter.create(tmp_path / "b", make_spec(images=10**12, images_per_shard=10**8))
    assert not (tmp_path / "b").exists()


STEPS = [("fsync", 0), ("link", 0), ("fsync", 1), ("fsync", 2), ("link", 1), ("fsync", 3)]


@pytest.mark.parametrize(("call", "at"), STEPS)
def test_disk_full_at_every_step(tmp_path, monkeypatch, call, at):
    """The k-th fsync or link of a shard fails: typed error, no temporary, not committed; a retry works."""
    writer = BankWriter.create(tmp_path / "b", make_spec(images=20))
    (tmp_path / "b" / "shards").mkdir()
    real, seen = getattr(os, call), []

    def failing(*args):
        seen.append(args)
        if len(seen) == at + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(storage_module.os, call, failing)
        with pytest.raises(StorageError, match="disk is full"):
            writer.write_shard(0, shard_arrays(writer.spec, 0))
    assert temps(tmp_path) == []
    last = (call, at) == STEPS[-1]  # only the folder's last fsync comes after the commit point
    assert writer.committed() == ([0] if last else [])
    if not last:
        assert not writer.shard_path(0).exists()
    writer.write_shard(0, shard_arrays(writer.spec, 0))
    fill(writer)
    assert Bank(tmp_path / "b").verify(deep=True).ok


def test_file_size_limit_in_a_real_process(tmp_path):
    code = """
import resource, sys
from pathlib import Path
from synthkit.bank import BankSpec, BankWriter
import numpy as np
spec = BankSpec(shape=(3, 64, 64), num_classes=2, mean=[0.]*3, std=[1.]*3, images=20, images_per_shard=10)
w = BankWriter.create(sys.argv[1], spec)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
from synthkit.errors import StorageError
try:
    w.write_shard(0, {"images": np.zeros((10, 3, 64, 64), np.uint8), "labels": np.zeros(10, int)})
except StorageError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], env=ENV, capture_output=True, text=True)
    assert "refused:" in done.stdout and "size limit" in done.stdout, done.stderr
    assert [p.name for p in (tmp_path / "b").rglob("*") if p.is_file()] == ["bank.json"]


def test_read_only_folder(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)  # the tests may run as root, who may write everywhere
    with pytest.raises(StorageError, match="no permission"):
        BankWriter.create(tmp_path / "b", make_spec())


def test_stale_temporaries_of_dead_processes_go(tmp_path):
    writer = BankWriter.create(tmp_path / "b", make_spec())
    fill(writer, [0])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = tmp_path / "b" / "shards"
    mine, gone = folder / f"00001.h5.tmp-{host()}-{dead.pid}", folder / "00001.h5.tmp-otherhost-1"
    alive = folder / f"00002.h5.tmp-{host()}-{os.getppid()}"
    for path in (mine, gone, alive):
        path.write_bytes(b"half")
    namesake = folder / f"00003.h5.tmp-{host()}-{os.getpid()}"  # a container gives each run the same pid
    namesake.write_bytes(b"half")
    os.utime(namesake, (1, 1))
    BankWriter.open(tmp_path / "b")
    assert not mine.exists() and not namesake.exists()
    assert gone.exists() and alive.exists()


def test_create_after_a_kill_in_its_first_write(tmp_path):
    (tmp_path / "b").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "b" / f"bank.json.tmp-{host()}-{dead.pid}").write_text("{")
    BankWriter.open_or_create(tmp_path / "b", make_spec())
    assert temps(tmp_path) == []


def test_lock_says_who_holds_it(tmp_path):
    writer = BankWriter.create(tmp_path / "b", make_spec())
    other = BankWriter.open(tmp_path / "b")
    with writer.lock(), pytest.raises(BankBusyError, match=f"pid {os.getpid()} on host"), other.lock():
        pass
    with writer.lock():  # released
        pass


def test_lock_of_a_killed_run_is_taken_over(tmp_path):
    writer = BankWriter.create(tmp_path / "b", make_spec())
    code = """
import sys, time
from synthkit.bank import BankWriter
with BankWriter.open(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "b")], env=ENV, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(BankBusyError, match=f"pid {child.pid} "), writer.lock():
        pass
    child.kill()
    child.wait()
    child.stdout.close()
    with writer.lock():
        assert [holder.facts["pid"] for holder in read_claims(tmp_path / "b")] == [os.getpid()]


def test_states(tmp_path):
    writer = BankWriter.create(tmp_path / "b", make_spec())
    assert writer.load_state() is None
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T, "n": np.array(5), "mask": np.array([True, False])}
    for index in range(4):
        writer.save_state(index, {**arrays, "i": np.array([index])}, {"step": index, "rng": 2**100})
        writer.write_shard(index, shard_arrays(writer.spec, index))
    writer.save_state(4, {"i": np.array([4])}, {})
    writer.save_state(5, {"i": np.array([5])}, {})  # saved before its shard was committed: not reached
    found = writer.load_state()
    assert found is not None and found[0] == 4
    (tmp_path / "b" / "state" / "00004.json").unlink()  # a state without its record does not exist
    found = writer.load_state()
    assert found is not None
    index, loaded, meta = found
    assert index == 3 and meta == {"step": 3, "rng": 2**100}
    assert np.array_equal(loaded["w"], arrays["w"]) and loaded["n"].shape == () and loaded["mask"].dtype == bool
    (tmp_path / "b" / "state" / "00003.safetensors").write_bytes(b"rubbish")
    with pytest.warns(UserWarning, match="state 3 is damaged"):
        found = writer.load_state()
    assert found is not None and found[0] == 2
    writer.prune_states(keep=2)
    assert sorted(p.name for p in (tmp_path / "b" / "state").glob("*.json")) == ["00003.json", "00005.json"]
    with pytest.raises(UsageError):
        writer.prune_states(keep=0)
    with pytest.raises(UsageError):
        writer.save_state(6, {"o": np.array([object()])}, {})


def test_state_behind_a_lost_shard_is_not_used(tmp_path):
    writer = BankWriter.create(tmp_path / "b", make_spec())
    for index in range(3):
        writer.save_state(index, {"i": np.array([index])}, {})
        writer.write_shard(index, shard_arrays(writer.spec, index))
    writer.sidecar_path(1).unlink()
    found = writer.load_state()
    assert found is not None and found[0] == 1


def test_generators(tmp_path):
    writer = make_bank(tmp_path / "b")
    writer.write_generator(0, {"w": np.ones(3, np.float32)}, {"arch": "dcgan"})
    writer.write_generator(1, {"w": np.zeros(3, np.float32)}, {"arch": "dcgan", "step": 9})
    first, second = Bank(tmp_path / "b").generators()
    assert second.meta == {"arch": "dcgan", "step": 9} and first.load()["w"].tolist() == [1, 1, 1]
    second.path.write_bytes(second.path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BankError, match="sha256"):
        second.load()
    assert list(Bank(tmp_path / "b").verify().problems) == ["generators 1"]


def test_card_and_manifest_at_completion(tmp_path):
    spec = make_spec(class_names=["<script>alert(1)</script>", "[x](http://evil)", "a|b", "d\n# e"])
    writer = BankWriter.create(tmp_path / "b", spec)
    fill(writer, [0, 1, 2, 3, 4])
    assert not (tmp_path / "b" / "manifest.json").exists()
    fill(writer)
    card = (tmp_path / "b" / "README.md").read_text()
    assert "Made without any real data." in card and "<script>" not in card and "\n# e" not in card
    assert "\\[x\\](" in card and "a\\|b" in card
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert len(manifest["shards"]) == 6
    (tmp_path / "b" / "manifest.json").unlink()  # killed between the last sidecar and the seal
    BankWriter.open(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "manifest.json").read_text()) == manifest


def test_finish_needs_every_shard(tmp_path):
    writer = BankWriter.create(tmp_path / "b", make_spec())
    with pytest.raises(BankError, match="6 of 6 shards are missing"):
        writer.finish()


def test_spec_is_frozen():
    with pytest.raises(AttributeError):
        make_spec().seed = 1  # type: ignore[misc]
    assert isinstance(make_spec(), BankSpec)
