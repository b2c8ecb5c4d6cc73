from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from synthkit.bank import Bank, BankIndexError, BankNotFoundError, BankWriter
from synthkit.bank.make import bank_from_arrays, noise_images
from synthkit.bank.reading import pread
from synthkit.bank.reading.gather import RowGather
from synthkit.errors import BankError, OutputExistsError, UsageError

from .banks import CLASSES, SHAPE, fill, make_bank, make_spec, whole


@pytest.fixture
def bank(tmp_path):
    make_bank(tmp_path / "b")
    return Bank(tmp_path / "b")


def test_face(bank):
    assert bank.shape == SHAPE and bank.num_classes == CLASSES and bank.class_names == ["ant", "bee", "cat", "dog"]
    assert bank.mean == [0.5, 0.4, 0.3] and bank.std == [0.2, 0.2, 0.1] and bank.complete
    assert bank.has("logits") and not bank.has("embedding")
    assert repr(bank).endswith("53 images 3x6x5, 4 classes)")


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda v: np.array(v, np.uint64), lambda v: iter(v)])
def test_batch_gathers_in_any_order(bank, kind):
    rows = [52, 0, 9, 10, 10, 31, 49, 50]
    batch = bank.batch(kind(rows))
    assert len(batch) == 8
    for name in ("images", "labels", "logits", "difficulty", "origin_step"):
        assert np.array_equal(getattr(batch, name), whole(bank.spec, name)[rows]), name
    assert batch.origin_seed is None
    only = bank.batch(rows, columns=("labels", "origin_seed"))
    assert only.images is None and only.origin_seed.tolist() == [7] * 8


def test_batch_is_a_fresh_array(bank):
    first = bank.batch([1]).images
    first[:] = 0
    assert np.array_equal(bank.batch([1]).images, whole(bank.spec, "images")[[1]])
    copy = bank.column("labels")
    copy[:] = 0
    assert np.array_equal(bank.column("labels"), whole(bank.spec, "labels"))


@pytest.mark.parametrize("key, rows", [
    (slice(8, 12), [8, 9, 10, 11]), (slice(-2, None), [51, 52]), (slice(None, None, 25), [0, 25, 50]),
    (3, [3]), (-1, [52]), ([4, 2], [4, 2]), (slice(60, 70), []),
])  # fmt: skip
def test_getitem(bank, key, rows):
    assert np.array_equal(bank[key].images, whole(bank.spec, "images")[rows])


@pytest.mark.parametrize("indices", [
    [53], [-1], [0, 2**40], np.array([2**63], np.uint64), [0.5], [[1, 2]], ["a"], [True],
])  # fmt: skip
def test_bad_indices(bank, indices):
    with pytest.raises(BankIndexError):
        bank.batch(indices)
    with pytest.raises(IndexError):  # so that code which expects Python's own error works
        bank.batch(indices)


def test_single_index_out_of_range(bank):
    for index in (53, -54):
        with pytest.raises(BankIndexError, match="0 to 52"):
            bank[index]


def test_unknown_column(bank):
    with pytest.raises(UsageError, match="did you mean 'labels'"):
        bank.column("label")
    with pytest.raises(UsageError, match="embedding"):
        bank.batch([0], columns=("embedding",))


def test_empty_batch(bank):
    assert bank.batch([]).images.shape == (0, *SHAPE)


def test_unfinished_bank_reads_what_is_there(tmp_path):
    writer = BankWriter.create(tmp_path / "b", make_spec())
    bank = Bank(tmp_path / "b")
    assert len(bank) == 0 and not bank.complete and bank.columns == []
    with pytest.raises(BankError, match="no shard is committed"):
        bank.column("images")
    fill(writer, [1, 5, 3])
    bank = Bank(tmp_path / "b")
    assert len(bank) == 23 and "unfinished: 3 of 6" in repr(bank)
    rows = [*range(10, 20), *range(30, 40), 50, 51, 52]
    assert np.array_equal(bank.column("images"), whole(bank.spec, "images")[rows])
    assert np.array_equal(bank.batch([22, 10, 0]).images, whole(bank.spec, "images")[[52, 30, 10]])


