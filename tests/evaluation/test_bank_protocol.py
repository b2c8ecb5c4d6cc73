"""`synthkit evaluate --bank`: spaces, labels, control, scores, refusals; from end to end on bars of 8x8 pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import synthkit
from synthkit.bank import Bank, BankSpec, BankWriter
from synthkit.bank.state import transform_entry
from synthkit.cli.main import main
from synthkit.data.zca import ZCA
from synthkit.errors import BankError, ConfigError, DataError, ModelError, RequirementError, UsageError
from synthkit.evaluation.bank_protocol import evaluate_bank
from synthkit.evaluation.bank_sets import BankSets
from synthkit.models.build import build_model
from synthkit.models.card import ModelCard
from synthkit.models.weights import save_weights

NAMES = ["left", "middle", "right"]
CPU = torch.device("cpu")


def bars(n: int, seed: int, noise: float = 60.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.uniform(0, noise, (n, 1, 8, 8))
    for image, label in zip(images, labels, strict=True):
        image[:, :, 2 * label + 1] += 255 - noise
    return images.astype(np.uint8), labels


@pytest.fixture
def data(tmp_path) -> str:
    (train, y_train), (test, y_test) = bars(90, 1), bars(60, 2)
    arrays = {"x_train": train[:, 0], "y_train": y_train, "x_test": test[:, 0], "y_test": y_test}
    np.savez(tmp_path / "data.npz", class_names=np.array(NAMES), **arrays)
    return f"npz:{tmp_path / 'data.npz'}"


def make(path: Path, *, images=None, labels=None, f16=None, logits=None, transform=None, rate=None, **spec) -> Bank:
    """A bank of one image per class, unless given more."""
    if images is None:
        images, labels = bars(3, 0)
    fields = {
        "shape": (1, 8, 8), "num_classes": 3, "mean": [0.2], "std": [0.3], "images": len(images),
        "class_names": NAMES, "label_kind": "target", "recipe": {"method": {"name": "dc", "arch": "convnet_d2_w8"}},
        "transform": transform_entry(*transform) if transform else {},
    }  # fmt: skip
    writer = BankWriter.create(path, BankSpec(**{**fields, **spec}))
    if transform:
        writer.write_transform(transform[1], {})
    for shard in writer.missing():
        start, count = shard * writer.spec.per_shard, writer.shard_size(shard)
        part = slice(start, start + count)
        rows = {"images": images[part]}
        rows |= {} if labels is None else {"labels": labels[part].astype(np.int32)}
        rows |= {} if f16 is None else {"images_f16": f16[part].astype(np.float16)}
        rows |= {} if logits is None else {"logits": logits[part].astype(np.float16)}
        writer.write_shard(shard, rows, {"learning_rate": rate} if rate else {})
    return Bank(path)


def quick(bank: Bank, data: str, **options):
    return evaluate_bank(bank, data, **{"epochs": 15, "nets": 2, "lr": 0.05, **options})


def test_record_of_a_run(tmp_path, data):
    result = quick(make(tmp_path / "b"), data)
    json.dumps(result)
    assert result["protocol"]["name"] == "dc" and result["protocol"]["changed"] == ["epochs", "lr"]
    assert result["bank"]["per_class"] == [1, 1] and result["bank"]["space"] == "normalised"
    assert list(result["results"]) == ["convnet_d2_w8"]
    found = result["results"]["convnet_d2_w8"]
    assert found["epochs_run"] == 16 and found["dc_ops"] == []
    for part in ("bank", "control"):
        nets = found[part]["nets"]
        last = [net["last"] for net in nets]
        assert len(nets) == 2 and found[part]["mean"] == pytest.approx(np.mean(last))
        assert found[part]["std"] == pytest.approx(np.std(last, ddof=1))
        assert all(net["best"] == max(a for _, a in net["curve"]) for net in nets)
        assert [e for e, _ in nets[0]["curve"]] == [3, 6, 10, 13, 16]
        assert all(net["loss"] < 0.7 for net in nets)
    assert found["gain"] == pytest.approx(found["bank"]["mean"] - found["control"]["mean"])
    assert found["bank"]["mean"] > 0.7
    assert {"torch"} <= set(result["versions"]) and result["hardware"]["cores"] and result["cpu_seconds"] > 0
    assert result["estimate"]["archs"]["convnet_d2_w8"]["steps"] == 2 * 2 * 16


def test_same_seed_same_figures(tmp_path, data):
    bank = make(tmp_path / "b")
    first, again, other = (quick(bank, data, seed=s, epochs=4)["results"] for s in (3, 3, 4))
    assert first == again and first != other


def test_controls_are_balanced_differ_and_come_from_the_train_split(tmp_path, data):
    images, labels = bars(12, 0)
    bank = make(tmp_path / "b", images=images, labels=labels)
    sets = BankSets(bank, data, device=CPU, soft=False, mixed=False, nets=3, seed=0)
    train = {image.tobytes() for image in bars(90, 1)[0]}
    drawn = []
    for control in sets.controls:
        assert torch.bincount(control.targets).tolist() == [4, 4, 4] and len(control) == 12
        rows = {image.numpy().tobytes() for image in control.images}
        assert len(rows) == 12 and rows <= train
        drawn.append(rows)
    assert drawn[0] != drawn[1] != drawn[2]
    assert torch.equal(sets.test.targets.bincount(), torch.tensor([20, 20, 20]))


def test_unbalanced_banks_get_unbalanced_controls(tmp_path, data):
    images, labels = bars(9, 0)
    labels[:] = [0, 0, 0, 0, 0, 1, 1, 1, 2]
    sets = BankSets(
        make(tmp_path / "b", images=images, labels=labels), data, device=CPU, soft=False, mixed=False, nets=1, seed=0
    )
    assert torch.bincount(sets.controls[0].targets).tolist() == [5, 3, 1]
    images, labels = bars(200, 0)
    sets = BankSets(
        make(tmp_path / "c", images=images, labels=labels), data, device=CPU, soft=False, mixed=False, nets=1, seed=0
    )
    assert len(sets.controls[0]) == 90 and "smaller than the bank" in sets.warnings[0]


def test_every_set_lives_in_the_banks_space(tmp_path, data):
    """Normalised, affine and ZCA: bank, control and test set are all brought there, once."""
    images, labels = bars(3, 0)
    unit = images / 255.0
    train = torch.from_numpy(bars(90, 1)[0])
    zca = ZCA.fit(train)
    affine = {"mean": np.array([0.5], np.float32), "std": np.array([0.25], np.float32)}
    spaces = {
        "normalised": (make(tmp_path / "n"), lambda x: (x - 0.2) / 0.3),
        "pixels": (make(tmp_path / "p", f16=unit * 1.5 - 0.1), lambda x: (x - 0.2) / 0.3),
        "affine": (make(tmp_path / "a", f16=(unit - 0.5) / 0.25, transform=("affine", affine)),
                   lambda x: (x - 0.5) / 0.25),
        "zca": (make(tmp_path / "z", f16=zca.whiten(torch.from_numpy(images)).numpy(),
                     transform=("zca", zca.arrays())), lambda x: zca.whiten(x.float())),
    }  # fmt: skip
    for name, (bank, enter) in spaces.items():
        sets = BankSets(bank, data, device=CPU, soft=False, mixed=False, nets=1, seed=0)
        every = slice(None)
        found = sets.bank.training(sets.bank.pixels(every))
        pixels = torch.from_numpy(unit * 1.5 - 0.1 if name == "pixels" else unit).float()
        torch.testing.assert_close(found, enter(pixels), rtol=2e-3, atol=4e-3)
        test = torch.from_numpy(bars(60, 2)[0]).float() / 255
        seen = sets.test.training(sets.test.pixels(every))
        torch.testing.assert_close(seen.flatten().sort().values, enter(test).flatten().sort().values)
        control = sets.controls[0].training(sets.controls[0].pixels(every))
        whole = enter(train.float() / 255)
        assert all(bool(torch.isclose(whole, image, atol=1e-5).all((1, 2, 3)).any()) for image in control)


def test_a_zca_bank_is_evaluated_in_its_space(tmp_path, data):
    """MTT #11: a network trained on whitened images is worthless on a test set that is not."""
    images, labels = bars(30, 0)
    zca = ZCA.fit(torch.from_numpy(bars(90, 1)[0]))
    white = zca.whiten(torch.from_numpy(images)).numpy()
    bank = make(tmp_path / "z", images=images, labels=labels, f16=white, transform=("zca", zca.arrays()))
    result = quick(bank, data, nets=1, epochs=30, protocol="dsa")
    assert result["bank"]["space"] == "zca" and result["bank"]["pixels"] == "images_f16"
    assert result["results"]["convnet_d2_w8"]["bank"]["mean"] > 0.8


