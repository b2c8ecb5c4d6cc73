"""What holds for every format: whole or absent, the same bytes, provenance, refusals, the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthkit.bank import Bank, BankWriter
from synthkit.bank.export import FORMATS, base, export, format_class, formats, plan
from synthkit.bank.export.source import Source
from synthkit.bank.shard import shard_file
from synthkit.cli.main import main
from synthkit.errors import BankError, ConfigError, OutputExistsError, StorageError, UsageError

from .exports import HOSTILE, make, same, stored, tree

ALL = sorted(FORMATS)


@pytest.fixture(params=ALL)
def name(request):
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return request.param


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "synthkit.json").read_text(encoding="utf-8"))


def test_two_exports_are_equal_byte_for_byte(tmp_path, name, monkeypatch):
    bank = make(tmp_path / "b", images=90, top_k=2, rate=0.1)
    first = tree(export(bank, name, tmp_path / "one", workers=1))
    monkeypatch.setattr(time, "time", lambda: 2e9)
    second = tree(export(str(tmp_path / "b"), name, tmp_path / "other" / "two", workers=5, verify=False))
    assert first == second and len(first) > 2


def test_the_provenance_travels(tmp_path, name):
    bank = make(tmp_path / "b", contains_real=True, real_data_used=True)
    out = export(bank, name, tmp_path / "o")
    record = record_of(out)
    facts = bank.info()
    for key in ("contains_real", "real_data_used", "shape", "mean", "std", "num_classes", "class_names", "origin"):
        assert record[key] == facts[key], key
    manifest = json.loads((bank.path / "manifest.json").read_text(encoding="utf-8"))
    told = record["bank"]
    assert (told["uuid"], told["root"], told["seal"]) == (manifest["uuid"], manifest["root"], manifest["seal"])
    assert told["record"] == bank.record and told["recipe_hash"] == facts["recipe_hash"] and told["complete"]
    assert record["to"] == name and record["images"] == 23 and record["class_counts"] == facts["label_histogram"]
    assert set(record["columns"]) | set(record["left_out"]) == set(bank.columns)
    page = (out / "README.md").read_text(encoding="utf-8")
    assert "Contains real pixels" in page and "contains-real-images" in page and HOSTILE[4] not in page


def test_what_is_there_is_never_touched(tmp_path, name):
    make(tmp_path / "b")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("y")
    for target in ("o", "file"):
        with pytest.raises(OutputExistsError):
            export(tmp_path / "b", name, tmp_path / target)
    assert tree(tmp_path / "o") == {"mine.txt": b"x"} and (tmp_path / "file").read_text() == "y"
    (tmp_path / "empty").mkdir()
    export(tmp_path / "b", name, tmp_path / "empty")


def test_a_damaged_shard_is_refused_and_nothing_is_left(tmp_path, name):
    bank = make(tmp_path / "b")
    before = sorted(p.name for p in tmp_path.iterdir())
    shard = shard_file(bank.path, 2)
    data = bytearray(shard.read_bytes())
    data[bank.sidecars[2].datasets["images"].offset + 5] ^= 4
    shard.write_bytes(data)
    with pytest.raises(BankError, match=r"sha256.*repair"):
        export(bank, name, tmp_path / "o")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_shard_cut_short_is_an_error_and_no_crash(tmp_path, name):
    bank = make(tmp_path / "b")
    with open(shard_file(bank.path, 1), "r+b") as stream:
        stream.truncate(3000)
    with pytest.raises(BankError):
        export(bank, name, tmp_path / "o", verify=False)
    assert not (tmp_path / "o").exists()


def test_labels_that_verify_their_hash_but_lie_outside_the_classes(tmp_path, name, monkeypatch):
    bank = make(tmp_path / "b")
    read = Source._read

    def altered(self, sidecar, start, stop, columns):
        found = read(self, sidecar, start, stop, columns)
        return {c: np.full_like(v, 99) if c == "labels" else v for c, v in found.items()}

    monkeypatch.setattr(Source, "_read", altered)
    with pytest.raises(BankError, match="labels must be"):
        export(bank, name, tmp_path / "o")


def test_a_bank_that_is_not_the_sealed_one(tmp_path):
    bank = make(tmp_path / "b")
    record = json.loads((bank.path / "bank.json").read_text(encoding="utf-8"))
    record["class_names"][0] = "another"
    (bank.path / "bank.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(BankError, match="sealed"):
        export(bank.path, "npz", tmp_path / "o")


def test_unfinished_banks_only_on_request(tmp_path, name):
    whole = make(tmp_path / "whole", images=53)
    rows = stored(whole)
    writer = BankWriter.create(tmp_path / "b", whole.spec)
    with pytest.raises(BankError, match="shards are missing"):
        export(writer.path, name, tmp_path / "o", unfinished=True)
    for shard in (1, 4):
        part = slice(shard * 10, shard * 10 + 10)
        writer.write_shard(shard, {c: v[part] for c, v in rows.items()})
    with pytest.raises(BankError, match="--unfinished"):
        export(writer.path, name, tmp_path / "o")
    out = export(writer.path, name, tmp_path / "o", unfinished=True)
    record = record_of(out)
    assert record["images"] == 20 and not record["bank"]["complete"] and record["bank"]["root"] is None
    if name == "npz":
        same(np.load(out / "bank.npz")["images"], np.concatenate([rows["images"][10:20], rows["images"][40:50]]))


def test_the_estimate_is_an_upper_one_and_near(tmp_path, name):
    bank = make(tmp_path / "b", images=400, per_shard=100, shape=(3, 32, 32))
    planned = plan(bank, name, tmp_path / "o")
    size = sum(len(v) for v in tree(planned.run()).values())
    assert size <= planned.bytes + 16_000  # README and synthkit.json
    assert planned.bytes <= size * {"imagefolder": 1.6}.get(name, 1.35)


def test_no_room(tmp_path, name, monkeypatch):
    make(tmp_path / "b")
    monkeypatch.setattr("synthkit.bank.export._free", lambda target: 100)
    with pytest.raises(StorageError, match="needs about"):
        export(tmp_path / "b", name, tmp_path / "o")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


def test_a_full_disk_leaves_nothing(tmp_path, name, monkeypatch):
    make(tmp_path / "b")
    real = format_class(name).write

    def full(self, folder, advance):
        real(self, folder, advance)
        raise OSError(28, "No space left on device", str(folder / "x"))

    monkeypatch.setattr(format_class(name), "write", full)
    with pytest.raises(StorageError, match="disk is full"):
        export(tmp_path / "b", name, tmp_path / "o")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


def test_threads_are_done_before_the_folder_goes(tmp_path, monkeypatch):
    make(tmp_path / "b", images=300, per_shard=10)

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan(tmp_path / "b", "imagefolder", tmp_path / "o", workers=8).run(stop)
    time.sleep(0.1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


def test_in_order_keeps_the_order_and_stays_bounded():
    started: list[int] = []

    def slow(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i * i

    def pieces():
        for i in range(40):
            started.append(i)
            yield i

    for done, value in enumerate(base.in_order(pieces(), slow, 3)):
        assert value == done * done and len(started) <= done + 1 + 2 * 3 + 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_export_is_absent_and_the_next_one_cleans_up(tmp_path):
    make(tmp_path / "b", images=3000, per_shard=1000)
    script = (
        "import sys; from synthkit.bank.export import plan\n"
        "p = plan(sys.argv[1], 'imagefolder', sys.argv[2])\n"
        "p.run(lambda n: (print('x', flush=True), __import__('time').sleep(0.05)))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "b"), str(tmp_path / "o")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    left = [p.name for p in tmp_path.iterdir() if p.name != "b"]
    assert len(left) == 1 and left[0].startswith(".o.tmp-")
    export(tmp_path / "b", "npz", tmp_path / "o")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "o"]


def test_the_target_may_not_lie_in_the_bank(tmp_path):
    bank = make(tmp_path / "b")
    for target in (bank.path, bank.path / "o", bank.path / "shards" / ".." / "o"):
        with pytest.raises(UsageError, match="inside the bank"):
            export(bank, "npz", target)


def test_wrong_words_are_answered(tmp_path):
    make(tmp_path / "b")
    with pytest.raises(ConfigError, match="did you mean 'parquet'"):
        export(tmp_path / "b", "parket", tmp_path / "o")
    with pytest.raises(UsageError, match="no option 'compres'"):
        export(tmp_path / "b", "npz", tmp_path / "o", compres=True)
    with pytest.raises(UsageError, match="workers"):
        export(tmp_path / "b", "npz", tmp_path / "o", workers=0)
    for option, value in {"raw": "yes", "shard_bytes": "10", "name": None, "shard_images": True}.items():
        with pytest.raises(UsageError, match=f"{option} of webdataset must be"):
            export(tmp_path / "b", "webdataset", tmp_path / "o", **{option: value})
    with pytest.raises(UsageError, match="compress_level"):
        export(tmp_path / "b", "mds", tmp_path / "o", compress_level=10)


def test_another_package_can_add_a_format(monkeypatch, tmp_path):
    class Count(base.Format):
        """One number."""

        carries = ("images",)

        def estimate(self):
            return 10

        def write(self, folder, advance):
            (folder / "count.txt").write_text(str(self.source.count))
            return {}

        def usage(self):
            return "open('DIR/count.txt').read()"

    module = sys.modules[__name__]
    monkeypatch.setattr(module, "Count", Count, raising=False)
    monkeypatch.setattr("synthkit.tables.with_plugins",
                        lambda table, group: {**table, "count": f"{__name__}:Count"})  # fmt: skip
    assert "count" in formats()
    make(tmp_path / "b")
    out = export(tmp_path / "b", "count", tmp_path / "o")
    assert (out / "count.txt").read_text() == "23" and record_of(out)["to"] == "count"


def test_the_command_line(tmp_path, capsys):
    make(tmp_path / "b")
    arguments = ["export", "--bank", str(tmp_path / "b"), "--format", "webdataset"]
    assert main([*arguments, "--out", str(tmp_path / "o"), "--raw", "--shard_images", "10"]) == 0
    printed = capsys.readouterr().out
    assert "23 images" in printed and "README.md" in printed and len(list((tmp_path / "o").glob("*.tar"))) == 3
    assert main([*arguments, "--out", str(tmp_path / "p"), "--json", "--no-verify"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 23 and facts["contains_real"] is False and facts["path"] == str(tmp_path / "p")
    assert facts["bytes"] == sum(len(v) for v in tree(tmp_path / "p").values())
    assert main([*arguments, "--out", str(tmp_path / "q"), "--shard_imags", "1"]) == 2
    assert "did you mean --shard-images" in capsys.readouterr().err
    assert main(["export", "--bank", str(tmp_path / "b"), "--format", "parket", "--out", "x"]) == 2
    assert "did you mean 'parquet'" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "o")]) == 2
    assert main(["export", "--format"]) == 2
    with pytest.raises(SystemExit):
        main(["export", "--format", "pt", "--help"])
    assert "--learning-rate" in capsys.readouterr().out
    assert main(["list", "formats", "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)) == ALL


def test_help_and_lists_import_neither_torch_nor_pyarrow():
    for words in (["export", "--help"], ["export", "--format", "parquet", "--help"], ["list", "formats"]):
        code = (
            "import sys\nfrom synthkit.cli.main import main\n"
            f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
            "print(sorted({'torch', 'pyarrow', 'PIL', 'h5py', 'datasets'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              env={**os.environ, "COLUMNS": "80"})  # fmt: skip
        assert done.stdout.splitlines()[-1] == "[]", words


def test_a_bank_object_and_its_path_are_the_same(tmp_path):
    bank = make(tmp_path / "b", images=1)
    assert tree(export(bank, "npz", tmp_path / "o")) == tree(export(Bank(bank.path).path, "npz", tmp_path / "p"))


@pytest.mark.parametrize("name", ["imagefolder", "parquet", "webdataset", "mds"])
def test_images_that_a_format_cannot_hold_are_refused(tmp_path, name, monkeypatch):
    monkeypatch.setattr("synthkit.bank.export.png.MAX_BYTES", 80)
    make(tmp_path / "b", images=1)
    with pytest.raises(UsageError, match=f"{name} holds at most 80 bytes"):
        export(tmp_path / "b", name, tmp_path / "o")
