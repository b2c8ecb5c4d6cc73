"""`synthkit evaluate` from end to end with a tiny network on files written here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit.bank import Bank, BankSpec, BankWriter
from synthkit.cli.evaluate import run
from synthkit.cli.main import main
from synthkit.config.schema import EvaluateConfig, RuntimeConfig
from synthkit.distillation.sources import split_holdout
from synthkit.errors import DataError, OutputExistsError, UsageError
from synthkit.evaluation.metrics import evaluate_classifier
from synthkit.models.build import build_model, load_model
from synthkit.models.card import ModelCard
from synthkit.models.view import TeacherView
from synthkit.models.weights import save_weights

CPU = RuntimeConfig(device="cpu")
SHARED = Path(__file__).parents[2].parent / "shared"


def write_model(folder: Path, seed: int, *, classes: int = 4, names: list[str] | None = None, extra=None) -> Path:
    folder.mkdir(parents=True)
    save_weights(build_model("lenet5", num_classes=classes, in_channels=1, seed=seed), folder / "student.safetensors")
    card = ModelCard(
        arch="lenet5", num_classes=classes, input_size=(1, 32, 32), mean=[0.5], std=[0.5],
        weights="student.safetensors", class_names=names, extra=extra or {},
    )  # fmt: skip
    card.save(folder / "card.yaml")
    return folder


NAMES = ["north", "east", "south", "west"]


@pytest.fixture
def files(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x_test=images, y_test=np.arange(60) % 4, class_names=np.array(NAMES))
    write_model(tmp_path / "teacher", 1, names=NAMES)
    write_model(tmp_path / "student", 2, names=NAMES, extra={"teacher": {"spec": str(tmp_path / "teacher")}})
    return tmp_path


def config(files: Path, **changes) -> EvaluateConfig:
    values = {"model": str(files / "student"), "data": f"npz:{files}/data.npz", "runtime": CPU}
    return EvaluateConfig(**{**values, **changes})


def test_table_and_record(files, capsys):
    result = run(config(files))
    scores = result["metrics"]
    assert scores["n"] == 60 and 0 <= scores["agreement"] <= 1 and result["teacher"]["spec"] == str(files / "teacher")
    assert any("resized from (1, 28, 28) to (1, 32, 32)" in text for text in result["notes"])
    assert {"torch", "python"} <= set(result["versions"]) and result["hardware"]["cores"] >= 1
    text = capsys.readouterr().out
    for line in (
        f"{100 * scores['top1']:.2f} %", f"{scores['ece']:.4f}", f"{scores['kl']:.4f} nats", "per class:", "north",
        "note: images were resized",
    ):  # fmt: skip
        assert line in text
    json.dumps(result)


def test_figures_are_those_of_the_library(files):
    from synthkit.data.specs import load_data

    view = TeacherView.from_loaded(load_model(str(files / "student")))
    wanted = evaluate_classifier(view, load_data(f"npz:{files}/data.npz", size=(1, 32, 32)))
    found = run(config(files), quiet=True)["metrics"]
    assert found["top1"] == wanted["top1"] and found["nll"] == pytest.approx(wanted["nll"])


def test_json_on_the_command_line(files, capsys):
    words = ["evaluate", "--model", str(files / "student"), "--data", f"npz:{files}/data.npz", "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["metrics"]["n"] == 60
    assert main(words) == 0
    assert "per class" in capsys.readouterr().out


def test_limit_is_a_seeded_sample(files):
    one, same, other = (run(config(files, limit=20, seed=s), quiet=True)["metrics"] for s in (0, 0, 1))
    assert one["n"] == 20 and one == same and one != other


def test_out_collects_results(files, capsys):
    out = files / "results.json"
    run(config(files, out=str(out)))
    run(config(files, out=str(out), model=str(files / "teacher")))
    run(config(files, out=str(out)))  # the same again replaces its own entry
    found = json.loads(out.read_text())
    assert found["kind"] == "synthkit evaluate"
    assert [Path(r["model"]["spec"]).name for r in found["results"]] == ["teacher", "student"]
    out.write_text('{"something": "else"}')
    with pytest.raises(OutputExistsError, match="choose another --out"):
        run(config(files, out=str(out)))
    assert out.read_text() == '{"something": "else"}'


def test_a_remembered_teacher_that_is_gone_is_said(files):
    (files / "teacher" / "card.yaml").unlink()
    result = run(config(files), quiet=True)
    assert result["teacher"] is None and "agreement" not in result["metrics"]
    assert any("cannot be loaded, so it is left out" in text for text in result["warnings"])
    with pytest.raises(UsageError):
        run(config(files, teacher=str(files / "teacher")), quiet=True)


def test_a_teacher_of_other_classes_is_refused(files):
    write_model(files / "five", 3, classes=5)
    with pytest.raises(DataError, match="has 5 classes, model"):
        run(config(files, teacher=str(files / "five")), quiet=True)


def test_data_in_another_order_is_mapped_and_said(files):
    straight = run(config(files), quiet=True)
    with np.load(files / "data.npz") as store:
        images, labels = store["x_test"], store["y_test"]
    turned = np.array(NAMES[::-1])
    np.savez(files / "turned.npz", x_test=images, y_test=3 - labels, class_names=turned)
    result = run(config(files, data=f"npz:{files}/turned.npz"), quiet=True)
    assert result["metrics"]["top1"] == straight["metrics"]["top1"]
    assert any("mapped by name" in text for text in result["warnings"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": None}, "evaluate: no data; give --data"),
        ({"limit": 0}, "limit"),
        ({"split": "train"}, "no train part"),
    ],
)
def test_wrong_usage(files, changes, words):
    with pytest.raises(UsageError, match=words):
        run(config(files, **changes), quiet=True)


# --- banks ------------------------------------------------------------------------------------------------------------


def make_bank(path: Path, *, kind: str = "argmax", logits: bool = True, seed: int = 0) -> Bank:
    spec = BankSpec(
        shape=(1, 32, 32), num_classes=4, class_names=NAMES, mean=[0.5], std=[0.5], images=40,
        images_per_shard=20, label_kind=kind, seed=seed,
    )  # fmt: skip
    writer = BankWriter.create(path, spec)
    rng = np.random.default_rng(seed)
    for i in range(2):
        arrays = {
            "images": rng.integers(0, 256, (20, 1, 32, 32), dtype=np.uint8),
            "labels": (np.arange(20) % 4).astype(np.int32),
        }
        writer.write_shard(i, arrays | ({"logits": rng.normal(size=(20, 4)).astype(np.float16)} if logits else {}), {})
    return Bank(path)


def test_a_bank_is_agreement_and_not_accuracy(files, capsys):
    make_bank(files / "bank")
    result = run(config(files, data=f"bank:{files}/bank"))
    assert result["metrics"]["what"] == "agreement on synthetic bank (no real labels)"
    assert result["metrics"]["teacher_logits"] == "live" and "top1" not in result["metrics"]
    text = capsys.readouterr().out
    assert "agreement on synthetic bank (no real labels)" in text and "top-1" not in text


def test_a_bank_of_real_labels_is_labelled_data(files):
    make_bank(files / "bank", kind="real")
    assert run(config(files, data=f"bank:{files}/bank"), quiet=True)["metrics"]["top1"] >= 0


def test_a_bank_without_anything_to_agree_with(files):
    make_bank(files / "bank", logits=False)
    write_model(files / "alone", 5, names=NAMES)
    with pytest.raises(DataError, match="neither a teacher nor stored logits"):
        run(config(files, model=str(files / "alone"), data=f"bank:{files}/bank"), quiet=True)
    make_bank(files / "stored")
    found = run(config(files, model=str(files / "alone"), data=f"bank:{files}/stored"), quiet=True)
    assert found["metrics"]["teacher_logits"] == "stored"
    with pytest.raises(DataError, match="did you mean 'bank'"):
        run(config(files, data=f"bank:{files}/bnak"), quiet=True)


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_run_is_measured_on_what_it_held_out(files, seeds):
    bank = make_bank(files / "bank")
    uuid = bank.record["uuid"]
    top = files / "run"
    folder = top if seeds == 1 else top / "seed5"
    extra = {"bank": {"path": str(files / "bank"), "uuid": uuid}, "teacher": {"spec": str(files / "teacher")}}
    write_model(folder, 2, names=NAMES, extra=extra)
    settings = {"config": {"holdout": 0.25, "seed": 4, "seeds": seeds}}
    (top / "run.json").write_text(json.dumps(settings))
    if seeds == 2:
        (folder / "run.json").write_text(json.dumps({"config": {"holdout": 0.25, "seed": 5, "seeds": 1}}))
    result = run(config(files, model=str(folder), data=None), quiet=True)
    held = split_holdout(40, 0.25, 4)[1]
    student = TeacherView.from_loaded(load_model(str(folder)))
    with torch.no_grad():
        predicted = student(torch.from_numpy(bank.batch(held).images)).argmax(1)
    assert result["metrics"]["n"] == 10
    assert result["metrics"]["predicted"] == {n: int((predicted == i).sum()) for i, n in enumerate(NAMES)}
    assert any("held out of training" in text for text in result["notes"])


def test_a_bank_that_was_trained_on_is_said(files):
    bank = make_bank(files / "bank")
    extra = {"bank": {"path": str(files / "bank"), "uuid": bank.record["uuid"]}}
    write_model(files / "moved", 2, names=NAMES, extra=extra)
    result = run(config(files, model=str(files / "moved"), data=None), quiet=True)
    assert result["metrics"]["n"] == 40 and any("no held-out measure" in text for text in result["warnings"])


# --- real data and third-party teachers -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "top1"), [("resnet20", 0.916), ("resnet56", 0.926)])
def test_third_party_teachers_on_real_images(name, top1):
    card = Path(__file__).parents[2] / "recipes" / "teachers" / f"{name}.yaml"
    result = run(EvaluateConfig(model=str(card), data=f"cifar10:{SHARED}/data/cifar10-subset", runtime=CPU), quiet=True)
    assert result["metrics"]["n"] == 932 and result["metrics"]["top1"] == pytest.approx(top1, abs=1e-3)
    assert result["warnings"] == [] and result["notes"] == []