def test_columns_are_those_of_every_shard(tmp_path):
    writer = BankWriter.create(tmp_path / "b", make_spec(images=20))
    fill(writer, [0])
    writer.write_shard(1, {"images": np.zeros((10, *SHAPE), np.uint8), "labels": np.zeros(10, int)})
    bank = Bank(tmp_path / "b")
    assert bank.columns == ["images", "labels"] and bank.batch([0]).logits is None


def test_order(bank):
    first = bank.order(0, 3)
    assert sorted(first.tolist()) == list(range(53))
    assert np.array_equal(first, bank.order(0, 3))
    assert not np.array_equal(first, bank.order(1, 3)) and not np.array_equal(first, bank.order(0, 4))
    # the raw bits of PCG64 are fixed by numpy for all releases; so is this order
    bits = np.random.PCG64(np.random.SeedSequence([3, 0])).random_raw(53).tolist()
    assert first.tolist() == sorted(range(53), key=lambda i: bits[i])


def test_batches_cover_the_bank_once(bank):
    seen = np.concatenate([b.difficulty for b in bank.batches(8, seed=1)])
    assert len(seen) == 53 and np.array_equal(np.sort(seen), np.sort(whole(bank.spec, "difficulty")))
    assert np.array_equal(np.concatenate([b.labels for b in bank.batches(8)]), whole(bank.spec, "labels"))
    with pytest.raises(UsageError):
        next(bank.batches(0))
    with pytest.raises(TypeError, match="bank.batches"):
        iter(bank)


def test_pickle_and_fork(bank):
    expected = bank.batch([5, 50]).images
    assert np.array_equal(pickle.loads(pickle.dumps(bank)).batch([5, 50]).images, expected)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if np.array_equal(bank.batch([5, 50]).images, expected) else 1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("shape", [(1, 7, 11), (3, 6, 5), (2, 1, 1)])
def test_gather_equals_a_plain_array(shape):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, (n, *shape), dtype=np.uint8) for n in (5, 1, 9, 4)]
    joined = np.concatenate(parts)
    gather = RowGather(parts)
    rows = rng.integers(0, 19, 200)
    assert gather._view is not None and len(gather) == 19
    assert np.array_equal(gather.rows(rows), joined[rows])
    assert np.array_equal(gather._grouped(rows), joined[rows])
    with pytest.raises(ValueError):
        gather._view[0] = 0  # read-only, like the maps below it


MODES = ["mapped", "read", "half"]


def opened(path, mode):
    """The bank at `path`, mapped, read by pread, or with its first three shards mapped."""
    limit = 3 * Bank(path).sidecars[0].bytes if mode == "half" else None
    return Bank(path, mapped=mode != "read", mapped_bytes=limit)


@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_reading_gives_the_same_rows(tmp_path, mode):
    make_bank(tmp_path / "b")
    bank = opened(tmp_path / "b", mode)
    rng = np.random.default_rng(0)
    for rows in (rng.integers(0, 53, 300), np.arange(53), np.arange(53)[::-1], np.array([7]), np.r_[3:9, 3:9, 20:45]):
        batch = bank.batch(rows, columns=bank.columns)
        for name in bank.columns:
            assert np.array_equal(getattr(batch, name), whole(bank.spec, name)[rows]), name
    assert bank.batch([]).images.shape == (0, *SHAPE)
    assert np.array_equal(bank.column("images"), whole(bank.spec, "images"))
    again = pickle.loads(pickle.dumps(bank))
    assert np.array_equal(again.batch([5, 50]).images, bank.batch([5, 50]).images)
    assert again.fits_memory == bank.fits_memory == (mode == "mapped")


