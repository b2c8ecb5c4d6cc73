"""Data-free model selection: the signals against loops written out, the rule, the choice on students of known worth."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from workshop import MEAN, STD, save_teacher, tree

from synthkit.bank import Bank
from synthkit.bank.joining.merge import merge
from synthkit.bank.make import bank_from_arrays
from synthkit.cli.main import main
from synthkit.errors import DataError, ModelError, RequirementError, UsageError
from synthkit.evaluation import choosing, probes, signals
from synthkit.evaluation.judging import regrets
from synthkit.evaluation.selection import select
from synthkit.models.build import build_model, load_model
from synthkit.models.card import ModelCard
from synthkit.models.view import ModelView, TeacherView
from synthkit.models.weights import file_sha256, save_weights

DAMAGE = {"alpha": [0.9, 0.3, 0.02, 0.5], "beta": [1.2, 0.8, 0.4, 0.2], "gamma": [2.0, 1.7, 1.4, 1.2]}
"""How far the students of each method are from their teacher, step by step: alpha is best at its third, not last."""
STEPS = [10, 20, 30, 40]


# ---- signals -------------------------------------------------------------------------------------------------------


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def test_signals_of_logits_are_what_a_loop_gives():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(40, 4, generator=draw) for _ in range(2))
    same = kl = sure = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(s), softmax(t)
        same += s.index(max(s)) == t.index(max(t))
        kl += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        sure += max(p)
    assert signals.agreement(student, teacher) == pytest.approx(same / 40)
    assert signals.soft_agreement(student, teacher) == pytest.approx(kl / 40, rel=1e-5)
    assert signals.confidence(student) == pytest.approx(sure / 40, rel=1e-5)
    assert signals.disagreement(student.argmax(1), teacher.argmax(1)) == pytest.approx(1 - same / 40)


def one_hot(classes: list[int]) -> torch.Tensor:
    return torch.eye(3)[classes]


def test_class_balance_weighs_every_class_of_the_teacher_alike():
    teacher = one_hot([0, 0, 0, 0, 0, 0, 1, 1])  # one-sided images
    assert signals.class_balance(teacher, teacher) == pytest.approx(1.0)
    assert signals.class_balance(one_hot([0] * 8), teacher) == 0.0
    half = one_hot([0, 0, 0, 0, 0, 0, 1, 0])  # q = (1 + 1/2) / 2, 1/4
    q = (0.75, 0.25)
    assert signals.class_balance(half, teacher) == pytest.approx(-sum(v * math.log(v) for v in q) / math.log(2))
    assert signals.class_balance(one_hot([1]), one_hot([0])) == 1.0  # one class cannot be unbalanced


def test_bn_distance_is_relative_to_the_running_statistics():
    batch = [(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0])), (torch.tensor([2.0]), torch.tensor([5.0]))]
    running = [(torch.tensor([0.0, 0.0]), torch.tensor([4.0, 5.0])), (torch.tensor([2.0]), torch.tensor([2.0]))]
    first = (5 + 5) / (0 + math.sqrt(41))
    assert signals.bn_distance(batch, running) == pytest.approx((first + 3 / 4) / 2)
    assert signals.bn_distance(running, running) == 0.0


def test_statistics_of_blocks_are_those_of_the_whole(monkeypatch):
    net = build_model("lenet5_bn", num_classes=10, in_channels=1, image_size=32, seed=0).eval()
    view = ModelView(net, MEAN, STD, input_size=(1, 32, 32), num_classes=10)
    images = torch.rand(50, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    logits, whole = probes.look(view, images)
    with torch.no_grad():
        first = view.batchnorms()[0]
        seen = []
        handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        expected = view(images)
        handle.remove()
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(whole[0][0].float(), seen[0].mean((0, 2, 3)))
    torch.testing.assert_close(whole[0][1].float(), seen[0].var((0, 2, 3), correction=0))
    monkeypatch.setattr(probes, "BATCH_BYTES", 7 * 1024)  # blocks of 7 images, the last of 1
    blocks, parts = probes.look(view, images)
    torch.testing.assert_close(blocks, logits)
    for (m, v), (n, w) in zip(parts, whole, strict=True):
        torch.testing.assert_close(m, n, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(v, w, rtol=1e-5, atol=1e-5)
    assert all("forward" not in vars(layer) for layer in view.batchnorms())


# ---- the rule ------------------------------------------------------------------------------------------------------


def test_ranks_and_correlation_of_hand():
    assert choosing.average_ranks([5, 1, 5, 9]).tolist() == [1.5, 0, 1.5, 3]
    assert choosing.spearman([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert choosing.spearman([1, 2, 3, 4], [9, 7, 5, 1]) == pytest.approx(-1)
    assert choosing.spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert choosing.spearman([1, 2], [1, 2]) is None and choosing.spearman([1, 1, 1], [1, 2, 3]) is None


def test_a_hard_probe_bank_outweighs_nobody():
    """Mean agreement would choose the first, which a single odd bank favours by far."""
    table = [{"p": 0.90, "q": 0.90, "odd": 0.60}, {"p": 0.91, "q": 0.92, "odd": 0.20}]
    assert choosing.rank_scores(table) == pytest.approx([1 / 3, 2 / 3])


def test_candidates_that_saw_different_banks_are_compared_on_the_shared_ones():
    """Each lacks its own bank; on the easy bank `c`, which c lacks, both others do well."""
    table = [{"b": 0.5, "c": 0.99}, {"a": 0.6, "c": 0.98}, {"a": 0.4, "b": 0.3}]
    assert choosing.rank_scores(table) == pytest.approx([1.0, 0.5, 0.0])
    gaps = choosing.centred(table)
    assert gaps == pytest.approx([(0.1 + 0.005) / 2, (0.1 - 0.005) / 2, -0.1])
    assert choosing.rank_scores([{"b": 0.5}, {"a": 0.9}]) == [None, None]


def test_ties_go_to_the_lower_kl_and_then_to_the_later_step():
    assert choosing.best([0.5, 0.5, 0.2], [0.3, 0.1, 0.0], [1, 2, 3]) == 1
    assert choosing.best([0.5, 0.5], [0.1, 0.1], [1, 2]) == 1
    assert choosing.best([None, 0.1], [0.0, 0.5], [1, 2]) == 1
    assert choosing.best([None], [0.0], [1]) is None
    assert choosing.arg_best([0.1, None, 0.1], -1) == 2 and choosing.arg_best([None], 1) is None


def test_regret_of_hand():
    found = regrets(np.array([0.5, 0.9, 0.7]), {"choice": 2, "oracle": 1, "absent": None})
    assert found == {"choice": pytest.approx(0.2), "oracle": 0, "absent": None, "random": pytest.approx(0.2)}


# ---- the choice ----------------------------------------------------------------------------------------------------


def blobs(seed: int, count: int, coarse: int) -> np.ndarray:
    """Smooth random images, uint8 (count, 1, 32, 32), of a grain of its own."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 1, coarse, coarse, generator=draw)
    return torch.nn.functional.interpolate(values, size=(32, 32), mode="bilinear").sigmoid().mul(255).byte().numpy()