def test_learnt_step_size_and_soft_labels(tmp_path, data):
    images, labels = bars(6, 0)
    logits = 8.0 * np.eye(3)[(labels + 1) % 3]  # soft labels that contradict the classes: which ones are used shows
    recipe = {"method": {"name": "mtt", "arch": "convnet_d2_w8"}}
    bank = make(tmp_path / "b", images=images, labels=labels, logits=logits, rate=0.03, recipe=recipe)
    learnt = evaluate_bank(bank, data, epochs=20, nets=1)
    assert learnt["protocol"]["name"] == "datm" and learnt["bank"]["labels"] == "soft"
    found = learnt["results"]["convnet_d2_w8"]
    assert found["lr"] == pytest.approx(0.03) and found["bank"]["mean"] < 0.2 and found["control"]["mean"] > 0.7
    assert any("control's are hard" in note for note in learnt["notes"])
    hard = evaluate_bank(bank, data, epochs=20, nets=1, labels="hard", protocol="mtt", lr=0.05)
    assert hard["results"]["convnet_d2_w8"]["bank"]["mean"] > 0.7
    assert hard["results"]["convnet_d2_w8"]["lr"] == 0.05


def test_missing_step_size_or_soft_labels_are_said(tmp_path, data):
    bank = make(tmp_path / "b", recipe={"method": {"name": "mtt", "arch": "mlp"}})
    result = evaluate_bank(bank, data, epochs=2, nets=1, protocol="datm", teacher="lenet5_bn")
    assert any("teacher is not used" in note for note in result["notes"])
    assert any("no learnt step size" in note for note in result["notes"])
    assert any("stores no logits" in note for note in result["notes"]) and result["bank"]["labels"] == "hard"
    with pytest.raises(RequirementError, match="--labels hard"):
        evaluate_bank(bank, data, labels="soft")


