"""`distill` end to end: what it writes, that it resumes, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from synthkit.bank import Bank, BankSpec, BankWriter
from synthkit.bank.state import transform_entry
from synthkit.cli.distill import summary_lines
from synthkit.config.schema import DistillConfig, RuntimeConfig
from synthkit.distillation import trainer as trainer_module
from synthkit.distillation.distill import distill
from synthkit.errors import (
    BankError,
    ConfigError,
    DataError,
    ModelError,
    NonFiniteError,
    OutputExistsError,
    RequirementError,
)
from synthkit.models.build import load_model
from synthkit.models.card import ModelCard
from synthkit.models.view import TeacherView

CPU = RuntimeConfig(device="cpu")


@pytest.fixture
def config(workshop, tmp_path):
    """A config over small defaults; the tests do not hang on what the presets hold."""

    def make(**changes) -> DistillConfig:
        values = {
            "bank": str(workshop.bank),
            "student": "lenet5_half_bn",
            "epochs": 2,
            "batch_size": 32,
            "optimizer": "adamw",
            "lr": 2e-3,
            "augment": "none",
            "out": str(tmp_path / "run"),
            "runtime": CPU,
        }
        return DistillConfig(**{**values, **changes})

    return make


def weights(path) -> dict[str, torch.Tensor]:
    return load_file(str(Path(path) / "student.safetensors"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_a_student_learns_from_the_bank_alone(config, workshop):
    result = distill(config(epochs=12, eval_data=workshop.data, eval_every=4, control="noise"))
    figures = result.metrics
    assert figures["top1"] >= 0.9 and figures["teacher_top1"] >= 0.95 and figures["holdout_agreement"] >= 0.8
    assert figures["retention"] == pytest.approx(figures["top1"] / figures["teacher_top1"])
    assert list(figures["first_gradient_norms"]) == ["kd"] and figures["first_gradient_norms"]["kd"] > 0
    assert result.control is not None and result.control["steps"] == figures["steps"] == 12 * (182 // 32)
    assert result.control["top1"] < figures["top1"] and result.control["images"] == 0

    path = result.path
    assert sorted(p.name for p in path.iterdir()) == [
        "card.yaml", "control", "metrics.jsonl", "result.json", "run.json", "student.safetensors",
    ]  # fmt: skip
    card = ModelCard.load(result.student)
    assert isinstance(card.accuracy, dict) and [*card.accuracy.values()] == pytest.approx([figures["top1"]], abs=1e-6)
    assert card.extra["bank"]["uuid"] == Bank(workshop.bank).record["uuid"]
    assert card.extra["teacher"]["spec"] == str(workshop.teacher) and card.extra["loss"]["temperature"] == 4.0
    for spec in (str(path), str(result.student)):  # the run directory and its card are both models
        view = TeacherView.from_loaded(load_model(spec))
        assert view.mean == Bank(workshop.bank).mean and view.class_names == Bank(workshop.bank).class_names
    images = torch.from_numpy(workshop.images)
    with torch.no_grad():
        agreement = (view(images).argmax(1) == workshop.logits.argmax(1)).float().mean()
    assert float(agreement) >= 0.9

    run = json.loads((path / "run.json").read_text())
    assert run["status"] == "done" and run["plan"]["batch_size"] == 32 and run["protocol"] == "mnist"
    assert run["changed"] == ["augment", "batch_size", "epochs", "lr", "optimizer"]
    assert run["versions"]["torch"] and run["peak_memory"] > 0
    assert run["config"]["student"] == "lenet5_half_bn" and run["hardware"]["cores"] >= 1
    logged = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in logged if "top1" in r] == [4, 8, 12] and len(logged) == 12
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert figures["best_top1_diagnostic"] == max(r["top1"] for r in logged if "top1" in r)
    text = "\n".join(summary_lines(result))
    assert f"{100 * figures['top1']:.2f} %" in text and "noise" in text and str(path) in text


def test_the_distilled_student_is_a_teacher(config, workshop, tmp_path):
    first = distill(config())
    second = distill(config(teacher=str(first.path), student="lenet5_half", out=str(tmp_path / "second"), epochs=1))
    assert second.metrics["teacher"] == str(first.path.resolve())
    note = json.loads((second.path / "run.json").read_text())["notes"]
    assert any("another file" in text for text in note) or Bank(workshop.bank).spec.teacher.get("sha256") is None


def test_same_seed_same_student_and_weights_start_from_a_file(config, tmp_path):
    one, two = (distill(config(out=str(tmp_path / n))) for n in ("a", "b"))
    other = distill(config(out=str(tmp_path / "c"), seed=1))
    assert same(weights(one.path), weights(two.path)) and not same(weights(one.path), weights(other.path))
    tuned = distill(config(student=str(one.path), out=str(tmp_path / "d"), lr=1e-12, weight_decay=0.0, epochs=1))
    for name, value in weights(tuned.path).items():
        if "weight" in name or "bias" in name:
            torch.testing.assert_close(value, weights(one.path)[name], rtol=0, atol=1e-8)


def test_several_seeds(config):
    result = distill(config(seeds=3, epochs=1, seed=5))
    assert [s.parent.name for s in result.students] == ["seed5", "seed6", "seed7"]
    summary = json.loads((result.path / "summary.json").read_text())
    losses = [json.loads((result.path / f"seed{s}" / "result.json").read_text())["loss"] for s in (5, 6, 7)]
    assert len(set(losses)) == 3
    assert summary["loss"] == pytest.approx({"mean": np.mean(losses), "std": np.std(losses, ddof=1), "n": 3})
    assert "lr" not in summary and summary["n"] == 3
    assert "+-" in "\n".join(summary_lines(result))


def test_real_control_has_the_same_steps(config, workshop):
    result = distill(config(control=workshop.data, epochs=2))
    assert result.control is not None and result.control["steps"] == result.metrics["steps"]
    assert result.control["images"] == 182 and "random real images" in result.control["trained_on"]


@pytest.mark.parametrize("loss", ["kd", "l1", "soft_ce", "js"])
@pytest.mark.parametrize("logits", ["live", "stored"])
def test_every_loss_live_and_stored(config, loss, logits):
    result = distill(config(loss_name=loss, logits=logits, labels="argmax", label_weight=0.5, epochs=3))
    logged = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert logged[0]["loss"] == pytest.approx(logged[0][loss] + logged[0]["label_ce"], rel=1e-5)


def test_stored_logits_give_nearly_the_live_student(config, tmp_path):
    live = distill(config(out=str(tmp_path / "a"), logits="live", epochs=1))
    stored = distill(config(out=str(tmp_path / "b"), logits="stored", epochs=1))
    assert live.metrics["loss"] == pytest.approx(stored.metrics["loss"], rel=1e-2)  # the bank rounds to fp16
    assert "teacher" in live.metrics and live.metrics["holdout_agreement"] == stored.metrics["holdout_agreement"]


def test_stored_logits_with_augmentation_are_called_another_method(config):
    result = distill(config(logits="stored", augment="shift", steps=2, epochs=None))
    notes = json.loads((result.path / "run.json").read_text())["notes"]
    assert any("another method" in text for text in notes)


def test_a_bank_whose_teacher_is_gone_falls_back_on_its_logits(config, workshop, tmp_path):
    copy = tmp_path / "moved"
    shutil.copytree(workshop.bank, copy)
    record = json.loads((copy / "bank.json").read_text())
    text = (copy / "bank.json").read_text().replace(str(workshop.teacher), str(tmp_path / "gone.yaml"))
    (copy / "bank.json").write_text(text)
    assert record["uuid"] in text
    result = distill(config(bank=str(copy), epochs=1))
    notes = json.loads((result.path / "run.json").read_text())["notes"]
    assert any("stored logits are used" in t for t in notes)
    with pytest.raises(ModelError):
        distill(config(bank=str(copy), logits="live", out=str(tmp_path / "x")))


def test_fresh_images_change_the_student(config, generator_bank, tmp_path):
    values = {"bank": str(generator_bank.path), "epochs": 1}
    runs = [distill(config(**values, fresh=share, out=str(tmp_path / str(share)))) for share in (0.0, 0.5, 1.0)]
    assert [run.metrics["fresh"] for run in runs] == [0.0, 0.5, 1.0]
    first, half, every = (weights(run.path) for run in runs)
    assert not same(first, half) and not same(half, every)
    usual = distill(config(**values, out=str(tmp_path / "usual")))  # half of every batch, where there are snapshots
    assert usual.metrics["fresh"] == 0.5 and same(weights(usual.path), half)
    labelled = distill(config(**values, labels="stored", label_weight=0.5, out=str(tmp_path / "labelled")))
    assert labelled.metrics["fresh"] == 0.0  # fresh images have no stored labels


def test_easy_to_hard_reads_the_easy_images_first(config, workshop, monkeypatch):
    seen: list[np.ndarray] = []
    from synthkit.distillation import sources

    original = sources.StoreSource.indices

    def spy(self, step):
        found = original(self, step)
        seen.append(found)
        return found

    monkeypatch.setattr(sources.StoreSource, "indices", spy)
    distill(config(order="easy2hard", epochs=10))
    first = workshop.difficulty[np.concatenate(seen[:10])].mean()
    last = workshop.difficulty[np.concatenate(seen[-10:])].mean()
    assert first < last


# --- resume -----------------------------------------------------------------------------------------------------------


def test_resume_of_a_finished_run_reads_it(config, workshop, monkeypatch):
    first = distill(config(control="noise"))
    monkeypatch.setattr(trainer_module.Trainer, "fit", lambda self: pytest.fail("trained again"))
    again = distill(config(control="noise", resume=True))
    assert again.metrics == first.metrics and again.student == first.student


def test_resume_needs_the_same_configuration(config):
    distill(config(epochs=1))
    with pytest.raises(ConfigError, match=r"another configuration .*epochs: 1 -> 2, .*lr: 0.002 -> 0.5"):
        distill(config(epochs=2, lr=0.5, resume=True))
    distill(config(epochs=1, resume=True, runtime=RuntimeConfig(device="cpu", threads=1)))  # the place may differ


def test_nan_writes_no_result(config):
    with pytest.raises(NonFiniteError, match=r"not finite at step \d+ of .* lower lr"):
        distill(config(lr=1e20, optimizer="sgd", schedule="constant"))
    out = Path(config().out or "")
    assert not (out / "student.safetensors").exists() and not (out / "card.yaml").exists()
    assert json.loads((out / "run.json").read_text())["status"] == "running"


# --- refusals ---------------------------------------------------------------------------------------------------------

BAD = [
    ({"bank": "nowhere"}, BankError, "nowhere"),
    ({"student": "lenet6"}, ModelError, "did you mean"),
    ({"student": "resnet8@nowhere.pt"}, ModelError, "nowhere.pt"),
    ({"loss_name": "kdd"}, ConfigError, "did you mean 'kd'"),
    ({"loss": {"temprature": 2.0}}, ConfigError, "did you mean 'temperature'"),
    ({"protocol": "mnst"}, ConfigError, "did you mean 'mnist'"),
    ({"augment": "crop_flp"}, ConfigError, "did you mean 'crop_flip'"),
    ({"epochs": 0}, ConfigError, "epochs"),
    ({"seeds": 0}, ConfigError, "seeds"),
    ({"holdout": 1.0}, ConfigError, "holdout"),
    ({"fresh": 1.5}, ConfigError, "fresh"),
    ({"fresh": 0.5}, RequirementError, "no generator snapshots"),
    ({"fresh": 0.5, "logits": "stored"}, RequirementError, "fresh images need a live teacher"),
    ({"labels": "argmax"}, ConfigError, "go together"),
    ({"label_weight": 0.5}, ConfigError, "go together"),
    ({"control": "nois"}, ConfigError, "did you mean 'noise'"),
    ({"eval_data": "npz:nowhere.npz"}, DataError, "nowhere"),
]


@pytest.mark.parametrize("changes, error, message", BAD, ids=lambda x: str(x)[:40] if isinstance(x, dict) else "")
def test_wrong_input_is_refused_and_nothing_is_written(config, changes, error, message):
    cfg = config(**changes)
    with pytest.raises(error, match=message):
        distill(cfg)
    assert not Path(cfg.out or "").exists()


def test_a_batch_larger_than_the_bank_is_the_whole_bank(config, capfd):
    result = distill(config(batch_size=4000))
    assert "batch_size 4000 is more than the 182 training images: every step takes 182" in capfd.readouterr().err
    assert result.metrics["steps"] == 2
    assert json.loads((Path(config().out) / "run.json").read_text())["plan"]["batch_size"] == 182


def test_a_bare_bank_says_what_it_lacks(config, workshop):
    for changes, message in (
        ({}, "names no teacher and stores no logits"),
        ({"logits": "stored"}, "names no teacher|has none"),
        ({"teacher": str(workshop.teacher), "order": "easy2hard"}, "stores no difficulty"),
        ({"teacher": str(workshop.teacher), "labels": "stored", "label_weight": 1.0}, "has no labels"),
    ):
        with pytest.raises(RequirementError, match=message):
            distill(config(bank=str(workshop.bare), **changes))
    assert not Path(config().out or "").exists()


def test_models_that_do_not_fit(config, workshop, tmp_path):
    from synthkit.models.build import build_model
    from synthkit.models.weights import save_weights

    for name, classes, size in (("ten", 10, (1, 32, 32)), ("colour", 4, (3, 32, 32))):
        folder = tmp_path / name
        arch = "lenet5" if size[0] == 1 else "resnet8"
        save_weights(build_model(arch, num_classes=classes, in_channels=size[0], seed=0), folder / "w.safetensors")
        card = ModelCard(arch=arch, num_classes=classes, input_size=size, mean=[0.5] * size[0], std=[0.2] * size[0])
        card.weights = "w.safetensors"
        card.save(folder / "card.yaml")
    for changes, message in (
        ({"teacher": str(tmp_path / "ten" / "card.yaml")}, "teacher .* has 10 classes, the bank .* has 4"),
        ({"teacher": str(tmp_path / "colour" / "card.yaml")}, r"takes images of \(3, 32, 32\)"),
        ({"student": str(tmp_path / "ten" / "card.yaml")}, "10 classes"),
        ({"student": str(tmp_path / "colour" / "card.yaml")}, "3 channels|takes images of"),
    ):
        with pytest.raises(ModelError, match=message):
            distill(config(**changes))
    assert not Path(config().out or "").exists()


def test_existing_output_is_never_touched(config, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(OutputExistsError):
            distill(config(resume=resume))
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputExistsError, match="a file lies there"):
        distill(config(out=str(blocked)))


def test_a_bank_of_real_images_is_not_called_data_free(config, workshop):
    result = distill(config(bank=str(workshop.real), teacher=str(workshop.teacher), epochs=1))
    notes = json.loads((result.path / "run.json").read_text())["notes"]
    assert any("not data-free" in text for text in notes)


def test_a_bank_behind_a_transform_is_trained_on_as_it_is_viewed(config, workshop, tmp_path, capsys):
    """Whitened pixels suit no network that normalises: the viewable images are taken, and the user is told."""
    source, arrays = Bank(workshop.bank), {"scale": np.full(1, 2.0, np.float32)}
    spec = source.spec
    changed = BankSpec(
        shape=spec.shape, num_classes=spec.num_classes, mean=spec.mean, std=spec.std, images=len(source),
        class_names=spec.class_names, images_per_shard=len(source), teacher=spec.teacher, label_kind=spec.label_kind,
        transform=transform_entry("affine", arrays),
    )  # fmt: skip
    writer = BankWriter.create(tmp_path / "white", changed)
    writer.write_transform(arrays)
    rows = source.batch(np.arange(len(source)))
    far = np.full(rows.images.shape, 50.0, np.float16)  # a network shown these would learn nothing
    writer.write_shard(0, {"images": rows.images, "labels": rows.labels, "logits": rows.logits, "images_f16": far})
    plain = distill(config(out=str(tmp_path / "plain")))
    white = distill(config(bank=str(tmp_path / "white"), out=str(tmp_path / "of-white")))
    assert "affine transform; its viewable images" in capsys.readouterr().err
    assert same(weights(plain.path), weights(white.path))
