"""relabel: stored is what the teacher says of exactly what a student is shown; killed runs end with equal bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import synthkit
from synthkit.bank import Bank, BankMismatchError, LabelSpec, LabelWriter
from synthkit.bank.checking.verify import verify
from synthkit.bank.labels.stored import StoredLogits
from synthkit.cli.main import main
from synthkit.config.schema import DistillConfig, RelabelConfig, RuntimeConfig
from synthkit.distillation.distill import distill
from synthkit.distillation.relabel import relabel, teacher_mode
from synthkit.distillation.stores import ResidentStore, StreamedStore
from synthkit.distillation.task import check_task
from synthkit.distillation.view_source import ViewRows, ViewSource
from synthkit.errors import ConfigError, DataError, ModelError, OutputExistsError, RequirementError
from synthkit.models.build import load_model
from synthkit.models.view import TeacherView

CPU = torch.device("cpu")
RUNTIME = RuntimeConfig(device="cpu")


@pytest.fixture
def bank(workshop, tmp_path) -> Path:
    shutil.copytree(workshop.bank, tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def teacher(workshop) -> TeacherView:
    return TeacherView.from_loaded(load_model(str(workshop.teacher)))


def config(bank: Path, name: str = "a", **changes) -> RelabelConfig:
    return RelabelConfig(**{"bank": str(bank), "name": name, "batch_size": 16, "runtime": RUNTIME, **changes})


def fkd(bank: Path, name: str = "fkd", **changes) -> RelabelConfig:
    return config(bank, name, **{"views": 3, "crop_scale": (0.3, 1.0), "mix": "cutmix", "seed": 5, **changes})


def hashes(bank: Path, name: str) -> dict[str, str]:
    files = sorted((bank / "labels" / name).glob("*.h5"))
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def source_of(bank: Path, name: str, batch_size: int = 16, *, held=(), store=None, **options) -> ViewSource:
    opened = Bank(bank)
    labels, out = opened.labels(name), np.zeros(len(opened), bool)
    out[list(held)] = True
    store = store or ResidentStore.from_bank(opened, CPU, logits=None)
    rows = ViewRows(labels, out)
    return ViewSource(labels, store, rows, batch_size, images=len(opened) - len(held), device=CPU, **options)


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_images_get_the_teachers_logits(bank, workshop):
    labels = relabel(config(bank))
    assert labels.kind == "images" and labels.complete and len(labels) == 192
    got = labels.logits(np.arange(192))
    assert got.dtype == np.float16 and np.array_equal(got, workshop.logits.half().numpy())
    assert labels.agreement == 1.0 and verify(bank, deep=True).problems == {}
    assert labels.spec.teacher["sha256"] and labels.spec.policy["teacher"]["bn"] == "eval"


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix"])
def test_a_student_is_shown_exactly_what_the_teacher_labelled(bank, teacher, mix):
    """The identity that stored labels stand on, for batches of other sizes than the teacher's."""
    labels = relabel(fkd(bank, mix=mix))
    assert len(labels) == 3 * 192
    for batch_size in (16, 7, 64):
        source = source_of(bank, "fkd", batch_size)
        for step in (0, 3):
            batch = source.batch(step)
            with torch.no_grad():
                live = teacher(batch.images)
            assert batch.logits is not None and (live.half().float() - batch.logits).abs().max() < 5e-3
    same = [source_of(bank, "fkd", size) for size in (8, 24)]
    images = [torch.cat([s.batch(i).images for i in range(n)]) for s, n in zip(same, (6, 2), strict=True)]
    assert torch.equal(images[0], images[1])  # bit for bit


def test_losses_of_dense_topk_and_live_teacher_are_one(bank, teacher):
    relabel(fkd(bank, "dense"))
    relabel(fkd(bank, "all_but_one", top_k=3))  # of 4 classes: exact
    relabel(fkd(bank, "top2", top_k=2))
    student = load_model("lenet5_half_bn", num_classes=4, in_channels=1, image_size=32, weights="optional", seed=0)
    view = TeacherView.from_loaded(replace(student, card=replace(student.card, mean=teacher.mean, std=teacher.std)))
    losses: dict[str, list[float]] = {"live": []}
    for name in ("dense", "all_but_one", "top2"):
        source, losses[name] = source_of(bank, name, 32), []
        for step in range(4):
            batch = source.batch(step)
            with torch.no_grad():
                ours, live = F.log_softmax(view(batch.images), 1), teacher(batch.images)
            losses[name].append(float(F.kl_div(ours, F.softmax(batch.logits, 1), reduction="batchmean")))
            if name == "dense":
                losses["live"].append(float(F.kl_div(ours, F.softmax(live, 1), reduction="batchmean")))
    assert losses["dense"] == pytest.approx(losses["live"], rel=2e-3)
    assert losses["all_but_one"] == pytest.approx(losses["dense"], abs=1e-6)
    assert losses["top2"] == pytest.approx(losses["dense"], rel=0.2)  # the tail's shape is lost, its mass is not
    rows = {n: Bank(bank).labels(n).spec.row_bytes for n in ("dense", "all_but_one", "top2")}
    assert rows["dense"] == 4 + 16 + 1 + 4 + 4 + 8 + 2 * 4 and rows["top2"] == 37 + 2 * 2 + 2 * 2 + 4


