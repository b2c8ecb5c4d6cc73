"""bench kills: a small campaign holds, and sloppy writers are found out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from synthkit.bank import Bank, BankWriter
from synthkit.bank.shard import conform, encode
from synthkit.bench import kills
from synthkit.bench.kill_probe import Order, Shared, Victim, kind_of
from synthkit.bench.kill_stage import Finding, Stage, tree
from synthkit.bench.kill_stages import Claims, Sealer, Writer, stages
from synthkit.bench.kill_targets import Target
from synthkit.bench.kills import kill_everything
from synthkit.bench.known_rows import SHARDS, columns_of, make_bank, numbers_in, rows_of, spec_of, wrong_rows
from synthkit.cli.bench import BENCHES
from synthkit.errors import RunError, UsageError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
MERGER = next(stage for stage, _ in stages() if stage.name == "merger, joins")


def test_small_campaign(tmp_path):
    table = [(Writer(), 0.4), (Claims(), 0.2), (Sealer(False), 0.2), (MERGER, 0.2)]
    found = kill_everything(kills=8, seed=3, work=tmp_path, table=table)
    assert found["kills"] == 8 and found["by_time"] + found["by_operation"] == 8
    for name in kills.GOOD:
        assert found[name], found["stages"]
    assert sum(found["phases"].values()) == 8 and found["reader_images"] > 0 and found["images_compared"] > 0
    assert [s["stage"] for s in found["stages"]] == ["writer", "claims", "sealer", "merger, joins"]
    assert all(s["unbroken_seconds"] > 0 and s["unbroken_operations"] > 0 for s in found["stages"])
    json.dumps(found)


def test_stages_cover_what_writes():
    names = " ".join(stage.name for stage, _ in stages())
    for word in (
        "writer",
        "claims",
        "labels",
        "sealer",
        "repair",
        "merger",
        "exporter",
        "importer",
        "dedup",
        "synthesize",
    ):
        assert word in names
    assert sum(share for _, share in stages()) == pytest.approx(1)
    assert sum(kills._shares(200, [share for _, share in stages()])) == 200
    assert kills._shares(10, [0.7, 0.25, 0.05]) == [7, 2, 1] and kills._shares(1, [0.5, 0.5]) == [1, 1]
    assert "kills" in BENCHES


class Liar(Writer):
    """Says that a shard is committed before it is."""

    name = "liar"

    def operate(self, folder: Path, role: int, shared: Shared) -> None:
        for index in range(SHARDS):
            shared.acknowledge(index)
        super().operate(folder, role, shared)


class Sloppy(Stage):
    """Writes a target in place."""

    name = "sloppy"

    def operate(self, folder: Path, role: int, shared: Shared) -> None:
        (folder / "out").mkdir(exist_ok=True)
        for number in range(50):
            (folder / "out" / str(number)).write_text("x")
            os.sync()

    def check(self, folder: Path) -> Finding:
        count = len(tree(folder / "out"))
        return Finding(problems=[] if count in (0, 50) else [f"{count} of 50"])

    def result(self, folder: Path) -> dict[str, str]:
        return tree(folder / "out")


class Forgetful(Writer):
    """Publishes the record before the data."""

    name = "forgetful"

    def operate(self, folder: Path, role: int, shared: Shared) -> None:
        writer = BankWriter.open_or_create(folder / "bank", spec_of(1))
        for index in writer.missing():
            arrays = columns_of(rows_of(writer.spec, index), 1)
            data, _ = encode(conform(arrays, writer.spec, writer.shard_size(index)))
            other = make_bank(folder / f"other{os.getpid()}-{index}", 1)
            record = (other / f"shards/{index:05d}.json").read_bytes()
            writer.shard_path(index).parent.mkdir(exist_ok=True)
            writer.sidecar_path(index).write_bytes(record)
            os.sync()
            writer.shard_path(index).write_bytes(data)
            shared.acknowledge(index)
        writer.finish()


@pytest.mark.parametrize(("stage", "check"), [(Liar(), "nothing_lost"), (Sloppy(), "all_verified")])
def test_bad_writers_are_found_out(tmp_path, stage, check, monkeypatch):
    monkeypatch.setattr(os, "sync", lambda: None)
    found = kill_everything(kills=6, seed=1, work=tmp_path, table=[(stage, 1.0)])
    assert not found[check] and found["stages"][0]["problems"]


def test_a_record_before_its_data_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sync", lambda: None)
    stage = Forgetful()
    stage.watched = False
    folder = tmp_path / "f"
    stage.prepare(folder)
    victim = Victim(lambda shared: stage.operate(folder, 0, shared), tmp_path / "log", pieces=SHARDS)
    assert not victim.wait() and victim.failure is None
    assert stage.check(folder).problems == [] and stage.check(folder).wrong == 0
    (folder / "bank/shards/00003.h5").unlink()
    found = stage.check(folder)
    assert any("shard 3" in text for text in found.problems) and 3 not in found.committed


def test_wrong_pixels_are_counted(tmp_path):
    path = make_bank(tmp_path / "b", 1)
    bank = Bank(path)
    rows = np.arange(len(bank))
    assert wrong_rows(bank, rows, numbers_in(bank)) == 0
    assert wrong_rows(bank, rows, rows + 1) == len(bank)
    writer = BankWriter.create(tmp_path / "c", spec_of(1))
    arrays = columns_of(rows_of(writer.spec, 2), 1)
    arrays["images"][7, 0, 0, 0] ^= 1
    arrays["difficulty"][9] += 0.5
    writer.write_shard(2, arrays)
    bank = Bank(tmp_path / "c")
    assert wrong_rows(bank, np.arange(len(bank)), numbers_in(bank)) == 2


def test_half_a_target_is_found_out(tmp_path):
    def run(inputs: list[Path], out: Path) -> None:
        out.mkdir()
        (out / "a.npz").write_bytes(b"a")
        (out / "b.npz").write_bytes(b"b")

    stage = Target("x", lambda shared: [make_bank(shared / "a", 9)], run, lambda name: True, False)
    (tmp_path / "shared").mkdir()
    stage.setup(tmp_path / "shared")
    (tmp_path / "t").mkdir()
    run([], tmp_path / "t" / "out")
    assert stage.result(tmp_path / "t") and not stage.check(tmp_path / "t").problems
    (tmp_path / "t/out/b.npz").unlink()
    assert stage.check(tmp_path / "t").problems == ["the target is there, but it is not whole"]
    (tmp_path / "shared/a/bank.json").write_text("{}")
    assert "an input was changed" in stage.check(tmp_path / "t").problems


def test_victims_die_where_they_are_told_to(tmp_path):
    def work(shared: Shared) -> None:
        for number in range(5):
            os.mkdir(tmp_path / str(number))
            shared.acknowledge(number)

    victim = Victim(work, tmp_path / "log", pieces=5, order=Order(4, after=False))
    assert victim.wait() and victim.shared.place == (4, "in mkdir other") and victim.failure is None
    assert victim.shared.acknowledged == {0, 1, 2} and not (tmp_path / "3").exists()
    for number in range(3):
        (tmp_path / str(number)).rmdir()
    victim = Victim(work, tmp_path / "log", pieces=5, order=Order(4, after=True))
    assert victim.wait() and victim.shared.place == (4, "after mkdir other")
    assert victim.shared.acknowledged == {0, 1, 2} and (tmp_path / "3").exists()
    done = Victim(lambda shared: None, tmp_path / "log")
    assert not done.wait() and done.failure is None and not done.kill_after(0.0)
    broken = Victim(lambda shared: shared.acknowledge(1 // 0), tmp_path / "log")
    assert not broken.wait() and "ZeroDivisionError" in (broken.failure or "")


def test_moments_are_spread_evenly():
    campaign = kills._Campaign(Writer(), Path("nowhere"), np.random.default_rng(0))
    campaign.operations = {"fsync shard": list(range(1, 60)), "rename manifest": [60], "link record": [2, 4]}
    moments = campaign._moments(60)
    first = [next(moments) for _ in range(60)]
    assert sorted(int(10 * at) for at in first if isinstance(at, float)) == sorted(list(range(10)) * 3)
    orders = [at for at in first if isinstance(at, Order)]
    assert sum(order.call == 60 for order in orders) == 10 and {order.after for order in orders} == {True, False}


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/x/bank/shards/00001.h5.tmp-h-1", "shard"), ("/x/bank/shards/00001.json", "record"),
        ("/x/bank/state/00001.json", "state"), ("/x/.out.tmp-host-12", "whole target"), ("/x/bank/README.md", "card"),
        ("/x/bank/labels/a/00001.h5", "label shard"), ("/x/bank/manifest.json.tmp-a-1", "manifest"), ("/x", "other"),
    ],
)  # fmt: skip
def test_kinds_of_files(path, kind):
    assert kind_of(path) == kind


def test_refusals(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        kill_everything(kills=1, work=tmp_path)
    with pytest.raises(UsageError, match="at least 1"):
        kills.main(["--kills", "0"])

    class Failing(Sloppy):
        def operate(self, folder: Path, role: int, shared: Shared) -> None:
            raise ValueError("by itself")

    with pytest.raises(RunError, match="failed without a kill.*by itself"):
        kill_everything(kills=1, work=tmp_path / "w", table=[(Failing(), 1.0)])
