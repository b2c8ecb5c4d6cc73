from __future__ import annotations

import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from synthkit.bank import Bank, BankBusyError, BankWriter
from synthkit.bank.checking.repair import repair
from synthkit.bank.checking.verify import verify
from synthkit.errors import BankError

from .banks import SHAPE, fill, make_bank, make_spec, shard_arrays
from .test_writer import hashes


def test_whole_bank(tmp_path):
    make_bank(tmp_path / "b")
    report = verify(tmp_path / "b", deep=True)
    assert report.ok and report.complete and report.committed == list(range(6)) and report.notes == []
    assert report.bytes_read == sum(p.stat().st_size for p in (tmp_path / "b" / "shards").glob("*.h5"))
    report.raise_if_damaged()


def test_unfinished_is_not_damaged(tmp_path):
    writer = BankWriter.create(tmp_path / "b", make_spec())
    fill(writer, [0, 2])
    writer.shard_path(1).write_bytes(b"killed between the two renames")
    report = verify(tmp_path / "b")
    assert report.ok and not report.complete and report.missing == [1, 3, 4, 5]
    assert any("shard 1 has a file but no record" in n for n in report.notes)
    fill(writer)
    assert verify(tmp_path / "b", deep=True).ok


@pytest.mark.parametrize("where", [0, 100, 700, 2048, 2500, -200, -1])
def test_flipped_bit(tmp_path, where):
    writer = make_bank(tmp_path / "b")
    data = bytearray(writer.shard_path(2).read_bytes())
    data[where] ^= 1
    writer.shard_path(2).write_bytes(data)
    report = verify(tmp_path / "b")
    assert report.damaged_shards == [2] and "sha256" in report.problems["shard 2"][0]
    with pytest.raises(BankError, match="shard 2.*repair"):
        report.raise_if_damaged()


def test_every_kind_of_loss_is_listed(tmp_path):
    writer = make_bank(tmp_path / "b")
    with open(writer.shard_path(0), "r+b") as file:
        file.truncate(500)
    writer.shard_path(1).unlink()
    writer.sidecar_path(2).write_text("{garbage")
    writer.sidecar_path(3).unlink()  # the manifest still tells of it
    report = Bank.verify(_opened(tmp_path / "b", writer), deep=True)
    assert report.damaged_shards == [0, 1, 2, 3]
    assert "500 bytes" in report.problems["shard 0"][0] and "missing" in report.problems["shard 1"][0]
    assert "not readable JSON" in report.problems["shard 2"][0] and "record is gone" in report.problems["shard 3"][0]


def _opened(path: Path, writer: BankWriter) -> Bank:
    """A bank that was opened before it was damaged."""
    bank = object.__new__(Bank)
    bank.path, bank.spec = path, writer.spec
    return bank


def test_repair_and_resume_give_the_same_bank(tmp_path):
    writer = make_bank(tmp_path / "b")
    before, root = hashes(tmp_path / "b"), Bank(tmp_path / "b").info()["root"]
    damaged = writer.shard_path(4).read_bytes()[:-10]
    writer.shard_path(4).write_bytes(damaged)
    writer.sidecar_path(1).write_text("[]")
    report = repair(tmp_path / "b")
    assert report.remake == [1, 4]
    assert (tmp_path / "b" / "quarantine" / "shards" / "00004.h5").read_bytes() == damaged  # nothing is deleted
    assert verify(tmp_path / "b").ok and not verify(tmp_path / "b").complete
    resumed = BankWriter.open(tmp_path / "b", expect=make_spec())
    assert resumed.missing() == [1, 4]
    fill(resumed)
    assert hashes(tmp_path / "b") == before and Bank(tmp_path / "b").info()["root"] == root
    assert verify(tmp_path / "b", deep=True).ok


def test_repair_twice_keeps_both(tmp_path):
    writer = make_bank(tmp_path / "b")
    for text in (b"first", b"second"):
        writer.shard_path(0).write_bytes(text)
        repair(tmp_path / "b")
        fill(BankWriter.open(tmp_path / "b"))
    kept = sorted((tmp_path / "b" / "quarantine" / "shards").glob("00000.h5*"))
    assert [p.read_bytes() for p in kept] == [b"first", b"second"]
    assert repair(tmp_path / "b").moved == []


def test_repair_needs_the_lock(tmp_path):
    writer = make_bank(tmp_path / "b")
    with writer.lock(), pytest.raises(BankBusyError):
        repair(tmp_path / "b")


def test_damaged_state_and_manifest(tmp_path):
    writer = make_bank(tmp_path / "b")
    writer.save_state(6, {"a": np.zeros(3)}, {})
    (tmp_path / "b" / "state" / "00006.safetensors").write_bytes(b"x")
    (tmp_path / "b" / "manifest.json").write_text("{}")
    report = verify(tmp_path / "b")
    assert sorted(report.problems) == ["manifest", "state 6"]
    repair(tmp_path / "b")
    assert verify(tmp_path / "b").ok
    BankWriter.open(tmp_path / "b")
    assert (tmp_path / "b" / "manifest.json").exists()