def test_batch_statistics_leave_the_teacher_as_it_was(bank, workshop, tmp_path):
    from synthkit.models.build import build_model
    from synthkit.models.weights import save_weights

    network = build_model("lenet5_half_bn", num_classes=4, in_channels=1, image_size=32, seed=3)
    network.train()
    with torch.no_grad():
        network(torch.randn(64, 1, 32, 32))
    save_weights(network.eval(), tmp_path / "bn.safetensors")
    card = {"arch": "lenet5_half_bn", "weights": "bn.safetensors", "num_classes": 4, "input_size": [1, 32, 32],
            "mean": [0.3], "std": [0.3]}  # fmt: skip
    (tmp_path / "bn.json").write_text(json.dumps(card))
    view = TeacherView.from_loaded(load_model(str(tmp_path / "bn.json")))
    before = {k: v.clone() for k, v in view.module.state_dict().items()}
    images = torch.rand(16, 1, 32, 32)
    with torch.no_grad():
        evaluated = view(images)
        with teacher_mode(view, "batch"):
            batched = view(images)
        assert torch.equal(view(images), evaluated) and not torch.allclose(batched, evaluated, atol=1e-2)
    assert all(torch.equal(before[k], v) for k, v in view.module.state_dict().items())
    assert not any(m.training for m in view.module.modules())

    spec = str(tmp_path / "bn.json")
    labels = relabel(fkd(bank, "bssl", teacher=spec, bn="batch", batch_size=50))  # 576 rows: the last batch is short
    source = source_of(bank, "bssl", 50)
    with teacher_mode(view, "batch"), torch.no_grad():
        first = view(source.batch(0).images)
        rows = np.arange(526, 576)  # filled up with the rows before it
        store = Bank(bank).batch
        views = labels.views(rows)
        from synthkit.bank.labels.views import apply_views

        own, partners = (torch.from_numpy(store(r, ["images"]).images) for r in (views.sample, views.partner_sample))
        last = view(apply_views(own, views, (32, 32), partners))
    assert (first - torch.from_numpy(labels.logits(np.arange(50))).float()).abs().max() < 5e-3
    assert (last[24:] - torch.from_numpy(labels.logits(rows[24:])).float()).abs().max() < 5e-3
    with pytest.raises(RequirementError, match="no BatchNorm"):
        relabel(config(bank, "b", bn="batch"))  # lenet5_half has none


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"mix": "none", "top_k": 2, "batch_size": 50}])
def test_a_lost_shard_is_made_again_with_the_same_bytes(bank, options):
    relabel(fkd(bank, **options))
    before = hashes(bank, "fkd")
    assert len(before) > 5
    for name in ("00002", "00004"):
        (bank / "labels" / "fkd" / f"{name}.json").unlink()
        (bank / "labels" / "fkd" / f"{name}.h5").unlink()
    with pytest.raises(OutputExistsError, match="--resume"):
        relabel(fkd(bank, **options))
    relabel(fkd(bank, resume=True, **options))
    assert hashes(bank, "fkd") == before and verify(bank, deep=True).problems == {}
    relabel(fkd(bank, "again", **options))
    assert hashes(bank, "again") == before
    with pytest.raises(BankMismatchError, match="seed"):
        relabel(fkd(bank, resume=True, **{**options, "seed": 6}))