@pytest.mark.parametrize("mode", MODES)
def test_out(tmp_path, mode):
    make_bank(tmp_path / "b")
    bank = opened(tmp_path / "b", mode)
    images, logits = np.zeros((9, *SHAPE), np.uint8), np.zeros((6, CLASSES), np.float16)
    rows = [50, 3, 3, 31, 0, 12]
    batch = bank.batch(rows, out={"images": images, "logits": logits})
    assert batch.images.base is images and np.array_equal(images[:6], whole(bank.spec, "images")[rows])
    assert not images[6:].any() and np.array_equal(logits, whole(bank.spec, "logits")[rows])
    assert np.array_equal(batch.labels, whole(bank.spec, "labels")[rows])
    for wrong in (
        np.zeros((5, *SHAPE), np.uint8), np.zeros((6, *SHAPE), np.int8), np.zeros((6, 3, 6, 4), np.uint8),
        np.zeros((12, *SHAPE), np.uint8)[::2], [0] * 6, np.broadcast_to(np.uint8(0), (6, *SHAPE)),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="images"):
            bank.batch(rows, out={"images": wrong})


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path):
    """With `mapped=False`; a map would end the process with SIGBUS."""
    make_bank(tmp_path / "b")
    bank = Bank(tmp_path / "b", mapped=False)
    bank.batch([0, 25])
    with open(tmp_path / "b" / "shards" / "00002.h5", "r+b") as file:
        file.truncate(2100)
    with pytest.raises(BankError, match="00002.h5.*cut"):
        bank.batch([29])
    assert len(bank.batch([5])) == 1  # other shards can still be read


def test_many_shards_need_few_descriptors(tmp_path):
    resource = pytest.importorskip("resource")
    make_bank(tmp_path / "b", images=100, images_per_shard=1, seed=1)
    used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 80, hard))
    try:
        for mode in MODES:
            bank = opened(tmp_path / "b", mode)
            rows = np.random.default_rng(0).permutation(100)
            assert np.array_equal(bank.batch(rows).images, whole(bank.spec, "images")[rows])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("mode", MODES)
def test_threads_share_a_bank(tmp_path, mode, monkeypatch):
    """More shards than descriptors are kept open: a file may be closed for one thread while another reads it."""
    monkeypatch.setattr(pread, "MAX_OPEN", 2)
    make_bank(tmp_path / "b")
    bank, images = opened(tmp_path / "b", mode), whole(make_spec(), "images")

    def read(seed):
        rng = np.random.default_rng(seed)
        batches = [rng.integers(0, 53, 20) for _ in range(60)]
        return all(np.array_equal(bank.batch(rows, ("images",)).images, images[rows]) for rows in batches)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(12)))


def test_maps_stay_within_the_limit(tmp_path):
    """Random reads over a bank larger than `mapped_bytes`: the resident file pages stay below it."""
    if not os.path.isfile("/proc/self/statm"):
        pytest.skip("needs /proc")
    images = noise_images(4000, (3, 64, 64), seed=0)
    bank = bank_from_arrays(tmp_path / "b", images, num_classes=2, mean=[0.5] * 3, std=[0.2] * 3, images_per_shard=200)
    code = (
        "import sys; from synthkit.bank import Bank; b = Bank(sys.argv[1], mapped_bytes=int(sys.argv[2]))\n"
        "b.batch([0]); shared = lambda: int(open('/proc/self/statm').read().split()[2]) * 4096; start = shared()\n"
        "for e in range(2):\n  for i in range(0, 4000, 100): b.batch(b.order(e, 0)[i:i + 100])\n"
        "print(shared() - start)"
    )
    grown = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, str(bank.path), str(limit)], check=True, capture_output=True
            ).stdout
        )
        for limit in (10 << 20, 1 << 30)
    ]
    # some pages of libraries come in too; the second shows that the measurement can see the pages of the bank
    assert grown[0] <= 16 << 20 and grown[1] > 40 << 20


def test_maps_go_with_the_bank(tmp_path):
    if not os.path.isfile("/proc/self/maps"):
        pytest.skip("needs /proc")
    make_bank(tmp_path / "b")
    bank = Bank(tmp_path / "b")
    batch = bank.batch([1, 20])
    name = str(tmp_path / "b" / "shards")
    with open("/proc/self/maps") as file:
        assert file.read().count(name) == 6
    del bank
    gc.collect()
    with open("/proc/self/maps") as file:
        assert name not in file.read()
    assert np.array_equal(batch.images, whole(make_spec(), "images")[[1, 20]])  # what was read is a copy