def save_student(
    folder: Path, teacher: Path, damage: float, arch: str = "lenet5_bn", extra: dict | None = None
) -> None:
    """The teacher's weights, moved away from it by `damage` (of their own size) in one fixed direction."""
    folder.mkdir(parents=True)
    loaded = load_model(str(teacher))
    module = loaded.module if arch == "lenet5_bn" else build_model(arch, num_classes=10, in_channels=1, seed=0)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * damage * parameter.std().nan_to_num(0.1))
    save_weights(module, folder / "student.safetensors")
    ModelCard(
        arch=arch, num_classes=10, input_size=(1, 32, 32), mean=MEAN, std=STD, weights="student.safetensors",
        sha256=file_sha256(folder / "student.safetensors"), class_names=loaded.card.class_names, extra=extra or {},
    ).save(folder / "card.yaml")  # fmt: skip


def save_bank(path: Path, teacher: Path, seed: int, coarse: int, name: str = "", **options) -> Bank:
    images = blobs(seed, 60, coarse)
    loaded = load_model(str(teacher))
    with torch.no_grad():
        labels = TeacherView.from_loaded(loaded)(torch.from_numpy(images)).argmax(1).numpy()
    options = {
        "teacher": {"spec": str(teacher), "sha256": loaded.sha256},
        "label_kind": "argmax",
        "recipe": {"method": {"name": name}},
        **options,
    }
    return bank_from_arrays(
        path, images, labels, num_classes=10, mean=MEAN, std=STD, class_names=loaded.card.class_names, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A teacher, three banks with four students each, an outside probe bank and labelled data; read only."""
    folder = tmp_path_factory.mktemp("world")
    teacher = save_teacher(folder)
    for i, (name, damages) in enumerate(DAMAGE.items()):
        save_bank(folder / name, teacher, i, 3 + i, name)
        for step, damage in zip(STEPS, damages, strict=True):
            save_student(folder / name / probes.CHECKPOINTS / f"step-{step}", teacher, damage)
    save_bank(folder / "outside", teacher, 10, 6, "noise")
    save_bank(folder / "sibling", teacher, 12, 3, "alpha")
    save_bank(folder / "labelled", teacher, 11, 4, "labelled", label_kind="real")
    return folder


@pytest.fixture(scope="module")
def chosen(world) -> dict:
    names = list(DAMAGE)
    return select([world / n for n in names], eval_data=f"bank:{world / 'labelled'}", device="cpu")


def test_the_best_step_and_run_are_chosen(world, chosen):
    assert [row["stop"] for row in chosen["runs"]] == [30, 40, 40]
    assert [row["last"] for row in chosen["runs"]] == [40, 40, 40]
    assert chosen["choice"]["run"] == str(world / "alpha") and chosen["choice"]["stop"] == 30
    assert load_model(chosen["choice"]["path"]).card.arch == "lenet5_bn"
    assert [row["name"] for row in chosen["methods"]] == ["alpha", "beta", "gamma"]
    assert chosen["rule"] == choosing.RULE
    json.dumps(chosen)


def test_nobody_is_judged_by_its_own_bank(world, chosen):
    for row in chosen["runs"]:
        assert set(row["probes"]) == {str(world / n) for n in DAMAGE} - {row["run"]}
    assert set(chosen["probes"].values()) == {60}


def test_signals_of_a_candidate_are_means_over_its_probe_banks(world, chosen):
    row = next(r for r in chosen["candidates"] if r["name"] == "alpha" and r["step"] == 20)
    student = ModelView.from_loaded(load_model(str(world / "alpha" / probes.CHECKPOINTS / "step-20")))
    teacher = TeacherView.from_loaded(load_model(str(world / "card.yaml")))
    shares = []
    for name in ("beta", "gamma"):
        images = torch.from_numpy(Bank(world / name).column("images"))
        with torch.no_grad():
            shares.append(float((student(images).argmax(1) == teacher(images).argmax(1)).double().mean()))
    assert row["signals"]["agreement"] == pytest.approx(np.mean(shares))
    assert row["signals"]["disagreement"] is None and row["signals"]["bn_distance"] > 0
    perfect = next(r for r in chosen["candidates"] if r["name"] == "alpha" and r["step"] == 30)["signals"]
    assert perfect["kl"] < row["signals"]["kl"] and perfect["agreement_augmented"] > 0.9


def test_the_diagnosis_puts_the_choice_beside_oracle_last_and_random(chosen):
    found = chosen["diagnosis"]
    top1 = {(r["name"], r["step"]): r["top1"] for r in chosen["candidates"]}
    alpha = [top1["alpha", step] for step in STEPS]
    assert max(alpha) == alpha[2] > alpha[3]  # the last epoch is not the best
    first = found["stopping"]["runs"][0]
    assert first["choice"] == 0 and first["oracle_step"] == 30
    assert first["last"] == pytest.approx(alpha[2] - alpha[3])
    assert first["random"] == pytest.approx(alpha[2] - np.mean(alpha))
    each = [row["last"] for row in found["stopping"]["runs"]]
    assert found["stopping"]["regret"]["last"] == pytest.approx(np.mean(each)) and found["stopping"]["n"] == 3
    assert found["stopping"]["spearman"]["agreement"] > 0.8
    assert found["among_runs"]["regret"]["choice"] == 0 and found["among_runs"]["regret"]["random"] > 0
    assert found["together"]["oracle"] == max(top1.values()) and found["together"]["regret"]["choice"] == 0
    last = [top1[name, 40] for name in DAMAGE]
    assert last[1] > last[0] > last[2] and found["among_runs"]["spearman"]["score"] == pytest.approx(1)
    assert found["together"]["regret"]["last"] == pytest.approx(max(top1.values()) - np.mean(last))
    assert found["methods"]["choice"] == found["methods"]["oracle"] == "alpha"


def test_labelled_data_decide_nothing(world, chosen):
    blind = select([world / n for n in DAMAGE], device="cpu")
    assert blind["diagnosis"] is None and "top1" not in blind["candidates"][0]
    same = ("choice", "runs", "methods", "probes")
    assert [blind[key] for key in same] == [chosen[key] for key in same]


def test_one_run_on_an_outside_bank(world):
    found = select([world / "beta"], [world / "outside"], limit=50, total=40, device="cpu")
    assert found["runs"][0]["stop"] == 40 and found["probes"] == {str(world / "outside"): 40}
    assert found["choice"] is None and found["runs"][0]["score"] is None  # one run is not compared with anything
    assert any("disagreement is absent" in note for note in found["notes"])


def test_a_network_without_batchnorm_has_no_bn_distance(world, tmp_path):
    save_bank(tmp_path / "plain", world / "card.yaml", 20, 4, "plain")
    save_student(tmp_path / "plain" / probes.CHECKPOINTS / "step-5", world / "card.yaml", 0.1, arch="lenet5")
    found = select([tmp_path / "plain"], [world / "outside"], device="cpu")
    assert found["candidates"][0]["signals"]["bn_distance"] is None
    assert found["candidates"][0]["stop"] and any("bn_distance is absent for 1 of 1" in n for n in found["notes"])


def test_seeds_of_one_method_judge_each_other(world):
    """Names and seeds are the caller's: the same three banks as seeds of one method."""
    found = select([("m", i, world / n) for i, n in enumerate(DAMAGE)], device="cpu")
    assert found["choice"]["seed"] == 0 and found["methods"] == [{"name": "m", "score": pytest.approx(0.5), "runs": 3}]
    rows = [row for row in found["candidates"] if row["step"] == 40]
    assert all(0 < row["signals"]["disagreement"] < 1 for row in rows)
    assert {p for row in found["runs"] for p in row["probes"]} == {str(world / n) for n in DAMAGE}


def test_siblings_are_no_probes_where_other_methods_are(world):
    found = select([("m", 0, world / "alpha"), ("m", 1, world / "beta"), ("n", 0, world / "gamma")], device="cpu")
    shown = {row["run"]: row["probes"] for row in found["runs"]}
    assert shown[str(world / "alpha")] == shown[str(world / "beta")] == [str(world / "gamma")]
    assert found["runs"][2]["score"] is None  # nobody else saw its two probe banks


def test_distill_runs_are_judged_on_banks_that_they_did_not_learn_from(world, tmp_path):
    """One student each: no stopping point, but a choice among runs."""
    teacher = {"spec": str(world / "card.yaml"), "sha256": load_model(str(world / "card.yaml")).sha256}
    for name, bank, damage in (("good", "alpha", 0.05), ("bad", "outside", 0.9)):
        source = {"path": str(world / bank), "uuid": Bank(world / bank).record["uuid"]}
        extra = {"bank": source, "teacher": teacher, "seed": 3}
        save_student(tmp_path / name, world / "card.yaml", damage, extra=extra)
        (tmp_path / name / "result.json").write_text('{"steps": 500}')
    runs = [tmp_path / "good", tmp_path / "bad"]
    found = select(runs, [world / "beta", world / "gamma"], device="cpu")
    assert found["choice"]["run"] == str(tmp_path / "good") and found["choice"]["stop"] == 500
    assert [row["score"] for row in found["candidates"]] == [None, None]
    assert [(r["name"], r["seed"]) for r in found["runs"]] == [("distill on alpha", 3), ("distill on outside", 3)]
    with pytest.raises(UsageError, match="good learned from these very images"):
        select(runs, [world / "alpha"], device="cpu")
    mixed = select([*runs, world / "alpha", world / "beta"], device="cpu")
    assert mixed["runs"][0]["probes"] == [str(world / "beta")]
    assert mixed["runs"][1]["probes"] == [str(world / "alpha"), str(world / "beta")]


def test_the_same_twice(world, chosen):
    again = select([world / n for n in DAMAGE], seed=0, limit=30, device="cpu")
    twice = select([world / n for n in DAMAGE], seed=0, limit=30, device="cpu")
    assert [r["signals"] for r in again["candidates"]] == [r["signals"] for r in twice["candidates"]]
    assert [r["signals"] for r in again["candidates"]] != [r["signals"] for r in chosen["candidates"]]


def test_a_curriculum_of_its_own_makes_another_method(world, tmp_path):
    for i, (curriculum, name) in enumerate((("easy2hard", "cudfkd"), ("none", "cudfkd none"))):
        recipe = {"method": {"name": "cudfkd"}, "curriculum": curriculum}
        assert probes.method_of(save_bank(tmp_path / str(i), world / "card.yaml", i, 4, recipe=recipe)) == name


def test_a_joined_bank_is_the_own_bank_of_its_parts(world, tmp_path):
    joined = merge([world / "alpha", world / "sibling"], tmp_path / "joined").out
    with pytest.raises(UsageError, match="learned from these very images"):
        select([world / "alpha"], [joined], device="cpu")


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_refusals(world, tmp_path):
    with pytest.raises(RequirementError, match=r"no checkpoints .* --method.checkpoints 10"):
        select([world / "outside"], [world / "alpha"], device="cpu")
    with pytest.raises(UsageError, match="learned from these very images"):
        select([world / "alpha"], [world / "alpha"], device="cpu")
    with pytest.raises(RequirementError, match="no probe bank that it did not learn from"):
        select([world / "alpha"], device="cpu")
    with pytest.raises(ModelError, match="neither a bank nor"):
        select([tmp_path], [world / "outside"], device="cpu")
    with pytest.raises(DataError, match="imagefolder"):
        select([world / "alpha"], [world / "outside"], eval_data=f"imagefolder:{tmp_path / 'no'}", device="cpu")
    with pytest.raises(UsageError, match="named twice"):
        select([world / "alpha", world / "alpha"], device="cpu")
    with pytest.raises(UsageError, match="at least 1"):
        select([world / "alpha"], [world / "outside"], limit=0, device="cpu")


def test_other_teachers_classes_and_sizes_are_refused(world, tmp_path):
    other = save_teacher(tmp_path, seed=1)
    save_bank(tmp_path / "strange", other, 0, 4, "strange")
    with pytest.raises(RequirementError, match="made from another teacher"):
        select([world / "alpha"], [tmp_path / "strange"], device="cpu")
    save_student(tmp_path / "strange" / probes.CHECKPOINTS / "step-1", other, 0.1)
    with pytest.raises(RequirementError, match="different teachers"):
        select([world / "alpha", tmp_path / "strange"], device="cpu")
    with pytest.raises(RequirementError, match="another file than the one of the runs"):
        select([world / "alpha"], [world / "outside"], teacher=str(other), device="cpu")
    for name, shape, classes in (("few", (1, 32, 32), 3), ("small", (1, 28, 28), 10)):
        images = np.zeros((4, *shape), np.uint8)
        bank_from_arrays(tmp_path / name, images, num_classes=classes, mean=MEAN, std=STD)
        with pytest.raises(DataError, match="classes" if name == "few" else "images of"):
            select([world / "alpha"], [tmp_path / name], device="cpu")


def test_probe_images_that_are_real_are_said(world, tmp_path):
    found = select([world / "alpha"], [world / "labelled"], device="cpu")
    assert any(note.startswith("not data-free") for note in found["notes"])


# ---- the command ---------------------------------------------------------------------------------------------------


def test_command(world, tmp_path, capsys):
    before = tree(world)
    out = tmp_path / "choice.json"
    words = ["select", *(str(world / n) for n in DAMAGE), "--out", str(out), "--device", "cpu"]
    assert main([*words, "--eval-data", f"bank:{world / 'labelled'}"]) == 0
    text = capsys.readouterr().out
    assert f"chosen: alpha seed 0, step 30: {world / 'alpha'}" in text and "points of top-1 lost" in text
    assert "Spearman" in text and text.count(" stop\n") == 2 and text.count(" chosen\n") == 1
    record = json.loads(out.read_text())
    assert record["choice"]["stop"] == 30 and record["versions"]
    assert tree(world) == before
    assert main(words) == 2  # nothing is overwritten
    assert "choice.json" in capsys.readouterr().err
    assert main(["select", str(world / "alpha"), "--probe", str(world / "outside"), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["stop"] == 30


def test_command_refuses_in_one_line(world, capsys):
    assert main(["select", str(world / "outside"), "--probe", str(world / "alpha")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--method.checkpoints 10" in error
