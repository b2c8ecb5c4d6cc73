"""Damage byte by byte: every kind of file of a bank cut at every kind of boundary and flipped in every byte class.

Twice: by accident (the records are honest, so every change is found by hash or size), and by an attacker (the records
vouch for the changed bytes, so they reach the parsers).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from synthkit.bank import Bank, BankWriter
from synthkit.bank.checking.verify import verify
from synthkit.errors import BankError

from .forge import assert_damaged, digest, edit_json, memory_bounded, read_all, small_bank, vouch


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A sealed bank with every kind of part."""
    writer = small_bank(tmp_path_factory.mktemp("whole") / "bank")
    for index in (0, 1):
        writer.save_state(index, {"w": np.arange(6.0).reshape(2, 3), "step": np.int64(index)}, {"note": "x"})
        writer.write_generator(index, {"w": np.ones((4, 4), "f4")}, {"arch": "g"})
    assert verify(writer.path, deep=True).ok
    return writer.path


@pytest.fixture
def bank(whole, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(whole, tmp_path / "bank"))


def byte_classes(bank: Path, index: int) -> dict[str, range]:
    """Where what lies in a shard: superblock, headers, the data of each column, padding between and after."""
    sidecar = Bank(bank).sidecars[index]
    places = sorted(
        (p.offset, p.offset + int(np.prod(p.shape)) * p.dtype.itemsize, n) for n, p in sidecar.datasets.items()
    )
    classes = {"superblock": range(0, 48), "root header and heap": range(48, places[0][0] - 512),
               "before the first column": range(places[0][0] - 512, places[0][0])}  # fmt: skip
    for i, (start, end, name) in enumerate(places):
        classes[f"data of {name}"] = range(start, end)
        follower = places[i + 1][0] if i + 1 < len(places) else sidecar.bytes
        if follower > end:
            classes[f"after {name}"] = range(end, follower)
    return {name: span for name, span in classes.items() if len(span)}


