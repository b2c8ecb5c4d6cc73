"""The engine: resuming, refusing, warning, by-products. Kills stand in contract.py for every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import Killed, dies_at
from workshop import MEAN, STD, save_teacher, shard_hashes, tree

import synthkit as sk
from synthesis.tiny import task
from synthkit import tables
from synthkit.bank import Bank, BankBusyError, BankMismatchError, BankWriter
from synthkit.bank.checking.repair import repair
from synthkit.bank.make import bank_from_arrays
from synthkit.cli.main import main
from synthkit.config.parse import parse_config
from synthkit.distillation.sources import GeneratorPool
from synthkit.errors import NonFiniteError, OutputExistsError, RequirementError, RunError
from synthkit.models.build import load_model
from synthkit.models.generators import build_generator
from synthkit.models.view import TeacherView
from synthkit.models.weights import save_weights
from synthkit.runtime import RunDir
from synthkit.synthesis import engine, run
from synthkit.synthesis.generator.cudfkd import CuDFKD
from synthkit.synthesis.generator.loop import GeneratorLoop

SMALL = {
    "method": {
        "name": "cudfkd", "student": "lenet5_half", "epochs": 4, "ep_steps": 4, "kd_steps": 1, "batch_size": 16,
        "nz": 8, "width": 4, "depth": 1, "lr_g": 0.02, "snapshots": 2,
    },
    "images": 44, "images_per_shard": 10, "runtime": {"device": "cpu"},
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data spec of 40 labelled images."""
    path = tmp_path_factory.mktemp("labelled") / "bank"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 1, 32, 32), dtype=np.uint8)
    names = [f"class {i}" for i in range(10)]
    bank_from_arrays(path, images, np.arange(40) % 10, num_classes=10, mean=MEAN, std=STD, class_names=names)
    return f"bank:{path}"


def config(teacher: Path, out: Path, **changes: Any) -> Any:
    """The small run with `changes`; those called `method_*` are options of the method."""
    values: dict[str, Any] = {**SMALL, "teacher": str(teacher), "out": str(out)}
    options = {k.removeprefix("method_"): changes.pop(k) for k in list(changes) if k.startswith("method_")}
    values["method"] = {**SMALL["method"], **options}
    return parse_config("synthesize", {**values, **changes})


@pytest.fixture(scope="module")
def whole(teacher: Path, labelled: str, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """An unbroken run with a diagnostic curve; read only."""
    return engine.synthesize(config(teacher, tmp_path_factory.mktemp("whole") / "bank", eval_data=labelled))


def kill_after_shard(patch: pytest.MonkeyPatch, cfg: Any, nth: int) -> None:
    """Run until `nth` shards of this run are committed, then die."""
    with patch.context() as inner, pytest.raises(Killed):
        inner.setattr(BankWriter, "prune_states", dies_at(BankWriter.prune_states, nth))
        engine.synthesize(cfg)


# ---- resuming --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5])
def test_resume_after_every_shard(shards, teacher, whole, labelled, tmp_path, monkeypatch):
    out = tmp_path / "bank"
    kill_after_shard(monkeypatch, config(teacher, out, eval_data=labelled), shards)
    assert len(Bank(out).sidecars) == shards
    engine.synthesize(config(teacher, out, eval_data=labelled, resume=True))
    assert shard_hashes(out) == shard_hashes(whole.path)
    assert [r.sha256 for r in Bank(out).generators()] == [r.sha256 for r in whole.generators()]
    assert RunDir(out).metrics() == RunDir(whole.path).metrics()
    weights = "student/student.safetensors"
    assert (out / weights).read_bytes() == (whole.path / weights).read_bytes()
    ended, unbroken = RunDir(out).read_json("run.json"), RunDir(whole.path).read_json("run.json")
    assert ended["status"] == unbroken["status"] == "complete" and ended["student"] == unbroken["student"]


def test_killed_between_the_last_shard_and_the_closing_record(teacher, whole, labelled, tmp_path, monkeypatch):
    out = tmp_path / "bank"
    cfg = config(teacher, out, eval_data=labelled)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(CuDFKD, "student", dies_at(CuDFKD.student, 2))  # the first call stores the student
        engine.synthesize(cfg)
    assert Bank(out).complete and RunDir(out).read_json("run.json")["status"] == "running"
    engine.synthesize(config(teacher, out, eval_data=labelled, resume=True))
    assert RunDir(out).read_json("run.json")["student"] == RunDir(whole.path).read_json("run.json")["student"]
    assert shard_hashes(out) == shard_hashes(whole.path)


def test_resuming_a_finished_run_changes_nothing(teacher, tmp_path):
    out = tmp_path / "bank"
    engine.synthesize(config(teacher, out))
    before = tree(out)
    bank = engine.synthesize(config(teacher, out, resume=True))
    assert len(bank) == 44 and tree(out) == before


def test_resume_without_a_bank_begins_one(teacher, whole, tmp_path):
    bank = engine.synthesize(config(teacher, tmp_path / "new", resume=True))
    assert shard_hashes(bank.path) == shard_hashes(whole.path)


def test_a_damaged_shard_is_made_again(teacher, whole, labelled, tmp_path, monkeypatch):
    """Also when that takes several runs: states of later shards do not push out the ones being made."""
    out = tmp_path / "bank"
    engine.synthesize(config(teacher, out, eval_data=labelled))
    damaged = BankWriter(out).shard_path(3)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert repair(out).remake == [3]
    again = config(teacher, out, resume=True, eval_data=labelled)
    for _ in range(3):
        kill_after_shard(monkeypatch, again, 1)
    engine.synthesize(again)
    assert shard_hashes(out) == shard_hashes(whole.path) and Bank(out).verify(deep=True).ok
    assert RunDir(out).metrics() == RunDir(whole.path).metrics()
    assert RunDir(out).read_json("run.json")["student"] == RunDir(whole.path).read_json("run.json")["student"]


def test_a_torn_line_of_the_log_is_taken_off(teacher, whole, labelled, tmp_path, monkeypatch):
    out = tmp_path / "bank"
    kill_after_shard(monkeypatch, config(teacher, out, eval_data=labelled), 2)
    with open(out / "metrics.jsonl", "a") as stream:
        stream.write('{"epoch": 2, "st')
    engine.synthesize(config(teacher, out, eval_data=labelled, resume=True))
    assert RunDir(out).metrics() == RunDir(whole.path).metrics()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method_lr_g": 0.03}, "recipe.method.lr_g: 0.02 -> 0.03"),
        ({"curriculum": "none"}, "recipe.curriculum: 'easy2hard' -> 'none'"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"images": 45}, "images: 44 -> 45"),
        ({"images_per_shard": 11}, "images_per_shard: 10 -> 11"),
    ],
)
def test_resume_with_another_recipe_says_what_differs(changes, said, teacher, whole):
    before = tree(whole.path)
    with pytest.raises(BankMismatchError) as caught:
        engine.synthesize(config(teacher, whole.path, resume=True, **changes))
    assert said in str(caught.value) and "another --out" in str(caught.value)
    assert caught.value.exit_code == 2 and tree(whole.path) == before