def replace_shard(writer: BankWriter, index: int, path: Path, **record) -> None:
    """Put the file `path` in the place of a shard with a record that vouches for it (an attacker can)."""
    data = path.read_bytes()
    writer.shard_path(index).write_bytes(data)
    sidecar = json.loads(writer.sidecar_path(index).read_text())
    sidecar.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), **record)
    writer.sidecar_path(index).write_text(json.dumps(sidecar))
    (writer.path / "manifest.json").unlink(missing_ok=True)


def layout_of(path: Path) -> dict:
    with h5py.File(path, "r") as file:
        return {
            name: {"offset": d.id.get_offset() or 0, "shape": list(d.shape), "dtype": d.dtype.str}
            for name, d in file.items() if isinstance(d, h5py.Dataset)
        }  # fmt: skip


@pytest.mark.parametrize("attack, message", [
    ("external", "in another file"), ("virtual", "in another file"), ("chunked", "not contiguous"),
    ("compressed", "not contiguous"), ("soft", "hard links only"), ("external_link", "hard links only"),
    ("extra", "other datasets"), ("attr", "attributes"),
])  # fmt: skip
def test_hostile_hdf5(tmp_path, attack, message):
    writer = make_bank(tmp_path / "b")
    arrays = {k: v for k, v in shard_arrays(writer.spec, 0).items() if k in ("images", "labels")}
    arrays["labels"] = arrays["labels"].astype("<i4")
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(2000))
    evil = tmp_path / "evil.h5"
    with h5py.File(evil, "w") as file:
        file["labels"] = arrays["labels"]
        shape = (10, *SHAPE)
        if attack == "external":
            file.create_dataset("images", shape, "u1", external=[(str(secret), 0, 900)])
        elif attack == "virtual":
            layout = h5py.VirtualLayout(shape, "u1")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", shape)
            file.create_virtual_dataset("images", layout)
        elif attack in ("chunked", "compressed"):
            options = {"compression": "gzip"} if attack == "compressed" else {}
            file.create_dataset("images", data=arrays["images"], chunks=(5, *SHAPE), **options)
        elif attack == "soft":
            file["images"] = h5py.SoftLink("/labels")
        elif attack == "external_link":
            file["images"] = h5py.ExternalLink(str(secret), "/images")
        else:
            file["images"] = arrays["images"]
            if attack == "extra":
                file["payload"] = np.zeros(3)
            else:
                file["images"].attrs["x"] = 1
                file.attrs["x"] = 1
    if attack in ("soft", "external_link"):
        record = {"labels": {"offset": 2048, "shape": [10], "dtype": "<i4"}}
    else:
        record = layout_of(evil)
        record.pop("payload", None)
    record["images"] = {"offset": record["labels"]["offset"] + 64, "shape": list((10, *SHAPE)), "dtype": "|u1"}
    if attack in ("extra", "attr"):
        record["images"]["offset"] = layout_of(evil)["images"]["offset"]
    with open(evil, "ab") as file:  # long enough for the claimed offsets
        file.write(bytes(3000))
    replace_shard(writer, 0, evil, datasets=record)
    report = verify(tmp_path / "b")
    assert report.damaged_shards == [0] and message in report.problems["shard 0"][0], report.problems


def test_not_hdf5_at_all(tmp_path):
    writer = make_bank(tmp_path / "b")
    junk = tmp_path / "junk"
    junk.write_bytes(bytes(writer.shard_path(0).stat().st_size))
    replace_shard(writer, 0, junk)
    assert "not readable HDF5" in verify(tmp_path / "b").problems["shard 0"][0]


@pytest.mark.parametrize("column, value", [("labels", 99), ("logits", np.nan), ("difficulty", np.inf), ("labels", 1)])
def test_deep_looks_at_values(tmp_path, column, value):
    writer = make_bank(tmp_path / "b")
    copy = tmp_path / "copy.h5"
    copy.write_bytes(writer.shard_path(0).read_bytes())
    with h5py.File(copy, "r+") as file:
        file[column][:] = value
    replace_shard(writer, 0, copy)
    assert verify(tmp_path / "b").ok
    assert verify(tmp_path / "b", deep=True).damaged_shards == [0]


def test_sealed_shard_cannot_be_exchanged(tmp_path):
    writer = make_bank(tmp_path / "b")
    seal = (tmp_path / "b" / "manifest.json").read_bytes()
    copy = tmp_path / "copy.h5"
    copy.write_bytes(writer.shard_path(0).read_bytes())
    with h5py.File(copy, "r+") as file:
        file["images"][0] = 0
    replace_shard(writer, 0, copy)
    (tmp_path / "b" / "manifest.json").write_bytes(seal)
    assert "sealed" in verify(tmp_path / "b").problems["shard 0"][0]
