"""What a loss needs and does not get is refused before any work, with the remedy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from synthkit.bank import Bank, BankSpec, BankWriter
from synthkit.bank.make import bank_from_arrays
from synthkit.config.schema import DistillConfig, RelabelConfig, RuntimeConfig
from synthkit.distillation.checks import check_needs
from synthkit.distillation.contract import LossNeeds
from synthkit.distillation.distill import distill
from synthkit.distillation.ensemble import TeacherEnsemble
from synthkit.distillation.protocols import Plan
from synthkit.distillation.relabel import relabel
from synthkit.distillation.task import check_task
from synthkit.errors import ConfigError, ModelError, RequirementError

CPU = RuntimeConfig(device="cpu")


@pytest.fixture
def config(workshop, tmp_path):
    def make(**changes) -> DistillConfig:
        values = {
            "bank": str(workshop.bank), "student": "lenet5_half_bn", "epochs": 1, "batch_size": 32, "optimizer": "sgd",
            "lr": 2e-3, "augment": "none", "out": str(tmp_path / "run"), "runtime": CPU,
        }  # fmt: skip
        return DistillConfig(**{**values, **changes})

    return make


@pytest.fixture(scope="module")
def more(workshop, tmp_path_factory) -> SimpleNamespace:
    """An unfinished bank, one whose logits have no teacher, and one with stored views."""
    root = tmp_path_factory.mktemp("more")
    whole = Bank(workshop.bank)
    spec = whole.spec
    half = BankSpec(
        shape=spec.shape, num_classes=spec.num_classes, mean=spec.mean, std=spec.std, images=192,
        class_names=spec.class_names, images_per_shard=64, teacher=spec.teacher, label_kind=spec.label_kind,
    )  # fmt: skip
    writer = BankWriter.create(root / "half", half)
    rows = whole.batch(np.arange(192))
    assert rows.images is not None and rows.labels is not None and rows.logits is not None
    for shard in range(2):
        part = slice(64 * shard, 64 * shard + 64)
        writer.write_shard(
            shard, {"images": rows.images[part], "labels": rows.labels[part], "logits": rows.logits[part]}
        )  # fmt: skip
    common = {"num_classes": 4, "mean": spec.mean, "std": spec.std}
    bank_from_arrays(root / "orphan", rows.images, columns={"logits": rows.logits}, **common)
    bank_from_arrays(root / "views", rows.images, teacher=spec.teacher, **common)
    relabel(RelabelConfig(bank=str(root / "views"), name="fkd", views=1, batch_size=64, runtime=CPU))
    return SimpleNamespace(half=root / "half", orphan=root / "orphan", views=root / "views")


CRD = {"loss_name": "kd+crd", "labels": "argmax"}

REFUSED = [
    # labels
    ({"loss_name": "ce+kd"}, RequirementError, r"ce\+kd needs hard labels; use --labels argmax or --labels stored"),
    ({"loss_name": "dkd"}, RequirementError, "loss dkd needs hard labels"),
    ({"label_weight": -1.0}, ConfigError, "label_weight must not be negative; got -1.0"),
    ({"labels": "stored"}, ConfigError, r"go together; got '--labels stored --label_weight 0.0'; give both"),
    # a live teacher
    ({"loss_name": "fitnet", "logits": "stored"}, RequirementError,
     "loss fitnet needs features of the teacher, not only its stored logits; give --teacher, a model spec, and leave"),
    ({"loss_name": "distill_weighted", "labels": "argmax", "logits": "stored"}, RequirementError,
     "loss distill_weighted needs the teacher itself, not only"),
    # rows
    ({**CRD, "control": "noise"}, RequirementError, "every image; noise is new in every step; --control DATA"),
    # teachers
    ({"loss_name": "distill_weighted", "labels": "argmax"}, RequirementError,
     "needs 2 teachers or more; name them: --teacher A,B"),
    ({"loss_name": "fitnet", "teacher": "random:lenet5@1,random:lenet5@2"}, RequirementError,
     "reads inside the teacher, and 2 teachers have nothing in common there; name one teacher, or"),
    ({"teacher": ","}, ConfigError, "teacher: no model spec; got ','"),
    ({"teacher": "random:lenet5@seven"}, ConfigError, "the seed is a whole number; got 'seven'"),
    ({"teacher": "random:lenet6"}, ModelError, "'lenet6'; did you mean 'lenet"),
    # micro-batches
    ({"accumulate": 5}, ConfigError, "accumulate must divide the batch size; got '32 / 5'"),
    ({"accumulate": 0}, ConfigError, "accumulate must divide the batch size; got '32 / 0'"),
    ({"accumulate": 32}, ConfigError, "accumulate leaves one image per micro-batch; got 32; use a smaller one"),
    ({"accumulate": 64}, ConfigError, "accumulate must divide the batch size"),
    # optimisers
    ({"optimizer": "dot", "accumulate": 2, "loss_name": "kd+rkd"}, ConfigError,
     r"optimizer dot cannot accumulate with loss kd\+rkd, which compares samples; --accumulate 1"),
    ({"optimizer": "dot", "accumulate": 2, "order": "self_paced"}, ConfigError, "optimizer dot cannot accumulate"),
    ({"optimizer": "dot", "momentum": 0.95}, ConfigError, r"dot: momentum - delta .* 0.9 and 0.075 are usual"),
    ({"ema": 1.0}, ConfigError, r"ema is a decay in \[0, 1\); got 1.0; 0.999 is usual"),
    ({"ema": -0.1}, ConfigError, "ema is a decay"),
    ({"ema": 0.9, "loss_name": "simkd"}, ConfigError, "simkd deploys modules that have no moving average.*--ema 0"),
    ({"loss_name": "simkd+lelp", "labels": "argmax"}, ConfigError, "two losses of the sum deploy modules"),
    # taps
    ({"loss_name": "fitnet", "student_taps": "stage9"}, ConfigError, "stage9.*stage1"),
    ({"loss_name": "fitnet", "teacher_taps": "conv9"}, ConfigError, "conv9"),
    ({"loss_name": "kd", "student_taps": "stage1"}, ConfigError,
     "student_taps: loss kd reads no maps of the student; got 'stage1'; leave --student_taps out"),
    ({"loss_name": "kd+rkd", "teacher_taps": "stage1"}, ConfigError,
     r"teacher_taps: loss kd\+rkd reads no maps of the teacher"),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, message", REFUSED, ids=lambda x: str(x)[:60] if isinstance(x, dict) else "")
def test_refused_with_the_remedy_and_nothing_is_written(config, changes, error, message):
    cfg = config(**changes)
    with pytest.raises(error, match=message):
        distill(cfg)
    assert not Path(cfg.out or "").exists()


def test_the_remedy_names_only_what_the_bank_has(config, workshop, more):
    bare = {"bank": str(workshop.bare), "teacher": str(workshop.teacher)}
    with pytest.raises(RequirementError, match="needs hard labels; use --labels argmax$"):
        check_task(config(**bare, loss_name="dkd"))
    with pytest.raises(RequirementError, match="labels stored: bank .* has no labels; use --labels argmax"):
        check_task(config(**bare, loss_name="dkd", labels="stored"))
    with pytest.raises(RequirementError, match="logits stored: bank .* has none; use --logits live .*synthkit relabel"):
        check_task(config(**bare, logits="stored"))
    with pytest.raises(RequirementError, match="logits live: there is no teacher; give --teacher"):
        check_task(config(bank=str(more.orphan), logits="live"))
    with pytest.raises(RequirementError, match="loss fitnet needs features of the teacher"):
        check_task(config(bank=str(more.orphan), loss_name="fitnet"))
    assert check_task(config(bank=str(more.orphan))).live is False


def test_a_loss_that_remembers_images_needs_a_finished_bank(config, more):
    with pytest.raises(
        RequirementError, match=r"unfinished \(128 of 192 images\); finish it with synthkit synthesize --resume"
    ):
        check_task(config(bank=str(more.half), **CRD))
    assert "the bank is unfinished: 128 of 192 images are used" in check_task(config(bank=str(more.half))).notes


def test_a_loss_that_remembers_images_takes_no_fresh_ones(config, generator_bank):
    values = {"bank": str(generator_bank.path), **CRD}
    with pytest.raises(
        RequirementError, match=r"loss kd\+crd remembers every image: fresh ones have no row; --fresh 0"
    ):
        check_task(config(**values, fresh=0.5))
    assert check_task(config(**values)).fresh == 0.0 and check_task(config(bank=values["bank"])).fresh == 0.5
    with pytest.raises(RequirementError, match="fresh images have no stored labels; use --labels argmax or none"):
        check_task(config(bank=values["bank"], labels="stored", label_weight=1.0, fresh=0.5))


def test_stored_views_are_no_rows_of_the_bank(config, more):
    values = {"bank": str(more.views), "label_set": "fkd", "augment": None}
    with pytest.raises(
        RequirementError, match="looks at the bank's images before training.*'fkd' holds only views; leave"
    ):
        check_task(config(**values, loss_name="kd+deit_lt"))
    with pytest.raises(RequirementError, match="features of the teacher, not only its stored logits.*--label_set out"):
        check_task(config(**values, **CRD))
    task = check_task(config(**values))
    assert task.views and not task.live
    needs = LossNeeds(index=True)  # of a loss that needs rows, but no features
    with pytest.raises(
        RequirementError, match="remembers every image, and stored views mix them; leave --label_set out"
    ):
        check_needs(task.cfg, task.bank, task.labels, task.teacher, task.plan, needs, [])


def test_micro_batches_of_several_processes(config, monkeypatch):
    """Every process cuts its own share of the batch."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert check_task(config(accumulate=4)).plan.batch_size == 32
    with pytest.raises(ConfigError, match="accumulate must divide the batch size of each process; got '8 / 16'"):
        check_task(config(accumulate=16))
    with pytest.raises(ConfigError, match="one image per micro-batch"):
        check_task(config(accumulate=8))