def test_not_a_bank(tmp_path):
    with pytest.raises(BankNotFoundError, match="no such folder"):
        Bank(tmp_path / "x")
    with pytest.raises(BankNotFoundError, match="no bank.json"):
        Bank(tmp_path)
    assert BankNotFoundError.exit_code == 2


def edit(path, **changes):
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("changes, message", [
    ({"min_reader": 3, "schema": 3}, "upgrade: pip install -U synthkit"),
    ({"min_reader": "1"}, "min_reader"),
    ({"format": "zip"}, "not the record of a synthkit bank"),
    ({"shape": [3, 6]}, "shape"),
    ({"shape": [3, 6, 10**9]}, "shape"),
    ({"num_classes": True}, "num_classes"),
    ({"mean": ["a", 0, 0]}, "mean"),
    ({"class_names": [1, 2, 3, 4]}, "class_names"),
    ({"plan": None}, "plan"),
    ({"plan": {"images": 53, "images_per_shard": 10, "seed": 7, "shards": 7}}, "add up"),
    ({"plan": {"images": 2**40, "images_per_shard": 1, "seed": 7, "shards": 2**40}}, "shards"),
    ({"uuid": "../../x"}, "uuid"),
])  # fmt: skip
def test_damaged_identity(tmp_path, changes, message):
    make_bank(tmp_path / "b")
    edit(tmp_path / "b" / "bank.json", **changes)
    with pytest.raises(BankError, match=message):
        Bank(tmp_path / "b")


@pytest.mark.parametrize("text", [
    b"", b"{", b"[1]", b"\xff\xfe", b'{"schema": NaN}', b'{"schema": Infinity}', b"[" * 100_000,
    b'{"a":' * 200 + b"1" + b"}" * 200, b'{"n": ' + b"9" * 10_000 + b"}",
])  # fmt: skip
@pytest.mark.parametrize("name", ["bank.json", "shards/00002.json"])
def test_garbage_json(tmp_path, name, text):
    make_bank(tmp_path / "b")
    (tmp_path / "b" / name).write_bytes(text)
    with pytest.raises(BankError):
        Bank(tmp_path / "b")