def test_kill_and_resume_gives_the_same_bytes(bank, tmp_path):
    words = ["--bank", str(bank), "--views", "8", "--mix", "cutmix", "--batch_size", "8", "--device", "cpu",
             "--threads", "1"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(synthkit.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "synthkit", "relabel", *words, "--name", "killed", "--resume"]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = bank / "labels" / "killed"
    end = time.monotonic() + 60
    while len(list(folder.glob("0*.json"))) < 3 and time.monotonic() < end and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = len(list(folder.glob("0*.json")))
    assert 3 <= done < 20
    assert verify(bank, deep=True).problems == {}
    assert main(["relabel", *words, "--name", "killed", "--resume"]) == 0
    assert main(["relabel", *words, "--name", "whole"]) == 0
    assert hashes(bank, "killed") == hashes(bank, "whole")
    assert not [p for p in folder.rglob("*") if ".tmp-" in p.name]
    assert verify(bank, deep=True).problems == {}


# --- the source -------------------------------------------------------------------------------------------------------


def test_views_come_in_stored_order_and_begin_again(bank):
    relabel(fkd(bank))
    labels, source = Bank(bank).labels("fkd"), source_of(bank, "fkd", 100)
    assert source.steps_per_epoch == 1
    seen = np.concatenate([source.views(step)[0] for step in range(6)])
    assert np.array_equal(seen, np.arange(600) % 576)
    batch = source.batch(5)  # over the end: rows 500 to 575, then 0 to 23
    assert torch.equal(batch.logits, torch.from_numpy(labels.logits(seen[500:])).float())
    own = Bank(bank).column("labels")[labels.views(seen[500:]).sample]
    assert torch.equal(batch.labels, torch.from_numpy(own).long())
    assert torch.equal(source_of(bank, "fkd", 100).batch(5).images, batch.images)  # nothing before it is needed


def test_ranks_share_the_batch_and_a_streamed_bank_gives_the_same(bank):
    relabel(fkd(bank, top_k=2))
    whole = source_of(bank, "fkd", 32).batch(4)
    parts = [source_of(bank, "fkd", 32, rank=r, world=2).batch(4) for r in range(2)]
    assert torch.equal(whole.images, torch.stack([p.images for p in parts], 1).flatten(0, 1))
    assert torch.equal(whole.logits, torch.stack([p.logits for p in parts], 1).flatten(0, 1))
    streamed = source_of(bank, "fkd", 32, store=StreamedStore(Bank(bank), CPU, logits=None))
    for step in (3, 4, 0):
        assert torch.equal(streamed.batch(step).images, source_of(bank, "fkd", 32).batch(step).images)
    streamed.close()
    with pytest.raises(ConfigError, match="multiple of the 3 processes"):
        source_of(bank, "fkd", 32, world=3)


def test_no_view_shows_a_held_out_image(bank):
    relabel(fkd(bank, mix="mixup"))
    labels, held = Bank(bank).labels("fkd"), set(range(0, 192, 4))
    source = source_of(bank, "fkd", 16, held=held)
    kept = source.rows.at(0, len(source.rows))
    assert len(np.unique(kept)) == len(kept) and (np.diff(kept) > 0).all()
    views = labels.views(np.arange(576))
    sees = np.isin(views.sample, list(held))
    partner = np.zeros(576, bool)
    partner[views.mixed] = np.isin(views.partner_sample, list(held))
    assert np.array_equal(np.flatnonzero(~(sees | partner)), kept) and 200 < len(kept) < 400
    for step in (0, 40):
        assert not set(source.views(step)[1].sample) & held and not set(source.views(step)[1].partner_sample) & held
    with pytest.raises(DataError, match="every view"):
        source_of(bank, "fkd", 16, held=range(192))


def test_stored_logits_of_banks_and_sets_are_read_alike(bank, tmp_path):
    from synthkit.bank import BankSpec, BankWriter
    from synthkit.bank.labels.topk import compress_topk

    opened = Bank(bank)
    dense = opened.column("logits")
    spec = replace(opened.spec, top_k=2)
    assert isinstance(spec, BankSpec)
    writer = BankWriter.create(tmp_path / "topk", spec)
    for index in range(writer.shards):
        rows = np.arange(index * spec.per_shard, index * spec.per_shard + writer.shard_size(index))
        batch = opened.batch(rows)
        index_, logit, tail = compress_topk(batch.logits, 2)
        columns = {"topk_index": index_, "topk_logit": logit, "tail_logsumexp": tail}
        writer.write_shard(index, {"images": batch.images, "labels": batch.labels, **columns})
    kept = Bank(tmp_path / "topk")
    assert not kept.has("logits")
    for stored in (StoredLogits(kept), StoredLogits(relabel(config(tmp_path / "topk", "t", top_k=2)))):
        found = stored.read(np.array([5, 3])).dense()
        assert found.dtype == torch.float32 and torch.equal(found.argmax(1), torch.from_numpy(dense[[5, 3]]).argmax(1))
        assert (
            found.softmax(1).amax(1) - torch.from_numpy(dense[[5, 3]]).float().softmax(1).amax(1)
        ).abs().max() < 1e-3
        assert stored.row_bytes == 6 * 2 + 4
    plain = student_config(tmp_path / "topk", tmp_path / "run", label_set=None, logits="stored", augment="none")
    result = distill(replace(plain, epochs=1))
    assert result.metrics["holdout_agreement"] >= 0  # measured against the stored top-k


# --- distilling -------------------------------------------------------------------------------------------------------


def student_config(bank: Path, out: Path, **changes) -> DistillConfig:
    values = {"bank": str(bank), "student": "lenet5_half_bn", "label_set": "fkd", "epochs": 3, "batch_size": 32,
              "optimizer": "adamw", "lr": 2e-3, "out": str(out), "runtime": RUNTIME}  # fmt: skip
    return DistillConfig(**{**values, **changes})


def test_a_student_learns_from_views_and_resumes_exactly(bank, tmp_path, monkeypatch, capfd):
    from safetensors.torch import load_file

    from synthkit.distillation import trainer

    relabel(fkd(bank, views=4, mix="none", crop_scale=(0.6, 1.0), flip=0.0))
    result = distill(student_config(bank, tmp_path / "whole", epochs=12))
    said = capfd.readouterr().err
    assert "augment none" in said and "label set fkd (768 views, all logits, " in said and "left out" in said
    assert "they are read" in said  # 12 epochs of 4 stored ones
    assert result.metrics["image_bytes"] == 192 * 1024 and result.metrics["label_bytes"] > 768 * 45
    assert result.metrics["label_set"] == "fkd" and result.metrics["holdout_agreement"] > 0.6

    class Stopped(Exception):
        pass

    original, count = trainer.Trainer._train_step, [0]

    def step(self):
        count[0] += 1
        if count[0] == 33:
            self.save()
            raise Stopped
        return original(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", step)
    with pytest.raises(Stopped):
        distill(student_config(bank, tmp_path / "cut", epochs=12))
    monkeypatch.setattr(trainer.Trainer, "_train_step", original)
    distill(student_config(bank, tmp_path / "cut", epochs=12, resume=True))
    files = [load_file(str(tmp_path / n / "student.safetensors")) for n in ("whole", "cut")]
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])


