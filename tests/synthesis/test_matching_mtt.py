"""MTT and its experts: what the buffer promises, guards, soft labels, whitening, the window."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from workshop import shard_hashes

from synthkit.bank import Bank
from synthkit.config.parse import parse_config
from synthkit.errors import ConfigError, DataError, NonFiniteError
from synthkit.synthesis import engine
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.matching import trajectories
from synthkit.synthesis.matching.labels import correct_rows, expert_logits
from synthkit.synthesis.matching.mtt import MTT, PATIENCE
from synthkit.synthesis.matching.mtt_config import MTTConfig

from .test_contract_mtt import TestMTT as Contract
from .test_contract_random_real import save_npz
from .tiny import task
from .tiny_real import patterned

NONE = Curriculum.named("none")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNTHKIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def build(settings: dict[str, Any] | None = None, **of_task: Any) -> MTT:
    values = {"teachers": [], "images": 20, "data": patterned(), "curriculum": NONE, **of_task}
    values.setdefault("spec", task().image_spec)
    return MTT(MTTConfig(**{**Contract.options, **(settings or {})}), task(**values))


def finished(settings: dict[str, Any] | None = None, **of_task: Any) -> MTT:
    method = build(settings, **of_task)
    list(method.generate())
    return method


# ---- experts ---------------------------------------------------------------------------------------------------------


def test_snapshots_of_an_expert_differ_and_start_from_fresh_weights():
    method = finished()
    thetas = [method.experts.theta(0, epoch) for epoch in range(3)]
    assert all(not torch.equal(a, b) for a, b in zip(thetas, thetas[1:], strict=False))
    assert not torch.equal(thetas[0], method.experts.theta(1, 0))
    assert thetas[0].shape == (method.network.size,)


def test_an_expert_learns_what_the_data_shows():
    method = finished({"max_start_epoch": 20, "expert_count": 1, "iterations": 1, "strategy": "none"})
    images = method.real.take(torch.arange(120))
    before, after = (method.network(method.experts.theta(0, e), images).argmax(1) for e in (0, 20))
    share = [(found == method.real.labels).float().mean() for found in (before, after)]
    assert share[1] > 0.5 > share[0]


def test_only_missing_experts_are_trained(monkeypatch):
    first = finished()
    files = {path.name: path.read_bytes() for path in first.experts.buffer.folder.iterdir()}
    assert sorted(files) == ["buffer.json", *(f"expert_0000{i}.{end}" for i in (0, 1) for end in ("h5", "json"))]
    first.experts.buffer.path(1).with_suffix(".json").unlink()  # what a run that was killed while it wrote leaves
    trained = []
    real = trajectories.train_expert
    monkeypatch.setattr(trajectories, "train_expert", lambda *a, **k: trained.append(1) or real(*a, **k))
    again = finished()
    assert len(trained) == 1 and again.experts.missing() == 0
    assert torch.equal(again.pixels, first.pixels)
    for index in (0, 1):
        assert again.experts.buffer.path(index).read_bytes() == files[f"expert_0000{index}.h5"]


def test_a_longer_expert_begins_with_the_shorter_one():
    short = finished()
    wanted = [short.experts.theta(0, epoch) for epoch in range(3)]
    longer = finished({"max_start_epoch": 4})
    assert longer.experts.buffer.folder == short.experts.buffer.folder
    assert [torch.equal(longer.experts.theta(0, e), wanted[e]) for e in range(3)] == [True] * 3
    assert longer.experts.buffer.epochs(0) == 4 and finished().experts.buffer.epochs(0) == 4


@pytest.mark.parametrize(
    ("settings", "of_task", "what"),
    [
        ({"expert_lr": 0.2}, {}, "sgd"),
        ({"expert_seed": 1}, {}, "seed"),
        ({"expert_images": 50}, {}, "sample"),
        ({}, {"data": patterned(per_class=11)}, "data"),
    ],
)
def test_a_buffer_of_another_task_is_refused(tmp_path, settings, of_task, what):
    finished({"experts": str(tmp_path / "buffer")})
    with pytest.raises(DataError, match=f"another task; these differ: {what}.*--method.experts"):
        build({"experts": str(tmp_path / "buffer"), **settings}, **of_task)


def test_a_damaged_expert_is_told():
    method = finished()
    path = method.experts.buffer.path(0)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"expert_00000.h5 is damaged.*trained anew"):
        finished()
    path.with_suffix(".json").write_text("[]")
    with pytest.raises(DataError, match="is damaged"):
        finished()


def test_experts_see_the_sample_alone():
    method = build({"expert_images": 30})
    rows = method.experts._rows()
    assert len(rows.unique()) == 30 and torch.equal(rows, build({"expert_images": 30}).experts._rows())
    with pytest.raises(DataError, match="expert_images"):
        build({"expert_images": 121})


# ---- the iteration ---------------------------------------------------------------------------------------------------


def test_the_loss_falls():
    records: list[dict[str, float]] = []
    settings = {"iterations": 40, "syn_steps": 5, "alpha": 0.1, "strategy": "none", "lr_alpha": 1e-4, "init": "noise"}
    finished({**settings, "expert_count": 1, "max_start_epoch": 1, "expert_epochs": 3}, log=records.append)
    losses = [record["matching_loss"] for record in records]
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_an_iteration_above_the_threshold_changes_nothing():
    records: list[dict[str, float]] = []
    warnings: list[str] = []
    method = finished({"threshold": 1e-9}, log=records.append, warn=warnings.append)
    assert torch.equal(method.pixels, build().pixels) and float(method.alpha) == pytest.approx(0.01)
    assert method.skipped == 3 and [record["skipped"] for record in records] == [1, 1, 1]
    assert "changed nothing" in warnings[0] and method.figures_of_end()["skipped"] == 3


def test_a_gradient_that_is_not_finite_is_left_out_and_many_end_the_run():
    method = build({"alpha": 1e30, "iterations": PATIENCE + 5})
    before = method.pixels.clone()
    with pytest.raises(NonFiniteError, match="in a row had no finite gradient"):
        list(method.generate())
    assert torch.equal(method.pixels, before) and method.skipped == PATIENCE - 1


def test_the_step_size_stays_positive():
    method = finished({"lr_alpha": 1e6, "alpha_min": 1e-3})
    assert float(method.alpha) >= 1e-3 - 1e-9


@pytest.mark.parametrize("curriculum", ["easy2hard", "none"])
def test_start_epochs_follow_the_window(curriculum, monkeypatch):
    settings = {"max_start_epoch": 6, "first_start_epoch": 2, "grow_iterations": 8, "iterations": 16}
    method = build({**settings, "min_start_epoch": 1, "syn_steps": 1}, curriculum=Curriculum.named(curriculum))
    assert [method.window(i) for i in (0, 4, 8, 15)] == ([2, 4, 6, 6] if curriculum == "easy2hard" else [6] * 4)
    read: list[int] = []
    theta = method.experts.theta
    monkeypatch.setattr(method.experts, "theta", lambda index, epoch: read.append(epoch) or theta(index, epoch))
    list(method.generate())
    starts, targets = read[::2], read[1::2]
    assert [t - s for s, t in zip(starts, targets, strict=True)] == [1] * 16
    assert all(1 <= start < method.window(i) for i, start in enumerate(starts)) and len(set(starts)) > 2


def test_every_expert_is_matched_before_any_comes_again():
    method = build({"expert_count": 3, "iterations": 9})
    order = []
    for iteration in range(9):
        method.step = method.prelude + iteration
        order.append(method._expert())
    assert all(sorted(order[i : i + 3]) == [0, 1, 2] for i in (0, 3, 6))


def test_the_engines_agree_in_a_run():
    runs = {name: finished({"engine": name, "lr_img": 10.0}).pixels for name in ("sweep", "unroll", "auto")}
    torch.testing.assert_close(runs["sweep"], runs["unroll"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runs["sweep"], runs["auto"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(finished({"engine": "tesla", "lr_img": 10.0}).pixels, runs["sweep"], atol=1e-5)


def test_the_chosen_engine_belongs_to_the_state(capsys):
    method = build({"engine": "auto"})
    run = method.generate()
    for _ in range(method.config.expert_count + 1):
        next(run)
    assert "engine " in capsys.readouterr().err and method.engine in ("sweep", "unroll")
    again = build({"engine": "auto"})
    again.load_state_dict({**method.state_dict(), "engine": "unroll"})
    list(again.generate())
    assert again.engine == "unroll"


@pytest.mark.parametrize(
    "settings",
    [
        {"min_start_epoch": 2, "max_start_epoch": 2},
        {"first_start_epoch": 3, "max_start_epoch": 2},
        {"expert_length": 1, "max_start_epoch": 3},
        {"alpha": 0.0},
        {"syn_steps": 0},
        {"batch_syn": 0},
    ],
)
def test_an_impossible_config_is_refused(settings):
    with pytest.raises(ConfigError, match="method"):
        MTTConfig(**settings)


# ---- soft labels -----------------------------------------------------------------------------------------------------


def lookup(expert: int, images: torch.Tensor) -> torch.Tensor:
    """Two made-up experts of two classes, on images whose first pixel says what they answer."""
    answers = torch.tensor([[[0.0, 1.0], [2.0, 1.0]], [[3.0, 0.0], [5.0, 1.0]], [[1.0, 0.0], [0.0, 4.0]]])
    return answers[images[:, 0, 0, 0].long(), expert]


def test_labels_start_from_the_experts_that_are_right():
    images = torch.tensor([0.0, 1, 2, 2]).view(4, 1, 1, 1)
    found = expert_logits(images, torch.tensor([0, 0, 0, 1]), 2, lookup)
    assert found.tolist() == [[2, 1], [4, 0.5], [1, 0], [0, 4]]
    neither = expert_logits(images[1:2], torch.tensor([1]), 2, lookup)
    assert neither.tolist() == [[4, 0.5]]


def test_images_that_the_first_expert_gets_right_come_first():
    method = build({"init": "correct", "labels": "soft", "max_start_epoch": 8, "iterations": 1, "strategy": "none"})
    list(method.generate())
    rows = correct_rows(method.real, method.labels, 2, method._predict, torch.Generator().manual_seed(0))
    assert len(rows.unique()) == 20 and torch.equal(method.real.labels[rows], method.labels)
    right = method._predict(0, method.real.take(rows)).argmax(1) == method.labels
    enough = [
        int((method._predict(0, method.real.take(method.real.rows[label])).argmax(1) == label).sum()) >= 2
        for label in range(10)
    ]
    assert any(enough) and all(right[label::10].all() for label in range(10) if enough[label])


def test_a_class_that_no_expert_knows_is_named():
    method = build()
    with pytest.raises(DataError, match="class 'class 1' has 0 images that an expert gets right"):
        correct_rows(method.real, method.labels, 2, lambda e, x: torch.eye(10)[0].expand(len(x), 10), torch.Generator())


def test_soft_labels_are_learnt():
    method = build({"labels": "soft", "lr_labels": 50.0})
    run = method.generate()
    for _ in range(2):
        next(run)
    list(run)
    start = expert_logits(build().pixels, method.targets, 2, method._predict)
    assert method.z is not None and not torch.equal(method.z, start)
    last = finished({"labels": "soft", "threshold": 1e-9})
    assert last.z is not None
    torch.testing.assert_close(last.z, start)


# ---- the bank --------------------------------------------------------------------------------------------------------


def bank(tmp_path, name: str, data: str, **settings: Any) -> Bank:
    method = {"name": "mtt", **Contract.options, "arch": "convnet_w4", **settings}
    values = {"data": data, "method": method, "images": 20, "out": str(tmp_path / name)}
    return engine.synthesize(parse_config("synthesize", {**values, "runtime": {"device": "cpu", "threads": 1}}))


def test_a_whitened_bank_with_soft_labels(tmp_path):
    """What a student needs is in the bank: pixels behind their transform, label logits, the learnt step size."""
    from synthkit.data.zca import ZCA

    spec = save_npz(tmp_path, channels=3, size=8)
    settings = {"zca": True, "labels": "soft", "arch": "convnet_d2_w4"}
    made = bank(tmp_path, "bank", spec, **settings)
    assert made.verify(deep=True).ok and made.spec.label_kind == "target" and made.spec.contains_real
    found = made.transform()
    assert found is not None and made.spec.transform["kind"] == "zca"
    columns = {name: np.array(made.column(name)) for name in ("images", "images_f16", "labels", "logits")}
    seen = ZCA.from_arrays(found[0]).unwhiten(torch.from_numpy(columns["images_f16"].astype(np.float32)))
    difference = seen.clamp(0, 1) * 255 - torch.from_numpy(columns["images"]).float()
    assert difference.abs().max() < 3  # half precision behind the inverse matrix
    assert columns["logits"].shape == (20, 10) and columns["labels"].tolist() == list(range(10)) * 2
    record = json.loads((made.path / "bank.json").read_text())
    assert len(record["recipe"]["made_from"]["experts"]) == 64
    assert made.sidecars[-1].raw["meta"]["learning_rate"] == pytest.approx(0.01, rel=0.5)


def test_the_folder_of_the_experts_may_differ_but_not_the_experts(tmp_path):
    spec = save_npz(tmp_path, size=32)
    one = bank(tmp_path, "one", spec)
    assert shard_hashes(bank(tmp_path, "two", spec, experts=str(tmp_path / "elsewhere")).path) == shard_hashes(one.path)