def test_a_teacher_labels_the_control_softly(tmp_path, data):
    net = build_model("convnet_d2_w8", num_classes=3, in_channels=1, image_size=8, seed=0)
    folder = tmp_path / "teacher"
    folder.mkdir()
    save_weights(net, folder / "student.safetensors")
    card = ModelCard(arch="convnet_d2_w8", num_classes=3, input_size=(1, 8, 8), mean=[0.5], std=[0.5],
                     weights="student.safetensors", class_names=NAMES)  # fmt: skip
    card.save(folder / "card.yaml")
    images, labels = bars(6, 0)
    bank = make(tmp_path / "b", images=images, labels=labels, logits=np.eye(3)[labels])
    sets = BankSets(bank, data, device=CPU, soft=True, mixed=False, nets=1, seed=0, teacher=str(folder))
    control = sets.controls[0]
    with torch.no_grad():
        wanted = net.eval()((control.images.float() / 255 - 0.5) / 0.5).softmax(1)
    torch.testing.assert_close(control.targets, wanted)
    torch.testing.assert_close(sets.bank.targets, torch.eye(3)[torch.from_numpy(labels)].softmax(1))
    assert not control.targets.requires_grad and not sets.notes


@pytest.mark.parametrize("method", ["cudfkd", "arrays"])
def test_banks_of_any_method(tmp_path, data, method):
    """A data-free bank: no labels, the teacher's logits instead."""
    images, labels = bars(330, 0)
    bank = make(tmp_path / "b", images=images, logits=6.0 * np.eye(3)[labels], label_kind="none",
                recipe={"method": {"name": method}})  # fmt: skip
    result = evaluate_bank(bank, data, arch="convnet_d2_w8", nets=1, epochs=2)
    assert result["protocol"]["name"] == "bank" and result["bank"]["labels"] == "soft"
    assert any("largest of its logits" in note for note in result["notes"])
    assert result["results"]["convnet_d2_w8"]["bank"]["mean"] > 0.8


