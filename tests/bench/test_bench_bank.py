"""`bench bank` and `bench million`, small: every reader gives the stored pixels, wrong ones are seen, limits hold."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace

import numpy as np
import pytest

from synthkit.bench import bank, bank_rivals, million
from synthkit.cli.main import main
from synthkit.errors import UsageError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    bank.write_source(folder, 16, 300)
    return folder


def worker(reader: str, folder) -> bank_rivals.Worker:
    made = bank_rivals.Worker(reader, folder, 32, 0, 1)
    made.prepare({})
    made.open({})
    return made


@pytest.mark.parametrize("reader", [r for r in bank_rivals.READERS if not r.startswith("mds")])
def test_readers_give_what_was_stored(source, reader):
    if reader.startswith("webdataset"):
        pytest.importorskip("webdataset")
    made = worker(reader, source)
    found = made.check({"images": 600})
    assert found["wrong"] == 0 and found["checked"] >= 600 and found["distinct"] > 200  # not the same batch again
    assert made.run({"at": 0, "seconds": 0.02})["rate"] > 0


def test_wrong_pixels_and_labels_are_seen(tmp_path):
    bank.write_source(tmp_path, 16, 64)
    made = worker("imagefolder_pil", tmp_path)
    assert made.check({"images": 64})["wrong"] == 0
    files = sorted((tmp_path / "folder").glob("*/*.png"))
    files[0].write_bytes(files[1].read_bytes() if files[0].parent != files[1].parent else files[-1].read_bytes())
    assert made.check({"images": 640})["wrong"] > 0


def test_cli(tmp_path, capsys):
    out = tmp_path / "bank.json"
    rivals = "none" if importlib.util.find_spec("streaming") else "mds"
    words = ["--images", "256", "--sizes", "8", "--batch", "16", "--seconds", "0.02", "--repeats", "3"]
    words += ["--processes", "2", "--rivals", rivals, "--work", str(tmp_path / "w"), "--out", str(out)]
    assert main(["bench", "bank", *words]) == 0
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    cells = {c["reader"]: c for c in found["sizes"]["8"]["cells"]}
    assert set(cells) == {*bank.GROUPS["memmap"], *bank.GROUPS["bank"]} and found["pixels_equal"]
    for cell in cells.values():
        assert cell["n"] == 3 and cell["processes"] == 2
        assert 0 < cell["lowest"] <= cell["images_per_second"] <= cell["highest"]
        assert cell["check"]["wrong"] == 0 and cell["check"]["checked"] >= 256
    if rivals == "mds":
        assert "--mds-python" in found["sizes"]["8"]["not_installed"]["mds_raw"]
    bars = found["bars"]["8"]
    assert bars["memmap, 2 processes"]["held"] == (bars["memmap, 2 processes"]["ratio"] >= 0.8)


@pytest.mark.parametrize("words, message", [
    (["--sizes", "32", "--images", "1,2"], "one number for each"), (["--sizes", "a"], "whole numbers"),
    (["--rivals", "mdz"], "did you mean 'mds'"), (["--batch", "0"], "whole numbers"),
    (["--images", "10,10"], "two batches"),
    (["--mds-python", "/nowhere/python"], "interpreter"), (["--image", "1"], "--images"),
])  # fmt: skip
def test_wrong_use(words, message):
    with pytest.raises(UsageError, match=message):
        bank.main(words)


def test_ratio_is_paired():
    """Both slow down in the second repetition: the ratio of medians would be 6/4, of the pairs it is 2."""
    ours, theirs = (object.__new__(bank._Cell) for _ in range(2))
    ours.rates, theirs.rates = [8.0, 2.0, 6.0], [4.0, 1.0, 3.0]
    assert bank._paired(ours, theirs) == 2.0


def test_million(tmp_path, capsys):
    pytest.importorskip("resource")
    words = ["--images", "3000", "--seconds", "5", "--batch", "100", "--work", str(tmp_path / "w")]
    assert main(["bench", "million", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and set(found["phases"]) == set(million.PHASES)
    for name in ("read_random", "stream_random", "stream_blocks", "read_random_warm"):
        phase = found["phases"][name]
        assert phase["images"] == 3000 and phase["wrong"] == 0 and phase["whole_epoch"]
    for phase in found["phases"].values():
        assert 10 << 20 < phase["peak"]["rss"] <= found["peak_rss_bytes"] < 2 << 30
    assert found["phases"]["write"]["bytes"] > 3000 * 3072
    with pytest.raises(UsageError, match="not empty"):
        million.main(words)
    record = tmp_path / "w" / "bank" / "shards" / "00003.h5"
    data = bytearray(record.read_bytes())
    data[5000] ^= 1
    record.write_bytes(data)
    args = ["--phase", "read_random", *words]
    assert million.main(args) == 0  # prints its answer; the parent judges it
    answer = json.loads(capsys.readouterr().out)
    assert answer["wrong"] == 1 and not answer["ok"]


def test_images_of_a_million_differ():
    rows = np.arange(5000)
    images = million.images_of(rows)
    assert images.shape == (5000, 3, 32, 32) and len(np.unique(images.reshape(5000, -1), axis=0)) == 5000
    assert np.array_equal(million.images_of(np.array([17, 4999])), images[[17, 4999]])
    assert abs(images.mean() - 127.5) < 0.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="control groups and RLIMIT_DATA")
@pytest.mark.parametrize("grouped", [False, True])
def test_the_limit_is_a_limit(tmp_path, grouped):
    """A child that wants more than it may have is ended, and the bench says so instead of passing."""
    limit = 64 << 20
    args = Namespace(images=50_000, batch=100, seconds=5.0, memory=1.0, cores=1)  # the floor phase wants over 128 MiB
    with million.memory_group(limit) as group:
        if grouped and group is None:
            pytest.skip("this user cannot make a control group")
        found = million._child("floor", args, tmp_path, group if grouped else None, limit)
    assert not found["ok"] and found["exit_code"] != 0 and found["peak"]["rss"] < 2 * limit
    assert million._child("floor", args, tmp_path / "again", None, 2 << 30)["ok"]