def test_a_batch_that_was_made_smaller_is_what_is_divided(config):
    with pytest.raises(ConfigError, match="accumulate must divide the batch size; got '182 / 4'"):
        check_task(config(batch_size=4000, accumulate=4))
    assert check_task(config(batch_size=4000, accumulate=7)).plan.batch_size == 182


# --- notes ------------------------------------------------------------------------------------------------------------


def test_small_batches_of_a_loss_that_compares_samples_are_noted(config):
    said = "loss kd+dist compares the samples of a batch: 8 are few, 64 usual"
    assert said in check_task(config(loss_name="kd+dist", batch_size=8)).notes
    assert not any("few" in note for note in check_task(config(loss_name="kd+dist", batch_size=64)).notes)


def test_what_a_protocol_was_published_with_is_said(config, tmp_path):
    def notes(**changes) -> list[str]:
        found = [n for n in check_task(config(protocol="crd", **changes)).notes if "published" in n]
        assert len(found) <= 1
        return found

    assert (
        "protocol crd was published with ce, which loss rkd lacks: its figures are for --loss ce+rkd"
        in (notes(loss_name="rkd")[0])
    )
    assert notes(loss_name="ce+rkd", labels="argmax") == []
    result = distill(config(protocol="crd", loss_name="rkd", epochs=None, steps=1))
    assert notes(loss_name="rkd")[0] in json.loads((result.path / "run.json").read_text())["notes"]