def test_cross_architectures_and_cutmix(tmp_path, data):
    bank = make(tmp_path / "b")
    result = quick(bank, data, protocol="idc", cross=("mlp", "alexnet_dd", "mlp"), epochs=3, nets=2)
    assert list(result["results"]) == ["convnet_d2_w8", "mlp", "alexnet_dd"]
    single = result["results"]["mlp"]
    assert single["dsa"] and not single["stacked"]
    stacked = quick(bank, data, protocol="idc", arch="mlp", epochs=3, nets=2, stack=True)["results"]["mlp"]
    assert stacked["stacked"]
    for one, many in zip(single["bank"]["nets"], stacked["bank"]["nets"], strict=True):
        assert one["seed"] == many["seed"] and one["loss"] == pytest.approx(many["loss"], rel=1e-3)


def test_scores_of_dd_ranking(tmp_path, data):
    images, labels = bars(6, 0)
    bank = make(tmp_path / "b", images=images, labels=labels, logits=6.0 * np.eye(3)[labels])
    known = quick(bank, data, full=0.95, labels="soft", nets=1)["results"]["convnet_d2_w8"]
    ranks = known["ranking"]
    assert ranks["hlr"] == pytest.approx(0.95 - ranks["hard"]) and ranks["ior"] == pytest.approx(known["gain"])
    a = 0.5 * (ranks["ior"] - ranks["hlr"])
    assert ranks["lrs"] == pytest.approx((np.exp(a) - np.exp(-1)) / (np.e - np.exp(-1)))
    measured = quick(bank, data, full_epochs=3, nets=1, protocol="dd_ranking")["results"]["convnet_d2_w8"]["ranking"]
    assert measured["full"] > 0.9


def test_data_without_a_train_split(tmp_path, data):
    (test, y_test), bank = bars(60, 2), make(tmp_path / "b")
    np.savez(tmp_path / "flat.npz", images=test[:, 0], labels=y_test, class_names=np.array(NAMES))
    flat = f"npz:{tmp_path / 'flat.npz'}"
    with pytest.raises(DataError, match="--control-data"):
        quick(bank, flat)
    result = quick(bank, flat, control_data=data, epochs=2)
    assert result["data"]["control"] == data and result["data"]["control_split"] == "train"


def test_an_unfinished_bank_is_said(tmp_path, data):
    images, labels = bars(3, 0)
    spec = {"shape": (1, 8, 8), "num_classes": 3, "mean": [0.2], "std": [0.3], "class_names": NAMES}
    writer = BankWriter.create(
        tmp_path / "b", BankSpec(images=6, images_per_shard=3, label_kind="target", recipe={}, **spec)
    )
    with pytest.raises(BankError, match="no shard"):
        quick(Bank(tmp_path / "b"), data)
    writer.write_shard(0, {"images": images, "labels": labels.astype(np.int32)}, {})
    result = quick(Bank(tmp_path / "b"), data, arch="mlp", nets=1, epochs=1)
    assert "unfinished: 3 of 6 images" in result["warnings"][0] and result["bank"]["images"] == 3


