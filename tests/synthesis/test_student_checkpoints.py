"""States of the co-trained student that a bank keeps: which, whole, the same after a kill, no part of the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from contract import Killed, dies_at
from workshop import save_teacher, shard_hashes, tree

from synthkit.bank import Bank, BankWriter
from synthkit.config.parse import parse_config
from synthkit.errors import ConfigError
from synthkit.evaluation.selection import select
from synthkit.models.build import load_model
from synthkit.synthesis import engine
from synthkit.synthesis.run import CHECKPOINTS, Run, keeping_is_due

CUDFKD = {
    "name": "cudfkd", "student": "lenet5_half_bn", "epochs": 6, "ep_steps": 4, "kd_steps": 2, "batch_size": 16,
    "nz": 8, "width": 4, "depth": 1, "snapshots": 0, "lr": 0.05,
}  # fmt: skip
ADI = {
    "name": "adi", "student": "lenet5_half_bn", "iterations": 2, "batch_size": 10, "plain": 1, "student_steps": 3,
    "student_batch": 8, "augment": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def config(teacher: Path, out: Path, method: dict[str, Any], checkpoints: int, **changes: Any) -> Any:
    return parse_config(
        "synthesize",
        {
            "teacher": str(teacher), "out": str(out), "images": 40, "images_per_shard": 10,
            "runtime": {"device": "cpu"}, "method": {**method, "checkpoints": checkpoints}, **changes,
        },
    )  # fmt: skip


def kept(bank: str | Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (Path(bank) / CHECKPOINTS).glob("*"))


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """An unbroken run that keeps three states; read only."""
    return engine.synthesize(config(teacher, tmp_path_factory.mktemp("whole") / "bank", CUDFKD, 3))


@pytest.mark.parametrize(
    ("checkpoints", "steps"),
    [(0, []), (1, [24]), (4, [8, 12, 20, 24]), (100, [4, 8, 12, 16, 20, 24])],
)
def test_states_are_spread_over_the_run_and_the_last_is_among_them(checkpoints, steps):
    found: list[int] = []
    for epoch in (*range(4, 25, 4), *range(4, 25, 4)):  # the second time as after a kill: nothing new
        if keeping_is_due(epoch, found, checkpoints, 24):
            found.append(epoch)
    assert found == steps


def test_a_state_is_a_whole_model_and_the_last_is_the_student(whole, teacher):
    assert kept(whole.path) == [8, 16, 24]
    weights = [(whole.path / CHECKPOINTS / f"step-{s}" / "student.safetensors").read_bytes() for s in (8, 16, 24)]
    assert len(set(weights)) == 3
    assert weights[2] == (whole.path / "student" / "student.safetensors").read_bytes()
    card = load_model(str(whole.path / CHECKPOINTS / "step-16")).card
    assert card.arch == "lenet5_half_bn" and card.extra["step"] == 16 and card.extra["teacher"] == str(teacher)
    assert whole.verify(deep=True).ok


def test_keeping_changes_no_image(whole, teacher, tmp_path):
    bank = engine.synthesize(config(teacher, tmp_path / "bank", CUDFKD, 0))
    assert shard_hashes(bank.path) == shard_hashes(whole.path)


@pytest.mark.parametrize("call", [1, 4])
def test_killed_and_resumed_keeps_the_same_states(call, whole, teacher, tmp_path, monkeypatch):
    """Killed while a state is being written (its end is missing), and again between states."""
    out = tmp_path / "bank"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "_write_student", dies_at(Run._write_student, min(call, 3)))
        patch.setattr(BankWriter, "prune_states", dies_at(BankWriter.prune_states, call))
        engine.synthesize(config(teacher, out, CUDFKD, 3))
    engine.synthesize(config(teacher, out, CUDFKD, 3, resume=True))
    here, there = tree(out / CHECKPOINTS), tree(whole.path / CHECKPOINTS)
    assert {k: v for k, v in here.items() if "card" not in k} == {k: v for k, v in there.items() if "card" not in k}
    assert shard_hashes(out) == shard_hashes(whole.path)


def test_one_that_exists_is_left_alone(whole, teacher, tmp_path, monkeypatch):
    out = tmp_path / "bank"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(
            BankWriter, "save_state", dies_at(BankWriter.save_state, 2)
        )  # the state is older than the weights
        engine.synthesize(config(teacher, out, CUDFKD, 3))
    before = {k: (out / CHECKPOINTS / k).stat().st_mtime_ns for k in tree(out / CHECKPOINTS)}
    assert kept(out)
    engine.synthesize(config(teacher, out, CUDFKD, 3, resume=True))
    assert kept(out) == [8, 16, 24]
    assert before == {k: (out / CHECKPOINTS / k).stat().st_mtime_ns for k in before}


def test_the_student_of_adaptive_deepinversion(teacher, tmp_path):
    """It learns after the plain batch and after each of the others: at its steps 3, 6, 9 and 12."""
    bank = engine.synthesize(config(teacher, tmp_path / "bank", ADI, 2))
    assert kept(bank.path) == [6, 12]
    last = bank.path / CHECKPOINTS / "step-12" / "student.safetensors"
    assert last.read_bytes() == (bank.path / "student" / "student.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="checkpoints must not be negative"):
        config(teacher, tmp_path / "bank", ADI, -1)


def test_a_run_that_kept_states_can_be_chosen_from(whole, teacher, tmp_path):
    short = {**CUDFKD, "epochs": 2, "ep_steps": 12}
    other = engine.synthesize(config(teacher, tmp_path / "bank", short, 2, seed=1))
    found = select([whole.path, other.path], device="cpu")
    assert {row["run"]: row["last"] for row in found["runs"]} == {str(whole.path): 24, str(other.path): 24}
    assert [row["step"] for row in found["candidates"]] == [8, 16, 24, 12, 24]
    assert [(row["name"], row["seed"]) for row in found["runs"]] == [("cudfkd", 0), ("cudfkd", 1)]