# --- teachers ---------------------------------------------------------------------------------------------------------


def test_a_random_teacher(config, workshop):
    """Fresh weights of a seed, with the bank's constants."""
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    def logits(spec: str) -> torch.Tensor:
        task = check_task(config(teacher=spec))
        assert task.teacher is not None and task.live and task.teacher_facts["spec"] == spec
        assert task.teacher.mean == Bank(workshop.bank).mean and task.teacher.num_classes == 4
        with torch.no_grad():
            return task.teacher(images)

    first, default = logits("random:lenet5@7"), logits("random:lenet5")
    assert torch.equal(first, logits("random:lenet5@7")) and torch.equal(default, logits("random:lenet5@0"))
    assert not torch.equal(first, default)
    assert not torch.equal(default, logits("random:lenet5_half"))


def test_a_student_of_a_random_teacher(config):
    """The sanity run: it agrees with its teacher, whatever that knows."""
    result = distill(config(teacher="random:lenet5_half@3", student="lenet5_half", epochs=4, lr=0.05))
    assert result.metrics["teacher"] == "random:lenet5_half@3" and result.metrics["holdout_agreement"] >= 0.5


def test_several_teachers_by_flag(config, workshop):
    second = "random:lenet5_half@1"
    task = check_task(config(teacher=f"{workshop.teacher}, {second}"))
    assert isinstance(task.teacher, TeacherEnsemble) and len(task.teacher.teachers) == 2
    assert [m["spec"] for m in task.teacher_facts["members"]] == [str(workshop.teacher), second]
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    alone = [check_task(config(teacher=spec)).teacher for spec in (str(workshop.teacher), second)]
    assert alone[0] is not None and alone[1] is not None
    with torch.no_grad():
        mean = (alone[0](images).softmax(1) + alone[1](images).softmax(1)) / 2
        torch.testing.assert_close(task.teacher(images).softmax(1), mean)


def test_needs_that_are_met_pass(config, workshop):
    """Of the checks above, none stands in the way of what works."""
    task = check_task(config(**CRD, accumulate=4))
    check_needs(task.cfg, task.bank, None, task.teacher, task.plan, task.loss.requires, notes := [])
    assert notes == [] and task.live
    plan = Plan(batch_size=32, optimizer="dot")
    check_needs(replace(task.cfg, accumulate=1), task.bank, None, task.teacher, plan, task.loss.requires, notes)
    pair = check_task(
        config(loss_name="distill_weighted", labels="argmax", teacher=",".join([str(workshop.teacher)] * 2))
    )
    assert pair.loss.requires.teachers == 2