def flipped(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def samples(span: range, count: int = 3) -> list[int]:
    """First, last and some between, always the same ones."""
    inner = np.random.default_rng(len(span)).integers(span.start, span.stop, count).tolist()
    return sorted({span.start, span[-1], *inner})


def test_every_class_of_bytes_exists(whole):
    names = byte_classes(whole, 0)
    assert {"superblock", "data of images", "data of labels", "data of logits", "data of origin_seed"} <= set(names)
    assert any(name.startswith("after") for name in names), names


def test_flip_in_every_class_of_a_shard(bank):
    """By accident: the hash finds every one, and the shard is named."""
    file = BankWriter(bank).shard_path(1)
    honest = file.read_bytes()
    for name, span in byte_classes(bank, 1).items():
        for position in samples(span):
            file.write_bytes(flipped(honest, position, position % 8))
            report = verify(bank)
            assert report.damaged_shards == [1] and "sha256" in report.problems["shard 1"][0], (name, position)
    file.write_bytes(honest)
    assert verify(bank, deep=True).ok


def test_flip_vouched_for_in_every_class_of_a_shard(bank):
    """By an attacker: accepted and harmless to read, or refused with a typed error; nothing else."""
    writer = BankWriter(bank)
    honest, outcomes = writer.shard_path(1).read_bytes(), {True: 0, False: 0}
    with memory_bounded():
        for span in byte_classes(bank, 1).values():
            for position in samples(span, 12):
                for bit in (0, 7):
                    vouch(writer, 1, flipped(honest, position, bit))
                    report = verify(bank, deep=True)
                    assert set(report.problems) <= {"shard 1"}, report.problems
                    outcomes[report.ok] += 1
                    assert read_all(bank) == 20
    assert min(outcomes.values()) > 10, outcomes  # pixels may be anything, headers may not


@pytest.mark.parametrize("vouched", [False, True])
def test_truncation_of_a_shard(bank, vouched):
    writer = BankWriter(bank)
    honest = writer.shard_path(0).read_bytes()
    last = max(s.stop for n, s in byte_classes(bank, 0).items() if n.startswith("data of"))
    edges = {0, 1, 8, 47, 48, 95, 96, 511, 512, 513, 2047, len(honest) - 1}
    for span in byte_classes(bank, 0).values():
        edges |= {span.start, span.start + 1, span.stop - 1, span.start + len(span) // 2}
    for edge in sorted(e for e in edges if e < len(honest)):
        if vouched:
            vouch(writer, 0, honest[:edge])
        else:
            writer.shard_path(0).write_bytes(honest[:edge])
        with memory_bounded():
            report = verify(bank, deep=True)
        assert report.damaged_shards == [0], edge
        if vouched and edge >= last:  # only padding is gone: every column is still there to be read by its offset
            assert read_all(bank) == 20
            continue
        with pytest.raises(BankError):
            read_all(bank)


def test_truncation_vouched_for_in_the_sandbox(bank):
    writer = BankWriter(bank)
    vouch(writer, 0, writer.shard_path(0).read_bytes()[:700])
    assert_damaged(bank, "shard 0", "outside the file")


JSON_FILES = ["bank.json", "manifest.json", "shards/00000.json", "state/00001.json", "generators/00000.json"]


@pytest.mark.parametrize("name", JSON_FILES)
def test_truncation_of_a_record(bank, name):
    file = bank / name
    honest = file.read_bytes()
    for edge in {0, 1, 2, len(honest) // 2, len(honest) - 2, len(honest) - 3}:
        file.write_bytes(honest[:edge])
        if name == "bank.json":
            for untrusted in (False, True) if edge == 1 else (False,):
                with pytest.raises(BankError, match="bank.json"):
                    verify(bank, untrusted=untrusted)
        else:
            assert not verify(bank).ok, edge
    file.write_bytes(honest[:-1])  # the last line feed means nothing to a parser; the manifest hashes it all the same
    if name != "bank.json":
        assert verify(bank).ok == name.startswith(("manifest", "state"))


@pytest.mark.parametrize("name", JSON_FILES)
def test_flips_in_a_record(bank, name):
    """Every flip of a sealed bank's records is found; a state's record has no seal, its flips are typed or harmless."""
    file = bank / name
    honest = file.read_bytes()
    meaning = json.loads(honest)
    for position in samples(range(len(honest)), 60):
        changed = flipped(honest, position, position % 7)
        file.write_bytes(changed)
        try:
            report = verify(bank)
        except BankError:
            assert name == "bank.json"
            continue
        try:
            same = json.loads(changed) == meaning
        except ValueError:
            same = False
        if not name.startswith("state"):
            assert same or not report.ok, (position, changed[max(0, position - 20) : position + 20])
    file.write_bytes(honest)
    assert verify(bank).ok


@pytest.mark.parametrize("folder", ["state", "generators"])
def test_flips_and_cuts_of_arrays(bank, folder):
    """Safetensors: by accident found by hash; vouched for by an attacker, typed or harmless."""
    file = bank / folder / "00000.safetensors"
    honest = file.read_bytes()
    header = int.from_bytes(honest[:8], "little")
    places = [*range(0, 8), *samples(range(8, 8 + header), 20), *samples(range(8 + header, len(honest)), 4)]
    for position in places:
        changed = flipped(honest, position, position % 8)
        file.write_bytes(changed)
        assert "sha256" in str(verify(bank).problems[f"{folder} 0"])
        edit_json(file.with_suffix(".json"), sha256=digest(changed))
        with memory_bounded():
            verify(bank)  # whatever it finds, it does not raise
    for cut in (0, 7, 8, 9, 8 + header, len(honest) - 1):
        file.write_bytes(honest[:cut])
        edit_json(file.with_suffix(".json"), sha256=digest(honest[:cut]), bytes=cut)
        assert verify(bank).problems[f"{folder} 0"], cut
    huge = (2**63 - 1).to_bytes(8, "little") + honest[8:]
    lies = b'{"w":{"dtype":"F64","shape":[1000000000000],"data_offsets":[0,8000000000000]}}'
    for data in (huge, len(lies).to_bytes(8, "little") + lies, (len(lies) + 5).to_bytes(8, "little") + lies):
        file.write_bytes(data)
        edit_json(file.with_suffix(".json"), sha256=digest(data), bytes=len(data))
        with memory_bounded():
            assert "safetensors" in str(verify(bank).problems[f"{folder} 0"])


def test_size_is_checked_when_a_bank_is_opened_for_reading(bank):
    """A shard that is shorter than its record is refused before a map of it exists (later cuts: see the reader)."""
    opened = Bank(bank)
    shard = BankWriter(bank).shard_path(1)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(BankError, match=r"00001\.h5"):
        opened.column("images")
    with pytest.raises(BankError, match=r"00001\.h5"):
        opened.batch([0])


@pytest.mark.parametrize("cut", [0, 100, 700])
def test_a_shard_that_is_cut_while_it_is_read(bank, cut):
    """By somebody else, after it was opened: `mapped=False` makes that a typed error (a map would end in SIGBUS)."""
    opened = Bank(bank, mapped=False)
    honest = opened.batch([0, 15]).images
    shard = BankWriter(bank).shard_path(1)
    with open(shard, "r+b") as file:
        file.truncate(cut)
    with pytest.raises(BankError, match=r"00001\.h5"):
        opened.batch(range(10, 20))
    assert honest is not None and np.array_equal(opened.batch([0]).images, honest[:1])  # the other shard still reads