def test_a_set_of_images_takes_the_place_of_the_banks_logits(bank, workshop, tmp_path):
    from safetensors.torch import load_file

    relabel(config(bank, "plain"))
    relabel(config(bank, "exact", top_k=3))
    common = {"augment": "none", "epochs": 2}
    distill(student_config(bank, tmp_path / "own", label_set=None, logits="stored", **common))
    distill(student_config(bank, tmp_path / "set", label_set="plain", **common))
    distill(student_config(bank, tmp_path / "topk", label_set="exact", **common))
    files = {n: load_file(str(tmp_path / n / "student.safetensors")) for n in ("own", "set", "topk")}
    for name in ("set", "topk"):  # the bank's logits came from the same teacher: the same student
        assert all(torch.allclose(files["own"][k], v, atol=1e-5) for k, v in files[name].items())


def test_a_set_without_its_teacher_is_enough(bank, tmp_path):
    relabel(fkd(bank))
    where = bank / "labels" / "fkd" / "labels.json"
    raw = json.loads(where.read_text())
    raw["teacher"]["spec"] = "/nowhere/teacher"
    where.write_text(json.dumps(raw))
    task = check_task(student_config(bank, tmp_path / "run"))
    assert task.teacher is None and not task.live and any("is not here" in n for n in task.notes)
    assert "holdout_agreement" in distill(student_config(bank, tmp_path / "run", epochs=1)).metrics  # the bank's logits


def test_contradictions_are_refused(bank, tmp_path):
    relabel(fkd(bank))
    relabel(config(bank, "plain"))
    for changes, match in (
        ({"augment": "crop_flip"}, "holds views, which are the augmentation"),
        ({"logits": "live"}, "stored logits"),
        ({"fresh": 0.5}, "fresh"),
        ({"order": "easy2hard"}, "stored order"),
    ):
        with pytest.raises(ConfigError, match=match):
            distill(student_config(bank, tmp_path / "run", **changes))
    with pytest.raises(synthkit.errors.UsageError, match="did you mean 'plain'"):
        distill(student_config(bank, tmp_path / "run", label_set="plane"))
    (bank / "labels" / "plain" / "00001.json").unlink()
    with pytest.raises(DataError, match="unfinished"):
        distill(student_config(bank, tmp_path / "run", label_set="plain"))
    assert not (tmp_path / "run").exists()
    assert check_task(student_config(bank, tmp_path / "run", augment="none")).plan.augment == "none"