def test_refusals(tmp_path, data):
    bank = make(tmp_path / "b")
    with pytest.raises(ConfigError, match="did you mean 'dsa'"):
        quick(bank, data, protocol="dsaa")
    with pytest.raises(ModelError):
        quick(bank, data, cross=("lenet_dd",))  # 8x8 images
    with pytest.raises(ConfigError, match="one by one"):
        quick(bank, data, arch="convnet_d2_w8_bn", stack=True)
    for bad in ({"nets": 0}, {"epochs": 0}, {"lr": -1.0}, {"full": 84.0}, {"full": 0.8, "full_epochs": 2}):
        with pytest.raises(ConfigError):
            quick(bank, data, **bad)
    blind = make(tmp_path / "blind", images=bars(3, 0)[0], label_kind="none")
    with pytest.raises(RequirementError, match="synthkit relabel"):
        quick(blind, data)
    affine = {"scale": np.ones(1, np.float32)}
    odd = make(tmp_path / "odd", f16=bars(3, 0)[0] / 255, images=bars(3, 0)[0], labels=bars(3, 0)[1],
               transform=("affine", affine))  # fmt: skip
    with pytest.raises(BankError, match="mean and std"):
        quick(odd, data)


def test_command_line(tmp_path, data, capsys):
    make(tmp_path / "b")
    words = [
        "evaluate",
        "--bank",
        str(tmp_path / "b"),
        "--data",
        data,
        "--epochs",
        "8",
        "--nets",
        "2",
        "--device",
        "cpu",
    ]
    assert main([*words, "--cross", "mlp", "--full", "0.9", "--out", str(tmp_path / "r.json")]) == 0
    out, err = capsys.readouterr()
    for text in ("convnet_d2_w8", "mlp", "random real", "dc (the bank was made by dc); changed by flags: epochs", "HLR",
                  "+-", "best (diagnostic)", "1 per class, hard labels"):  # fmt: skip
        assert text in out
    assert "about" in err and "convnet_d2_w8 (one by one), mlp (one by one)" in err
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["results"]["convnet_d2_w8"]["bank"]["mean"] > 0.5
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["kind"] == "synthkit evaluate" and len(stored["results"]) == 1
    assert main([*words, "--cross", "mlp", "--full", "0.9", "--out", str(tmp_path / "r.json")]) == 0
    assert len(json.loads((tmp_path / "r.json").read_text())["results"]) == 1
    assert main([*words, "--protocol", "dsa", "--out", str(tmp_path / "r.json")]) == 0
    assert len(json.loads((tmp_path / "r.json").read_text())["results"]) == 2


def test_model_and_bank_exclude_each_other(tmp_path, data):
    make(tmp_path / "b")
    with pytest.raises(UsageError, match="either --model or --bank"):
        synthkit.evaluate(data=data)
    with pytest.raises(UsageError, match="either --model or --bank"):
        synthkit.evaluate("x", data=data, bank=tmp_path / "b")
    with pytest.raises(UsageError, match="--nets does not go with --model"):
        synthkit.evaluate("x", data=data, nets=3)
    with pytest.raises(UsageError, match="--split does not go with --bank"):
        synthkit.evaluate(bank=tmp_path / "b", data=data, split="train")
    with pytest.raises(UsageError, match="float32"):
        synthkit.evaluate(bank=tmp_path / "b", data=data, precision="bf16")
    with pytest.raises(UsageError, match="needs real data"):
        synthkit.evaluate(bank=tmp_path / "b")


def test_python_face(tmp_path, data):
    bank = make(tmp_path / "b")
    result = synthkit.evaluate(bank=bank, data=data, epochs=3, nets=1, device="cpu")
    assert result["results"]["convnet_d2_w8"]["bank"]["std"] is None