def test_resume_with_another_teacher_is_refused(whole, tmp_path):
    other = save_teacher(tmp_path / "other", seed=1)
    with pytest.raises(BankMismatchError, match="teacher_sha256"):
        engine.synthesize(config(other, whole.path, resume=True))


def test_where_it_runs_may_change(teacher, tmp_path, monkeypatch):
    """Threads, the data of the diagnostic curve and the place of the teacher's files are not part of the recipe."""
    out = tmp_path / "bank"
    kill_after_shard(monkeypatch, config(teacher, out), 2)
    moved = save_teacher(tmp_path / "the same elsewhere")
    threads = {"device": "cpu", "threads": torch.get_num_threads()}
    assert engine.synthesize(config(moved, out, resume=True, runtime=threads)).complete


# ---- refusing --------------------------------------------------------------------------------------------------


def test_an_existing_output_is_refused_and_untouched(teacher, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("all I have")
    before = tree(tmp_path)
    for resume in (False, True):
        with pytest.raises(OutputExistsError):
            engine.synthesize(config(teacher, tmp_path / "out", resume=resume))
    with pytest.raises(OutputExistsError):
        engine.synthesize(config(teacher, tmp_path / "out" / "thesis.tex"))
    assert tree(tmp_path) == before


def test_a_second_run_on_the_same_bank_is_refused(teacher, tmp_path, monkeypatch):
    out = tmp_path / "bank"
    kill_after_shard(monkeypatch, config(teacher, out), 1)
    before = shard_hashes(out)
    with BankWriter(out).lock(), pytest.raises(BankBusyError, match="pid"):
        engine.synthesize(config(teacher, out, resume=True))
    assert shard_hashes(out) == before


def test_what_a_method_requires_is_checked_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(tables.METHODS, "needs_bn", "synthesis.fakes:NeedsBatchNorm")
    plain = save_teacher(tmp_path / "teacher", "lenet5")
    values = {"teacher": str(plain), "method": "needs_bn", "images": 5, "out": str(tmp_path / "out")}
    with pytest.raises(RequirementError, match="needs BatchNorm.*try"):
        engine.synthesize(parse_config("synthesize", values))
    assert not (tmp_path / "out").exists()


# ---- any method ------------------------------------------------------------------------------------------------


@pytest.fixture
def noise(teacher, monkeypatch):
    monkeypatch.setitem(tables.METHODS, "noise", "synthesis.fakes:Noise")
    base = {"teacher": str(teacher), "images": 25, "images_per_shard": 10, "runtime": {"device": "cpu"}}

    def run(out: Path, **options: Any) -> Bank:
        values = {**base, "method": {"name": "noise", **options}, "out": str(out)}
        return engine.synthesize(parse_config("synthesize", values))

    return run


def test_a_method_without_student_snapshots_and_logits(noise, tmp_path):
    bank = noise(tmp_path / "bank")
    assert len(bank) == 25 and not bank.has("logits") and not bank.has("difficulty") and bank.generators() == []
    assert not (bank.path / "student").exists()
    assert bank.column("origin_step").tolist() == [7] * 7 + [14] * 7 + [21] * 7 + [25] * 4


def test_float_images_are_stored_as_bytes(noise, tmp_path):
    plain, floats = noise(tmp_path / "bytes"), noise(tmp_path / "floats", floats=True)
    assert np.array_equal(plain.column("images"), floats.column("images"))


def test_a_method_that_yields_too_few_images(noise, tmp_path):
    with pytest.raises(RunError, match="stopped after 22 of 25 images"):
        noise(tmp_path / "bank", lacking=3)
    assert len(Bank(tmp_path / "bank")) == 20


# ---- warnings and divergence -----------------------------------------------------------------------------------


def test_collapse_is_said(tmp_path, capsys):
    """A teacher that answers class 3 whatever it sees: the generator cannot be balanced."""
    card = save_teacher(tmp_path / "teacher")
    loaded = load_model(str(card))
    last = [m for m in loaded.module.modules() if isinstance(m, torch.nn.Linear)][-1]
    last.bias.data[3] += 1e3
    loaded.card.sha256 = save_weights(loaded.module, card.with_name("teacher.safetensors"))
    loaded.card.save(card)
    bank = engine.synthesize(config(card, tmp_path / "bank"))
    said = [text for text in RunDir(bank.path).read_json("run.json")["warnings"] if "collapsing" in text]
    assert len(said) == 1 and "class balance 0.00" in said[0] and "[0, 1, 2, 4, 5, 6, 7, 8, 9]" in said[0]
    assert "collapsing" in capsys.readouterr().err


def test_nan_from_the_start(teacher, tmp_path, capsys):
    words = ["--teacher", str(teacher), "--out", str(tmp_path / "bank"), "--images", "44", "--images_per_shard", "10"]
    options = {k: v for k, v in SMALL["method"].items() if k != "name"} | {"lr": 1e20}
    words += [word for key, value in options.items() for word in (f"--method.{key}", str(value))]
    assert main(["synthesize", *words, "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert "diverged" in said and "lower --method.lr" in said and "Traceback" not in said
    assert Bank(tmp_path / "bank").verify(deep=True).ok


def test_nan_on_the_way_leaves_the_committed_shards_whole(teacher, whole, tmp_path, monkeypatch):
    honest = GeneratorLoop.student_step

    def poisoned(self: GeneratorLoop) -> Any:
        if self.step == 9:
            with torch.no_grad():
                next(iter(self.student_view.module.parameters())).fill_(float("nan"))
        return honest(self)

    out = tmp_path / "bank"
    with monkeypatch.context() as patch, pytest.raises(NonFiniteError) as caught:
        patch.setattr(GeneratorLoop, "student_step", poisoned)
        engine.synthesize(config(teacher, out))
    assert caught.value.exit_code == 1
    made = shard_hashes(out)
    assert made and made.items() <= shard_hashes(whole.path).items() and Bank(out).verify(deep=True).ok
    record = RunDir(out).read_json("run.json")
    assert record["status"] == "failed" and "diverged" in record["error"]


def test_a_teacher_without_batchnorm(tmp_path, capsys):
    card = save_teacher(tmp_path / "teacher", "lenet5")
    bank = engine.synthesize(config(card, tmp_path / "bank"))
    assert bank.complete
    assert "no BatchNorm layer: the BN-statistics term is off" in capsys.readouterr().err
    assert any("BN-statistics term is off" in text for text in RunDir(bank.path).read_json("run.json")["warnings"])
    assert not any("g_bn" in record for record in RunDir(bank.path).metrics())


def test_too_little_memory_is_said(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "free_bytes", lambda device: 1)
    engine.synthesize(config(teacher, tmp_path / "bank"))
    assert "lower --method.batch_size" in capsys.readouterr().err


# ---- by-products -----------------------------------------------------------------------------------------------


def test_snapshots_are_kept_and_paint(whole):
    """Two asked for, of five shards: the newest of the second half."""
    records = whole.generators()
    assert [int(r.path.stem) for r in records] == [3, 4]
    assert [r.meta["step"] for r in records] == [15, 16]
    images = GeneratorPool(whole, torch.device("cpu")).images(6, seed=0, step=0)
    assert images.shape == (6, 1, 32, 32) and images.std() > 0


def test_the_last_snapshot_paints_the_last_images_of_the_bank(whole):
    """The same latents through the kept half-precision weights: within two grey levels of the stored pixels."""
    record = whole.generators()[-1]
    network = build_generator(**record.meta["generator"], seed=0).eval()
    network.load_state_dict({k: torch.from_numpy(v).float() for k, v in record.load().items()}, strict=False)
    rng = task(seed=0).rng("bank-noise")
    latents = torch.cat([torch.randn(1, 8, generator=rng) for _ in range(44)])
    last = torch.from_numpy(whole.column("origin_step").astype(np.int64)) == 16
    with torch.no_grad():
        painted = network(latents[last]) * 255
    stored = torch.from_numpy(whole.column("images"))[last].float()
    assert len(stored) > 0 and float((painted - stored).abs().max()) < 2


def test_the_student_directory_is_a_model(whole, teacher):
    loaded = load_model(str(whole.path / "student"))
    assert loaded.card.arch == "lenet5_half" and loaded.card.mean == MEAN and loaded.card.std == STD
    view, taught = TeacherView.from_loaded(loaded), TeacherView.from_loaded(load_model(str(teacher)))
    images = torch.from_numpy(whole[:16].images)
    assert view(images).shape == taught(images).shape == (16, 10)
    fresh = load_model("lenet5_half", num_classes=10, weights="optional", seed=0)
    own, new = loaded.module.state_dict(), fresh.module.state_dict()
    assert any(not torch.equal(own[k], new[k]) for k in own)


def test_curve_and_result(whole, labelled, teacher):
    curve = [r["test_top1"] for r in RunDir(whole.path).metrics() if "test_top1" in r]
    result = RunDir(whole.path).read_json("run.json")
    assert len(curve) == 4 and result["student"]["test_top1"] == curve[-1] and result["student"]["test_n"] == 40
    with torch.no_grad():
        data = Bank(labelled.removeprefix("bank:"))
        view = TeacherView.from_loaded(load_model(str(whole.path / "student")))
        right = view(torch.from_numpy(data[:].images)).argmax(1).numpy() == data[:].labels
    assert curve[-1] == pytest.approx(right.mean())


def test_the_bank_knows_where_it_comes_from(whole, teacher):
    spec = whole.spec
    assert spec.label_kind == "argmax" and not spec.real_data_used and not spec.contains_real
    assert spec.recipe["method"]["name"] == "cudfkd" and spec.recipe["curriculum"] == "easy2hard"
    assert spec.teacher["sha256"] == load_model(str(teacher)).sha256
    assert json.loads((whole.path / "run.json").read_text())["config"]["images"] == 44


def test_the_diagnostic_curve_decides_nothing(teacher, whole, tmp_path):
    """Without labelled data the bank is the same, byte for byte."""
    assert shard_hashes(engine.synthesize(config(teacher, tmp_path / "bank")).path) == shard_hashes(whole.path)


# ---- the faces -------------------------------------------------------------------------------------------------


def test_ctrl_c_says_how_to_go_on(teacher, whole, tmp_path, monkeypatch, capsys):
    options = {k: v for k, v in SMALL["method"].items() if k != "name"}
    words = ["synthesize", "--teacher", str(teacher), "--images", "44", "--images_per_shard", "10", "--device", "cpu"]
    words += [word for key, value in options.items() for word in (f"--method.{key}", str(value))]
    words += ["--out", str(tmp_path / "bank")]

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BankWriter, "prune_states", interrupt)
        assert main(words) == 130
    assert "--resume" in capsys.readouterr().err and len(Bank(tmp_path / "bank").sidecars) == 1
    assert main([*words, "--resume"]) == 0
    assert shard_hashes(tmp_path / "bank") == shard_hashes(whole.path)


def test_python_face_and_default_out(teacher, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {k: v for k, v in SMALL["method"].items() if k != "name"}
    bank = sk.synthesize("cudfkd", teacher=teacher, images=44, images_per_shard=10, device="cpu", **options)
    assert bank.path.parent == Path("banks") and bank.path.name.startswith("cudfkd-card-")
    assert shard_hashes(bank.path) == shard_hashes(whole.path)


def test_another_precision_in_the_same_process(teacher, whole, tmp_path):
    low = config(teacher, tmp_path / "bf16", runtime={"device": "cpu", "precision": "bf16"})
    assert engine.synthesize(low).complete
    full = config(teacher, tmp_path / "fp32", runtime={"device": "cpu", "precision": "fp32"})
    assert shard_hashes(engine.synthesize(full).path) == shard_hashes(whole.path)


def test_the_engine_leaves_the_global_generators_alone(teacher, tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    engine.synthesize(config(teacher, tmp_path / "bank"))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])