def test_huge_json_is_not_parsed(tmp_path):
    make_bank(tmp_path / "b")
    with open(tmp_path / "b" / "bank.json", "r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(BankError, match="too large"):
        Bank(tmp_path / "b")


@pytest.mark.parametrize("change, message", [
    (("images", "offset", 10**9), "outside the file"),
    (("images", "offset", -64), "malformed"),
    (("images", "offset", 2.5), "malformed"),
    (("labels", "offset", 3), "malformed"),
    (("images", "shape", [10**9, 3, 6, 5]), "shape"),
    (("images", "dtype", "|O"), "dtype|stored as"),
    (("labels", "offset", 2048), "overlap"),
])  # fmt: skip
def test_hostile_placement(tmp_path, change, message):
    make_bank(tmp_path / "b")
    path = tmp_path / "b" / "shards" / "00001.json"
    record = json.loads(path.read_text())
    record["datasets"][change[0]][change[1]] = change[2]
    path.write_text(json.dumps(record))
    with pytest.raises(BankError, match=message):
        Bank(tmp_path / "b")


@pytest.mark.parametrize("changes, message", [
    ({"shard": 2}, "shard 1"), ({"n": 11}, "n must be 10"), ({"bytes": -1}, "bytes"), ({"bytes": 100}, "outside"),
    ({"sha256": "zz"}, "sha256"), ({"datasets": {}}, "images"), ({"datasets": []}, "images"),
    ({"schema": 9}, "upgrade"),
    ({"schema": None}, "schema"), ({"label_histogram": [1, 1, 1, 1]}, "count 10"), ({"mean_difficulty": "x"}, "number"),
    ({"step_range": [1]}, "step_range"),
])  # fmt: skip
def test_hostile_sidecar(tmp_path, changes, message):
    make_bank(tmp_path / "b")
    edit(tmp_path / "b" / "shards" / "00001.json", **changes)
    with pytest.raises(BankError, match=message):
        Bank(tmp_path / "b")


def test_hostile_column_name(tmp_path):
    make_bank(tmp_path / "b")
    path = tmp_path / "b" / "shards" / "00001.json"
    record = json.loads(path.read_text())
    record["datasets"]["../../etc/passwd"] = record["datasets"]["labels"]
    path.write_text(json.dumps(record))
    with pytest.raises(BankError, match="not a column"):
        Bank(tmp_path / "b")


@pytest.mark.parametrize("damage", ["short", "long", "gone", "link", "folder"])
def test_shard_of_another_size_is_not_read(tmp_path, damage):
    make_bank(tmp_path / "b")
    shard = tmp_path / "b" / "shards" / "00003.h5"
    data = shard.read_bytes()
    shard.unlink()
    if damage in ("short", "long"):
        shard.write_bytes(data[:-1] if damage == "short" else data + b"x")
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        shard.symlink_to(tmp_path / "elsewhere")
    elif damage == "folder":
        shard.mkdir()
    with pytest.raises(BankError, match="00003.h5"):
        Bank(tmp_path / "b").batch([0])


def test_random_reads_keep_up_with_a_raw_memory_map(tmp_path):
    """A coarse guard against per-shard work in `batch` (measured: 0.9 and more; grouping by shard gives 0.2)."""
    images = noise_images(6000, (3, 32, 32), seed=0)
    bank = bank_from_arrays(
        tmp_path / "b", images, num_classes=2, mean=[0.5] * 3, std=[0.2] * 3, images_per_shard=100
    )  # fmt: skip
    images.tofile(tmp_path / "raw")
    raw = np.memmap(tmp_path / "raw", np.uint8, "r", shape=images.shape)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 6000, 128) for _ in range(40)]
    assert all(np.array_equal(bank.batch(r).images, images[r]) for r in rows)

    def seconds(read):
        best = float("inf")
        for _ in range(7):
            start = time.perf_counter()
            for r in rows:
                read(r)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(lambda r: bank.batch(r)) < 3 * seconds(lambda r: raw[r])


def test_bank_from_arrays(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (25, 1, 8, 8), dtype=np.uint8), rng.integers(0, 3, 25)
    bank = bank_from_arrays(
        tmp_path / "b", images, labels, num_classes=3, mean=[0.1], std=[0.3], images_per_shard=7,
        columns={"difficulty": np.arange(25.0)}, teacher={"name": "t"},
    )  # fmt: skip
    assert bank.complete and bank.spec.contains_real and bank.spec.label_kind == "real"
    assert np.array_equal(bank.column("images"), images) and np.array_equal(bank.column("labels"), labels)
    assert bank.column("difficulty").tolist() == list(range(25)) and bank.verify(deep=True).ok
    with pytest.raises(OutputExistsError):
        bank_from_arrays(tmp_path / "b", images, labels, num_classes=3, mean=[0.1], std=[0.3])
    with pytest.raises(UsageError, match="25 rows"):
        bank_from_arrays(tmp_path / "c", images, labels[:-1], num_classes=3, mean=[0.1], std=[0.3])
    with pytest.raises(UsageError, match="uint8"):
        bank_from_arrays(tmp_path / "c", images / 255, labels, num_classes=3, mean=[0.1], std=[0.3])
    bare = bank_from_arrays(tmp_path / "d", images, num_classes=3, mean=[0.1], std=[0.3])
    assert bare.spec.label_kind == "none" and not bare.spec.contains_real and bare.batch([1]).labels is None


def test_noise_control():
    noise = noise_images(50, (3, 32, 32), seed=1)
    assert noise.shape == (50, 3, 32, 32) and noise.dtype == np.uint8
    assert abs(noise.mean() - 127.5) < 1 and np.array_equal(noise, noise_images(50, (3, 32, 32), seed=1))
    assert not np.array_equal(noise, noise_images(50, (3, 32, 32), seed=2))