def test_a_tiny_bank_trains_on_views_and_on_images(workshop, tmp_path):
    from synthkit.bank.make import bank_from_arrays

    path = tmp_path / "ipc1"
    bank_from_arrays(path, workshop.images[:4], np.arange(4), num_classes=4, mean=[0.3], std=[0.3], label_kind="target")
    relabel(fkd(path, teacher=str(workshop.teacher), views=6))
    common = {"holdout": 0.0, "teacher": str(workshop.teacher), "epochs": 3, "batch_size": None}
    for name in ("fkd", None):
        result = distill(student_config(path, tmp_path / f"run{name}", label_set=name, **common))
        assert result.metrics["steps"] == 3
    again = distill(student_config(path, tmp_path / "by-flag", **{**common, "batch_size": 16}))
    assert again.metrics["steps"] == 3  # views are many: the batch that was asked for


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused_and_nothing_is_written(bank, workshop, tmp_path):
    for changes, error, match in (
        ({"name": "No Good"}, synthkit.errors.UsageError, "e.g. no-good"),
        ({"mix": "cutmix"}, ConfigError, "mix is for views"),
        ({"crop_scale": (0.5, 1.0)}, ConfigError, "crop_scale is for views"),
        ({"views": -1}, ConfigError, "negative"),
        ({"views": 2, "crop_scale": (0.0, 1.0)}, ConfigError, "crop_scale"),
        ({"top_k": 4}, ConfigError, "top_k must be 1 to 3"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"teacher": "lenet5_bn"}, ModelError, "10 classes"),
        ({"teacher": "nowhere.pt"}, ModelError, "nowhere"),
        ({"bank": str(workshop.bare)}, RequirementError, "names no teacher"),
    ):
        with pytest.raises(error, match=match):
            relabel(replace(config(bank), **changes))
    assert not (bank / "labels").exists() and not (workshop.bare / "labels").exists()


def test_a_teacher_of_another_class_order_is_refused(bank, workshop, tmp_path):
    shutil.copytree(workshop.teacher, tmp_path / "teacher")
    card = tmp_path / "teacher" / "card.yaml"
    text = card.read_text()
    assert "upper left" in text
    card.write_text(text.replace("upper left", "@").replace("upper right", "upper left").replace("@", "upper right"))
    with pytest.raises(ModelError, match="another order"):
        relabel(config(bank, teacher=str(tmp_path / "teacher")))


def test_command_line(bank, capsys):
    words = ["relabel", "--bank", str(bank), "--device", "cpu"]
    assert main([*words, "--name", "v", "--views", "2", "--crop_scale", "0.5", "1", "--top_k", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["rows"] == 384 and found["kind"] == "views" and found["bytes_per_row"] == 49
    assert set(found["tail_error"]) == {"1", "2", "4", "20"} and found["policy"]["views"]["crop"]["scale"] == [0.5, 1.0]
    assert "49 bytes per row" in err and "rows/s, about" in err
    assert main([*words, "--name", "i"]) == 0
    assert "the teacher names the bank's label on 100.00 %" in capsys.readouterr().out
    assert main([*words, "--name", "i"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert synthkit.relabel(str(bank), "from_python", device="cpu").complete
    assert Bank(bank).label_sets() == ["from_python", "i", "v"]


def test_machines_share_the_shards(bank, capsys):
    relabel(fkd(bank, "whole"))
    words = ["relabel", "--bank", str(bank), "--device", "cpu", "--name", "parts", "--views", "3", "--batch_size", "16"]
    words += ["--crop_scale", "0.3", "1", "--mix", "cutmix", "--seed", "5"]
    assert main([*words, "--shards", "2/3"]) == 0
    assert "unfinished (6 of 18 shards)" in capsys.readouterr().out
    assert Bank(bank).labels("parts").missing == [i for i in range(18) if i % 3 != 1]
    assert main([*words, "--shards", "1/3"]) == 0 and main([*words, "--shards", "3/3"]) == 0
    assert hashes(bank, "parts") == hashes(bank, "whole") and Bank(bank).labels("parts").complete
    assert (bank / "labels" / "parts" / "manifest.json").exists()
    assert main([*words, "--shards", "4/3"]) == 2


def test_a_spec_written_by_hand_can_be_filled(bank):
    """Labels from elsewhere (a downloaded FKD bank): the writer is public."""
    record = Bank(bank).record
    spec = LabelSpec(kind="images", bank=record["uuid"], images=192, rows=192, num_classes=4, rows_per_shard=192)
    LabelWriter.create(bank, "mine", spec).write_shard(0, {"logits": np.eye(4)[np.arange(192) % 4]})
    assert Bank(bank).labels("mine").logits([5]).tolist() == [[0, 1, 0, 0]]
