"""What the training loop does beyond plain batches: micro-batches, moving averages, changing figures, trackers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from distillation.trainer_case import (
    CLASSES,
    LOSSES,
    SHAPE,
    Relation,
    Stopped,
    assert_same,
    distillation,
    layers,
    plan_of,
    records,
    student_view,
    trainer,
)  # fmt: skip
from synthkit.config.schema import DistillConfig, RuntimeConfig
from synthkit.distillation import trainer as trainer_module
from synthkit.distillation.contract import Batch, Taps
from synthkit.distillation.distill import distill
from synthkit.distillation.sources import stream_seed
from synthkit.distillation.weighted import weighted_sum
from synthkit.errors import ConfigError, NonFiniteError
from synthkit.models.view import ModelView
from synthkit.runtime import RunDir, Runtime

# --- micro-batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_micro_batches_are_one_batch(tmp_path, case, parts):
    """Without BatchNorm and dropout: the same weights, modules of the loss and figures."""
    found = []
    for count in (1, parts):
        view = student_view()
        made = trainer(tmp_path / str(count), distillation(LOSSES[case](), view), view, accumulate=count)
        made.fit()
        found.append(made)
    assert_same(found[0].parts, found[1].parts, rtol=1e-4, atol=1e-6)
    for one, other in zip(records(tmp_path / "1"), records(tmp_path / str(parts)), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_batch_in_parts_would_be_another_relational_loss(tmp_path):
    """That the equality above means something: with every part by itself the weights differ."""
    found = []
    for relational in (True, False):
        view = student_view()
        made = distillation(Relation(), view)
        made.relational = relational
        whole = trainer(tmp_path / str(relational), made, view, accumulate=3)
        whole.fit()
        found.append(whole.network.state_dict()["1.weight"].clone())
    assert float((found[0] - found[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("case", LOSSES)
def test_micro_batches_with_dropout_are_exact(tmp_path, case):
    """One step against the sum written out: every part draws its own dropout, and draws the same one in both passes."""
    parts, view = 3, student_view(dropout=0.5)
    plan = plan_of(epochs=None, steps=1, lr=1.0, schedule="constant", momentum=0.0, weight_decay=0.0)
    before = copy.deepcopy(view.module)
    loss = LOSSES[case]()
    made = trainer(tmp_path / "run", distillation(loss, view), view, plan, accumulate=parts, seed=11)
    made.fit()

    copied = ModelView(before.train(), [0.5], [0.25], input_size=SHAPE, num_classes=CLASSES)
    again = LOSSES[case]()
    written = distillation(again, copied)
    batch = made.source.batch(0)
    size = len(batch.images) // parts
    student: list[Taps] = []
    with torch.random.fork_rng():
        for part in range(parts):
            torch.manual_seed(stream_seed(11, "dropout", 0, 0, part))
            student.append(written.student(batch.images[part * size : (part + 1) * size]))
    pooled = [t.pooled for t in student if t.pooled is not None]
    whole = Taps(logits=torch.cat([t.logits for t in student]), pooled=torch.cat(pooled) if pooled else None)
    values = again(whole, written.teach(batch.images), batch)
    torch.stack([value.mean() for value in values.values()]).sum().backward()
    for a, b in zip(before.parameters(), made.network.parameters(), strict=True):
        step = torch.zeros_like(a) if a.grad is None else a.grad  # `Relation` does not reach the last layer
        torch.testing.assert_close(b.detach(), a.detach() - step, rtol=1e-5, atol=1e-6)
    assert sum(p.grad is not None and bool(p.grad.any()) for p in before.parameters()) >= 2
    if again.aux is not None and loss.aux is not None:
        for a, b in zip(again.aux.parameters(), loss.aux.parameters(), strict=True):
            assert a.grad is not None
            torch.testing.assert_close(b.detach(), a.detach() - a.grad, rtol=1e-5, atol=1e-6)


def test_running_statistics_see_every_micro_batch_once(tmp_path):
    """The first pass of a relational loss leaves BatchNorm as it was."""
    view = student_view(norm=True)
    plan = plan_of(epochs=None, steps=1)
    made = trainer(tmp_path, distillation(Relation(), view), view, plan, accumulate=3)
    images = made.source.batch(0).images
    linear, norm = copy.deepcopy(layers(view)[1]), copy.deepcopy(layers(view)[2])
    made.fit()
    with torch.no_grad():
        for part in view.normalize(images).chunk(3):
            norm(linear(part.flatten(1)))
    after = layers(view)[2]
    assert isinstance(after, nn.BatchNorm1d) and isinstance(norm, nn.BatchNorm1d)
    assert after.num_batches_tracked is not None and norm.num_batches_tracked is not None
    assert int(after.num_batches_tracked) == int(norm.num_batches_tracked) == 3 and after.track_running_stats
    torch.testing.assert_close(after.running_mean, norm.running_mean)
    torch.testing.assert_close(after.running_var, norm.running_var)


def test_a_relational_loss_that_fails_leaves_batchnorm_recording(tmp_path):
    class Broken(Relation):
        def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, torch.Tensor]:
            raise ValueError("broken")

    view = student_view(norm=True)
    made = trainer(tmp_path, distillation(Broken(), view), view, accumulate=3)
    with pytest.raises(ValueError, match="broken"):
        made.fit()
    assert layers(view)[2].track_running_stats


# --- the moving average -----------------------------------------------------------------------------------------------


def watching(states: list[dict[str, torch.Tensor]], stop_at: int = -1):
    """An objective that keeps the weights as they are before every step, and may die."""

    def function(view: ModelView, batch: Batch) -> dict[str, torch.Tensor]:
        if len(states) == stop_at:
            raise Stopped
        states.append({k: v.detach().clone() for k, v in view.module.state_dict().items()})
        assert batch.labels is not None
        return {"loss": nn.functional.cross_entropy(view(batch.images), batch.labels)}

    return function


def test_the_moving_average_is_the_recursion(tmp_path):
    states: list[dict[str, torch.Tensor]] = []
    view = student_view(norm=True, dropout=0.2)
    made = trainer(tmp_path / "a", watching(states), view, ema=0.8)
    made.fit()
    assert made.average is not None and not made.average.training
    expected = states[0]
    for state in [*states[1:], made.network.state_dict()]:
        expected = {
            k: 0.8 * expected[k] + 0.2 * v if v.is_floating_point() else v.clone() for k, v in state.items()
        }  # fmt: skip
    for name, value in made.average.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in made.average.parameters())
    plain_view = student_view(norm=True, dropout=0.2)
    plain = trainer(tmp_path / "b", watching([]), plain_view)
    plain.fit()
    assert_same(plain.network, made.network)  # the average is beside the student, never in it
    assert float((made.average.state_dict()["1.weight"] - made.network.state_dict()["1.weight"]).abs().max()) > 1e-4


@pytest.mark.parametrize("die_at", [0, 2, 7])
def test_the_moving_average_survives_a_kill(tmp_path, monkeypatch, die_at):
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", 0.0)
    whole = trainer(tmp_path / "whole", watching([]), student_view(norm=True), ema=0.9)
    whole.fit()
    broken = trainer(tmp_path / "parts", watching([], die_at), student_view(norm=True), ema=0.9)
    with pytest.raises(Stopped):
        broken.fit()
    resumed = trainer(tmp_path / "parts", watching([]), student_view(norm=True), ema=0.9)
    assert resumed.restore() == (die_at > 0) and resumed.step == die_at
    resumed.fit()
    assert whole.average is not None and resumed.average is not None
    assert_same(whole.average, resumed.average)
    assert_same(whole.network, resumed.network)


# --- figures ----------------------------------------------------------------------------------------------------------


def changing(view: ModelView, batch: Batch) -> dict[str, torch.Tensor]:
    """Shows `a` in the first epoch, `b` from the second on, and `seldom` in the first step of every epoch."""
    assert batch.labels is not None
    found = {"loss": nn.functional.cross_entropy(view(batch.images), batch.labels)}
    found["a" if batch.epoch < 1 else "b"] = torch.tensor(1.0 + batch.epoch)
    if batch.epoch == int(batch.epoch):
        found["seldom"] = torch.tensor(batch.epoch)
    return found


def test_figures_may_change_their_names(tmp_path):
    """An epoch's figure is the mean over the steps that had it."""
    trainer(tmp_path, changing, student_view()).fit()
    logged = records(tmp_path)
    assert [("a" in r, "b" in r, r["seldom"]) for r in logged] == [(True, False, 0), (False, True, 1), (False, True, 2)]
    assert logged[0]["a"] == pytest.approx(1 + (0 + 0.25 + 0.5 + 0.75) / 4)
    assert logged[1]["b"] == pytest.approx(2 + (0 + 0.25 + 0.5 + 0.75) / 4)


def test_changing_figures_survive_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", 0.0)
    trainer(tmp_path / "whole", changing, student_view()).fit()
    calls: list[int] = []

    def dying(view, batch):
        calls.append(1)
        if len(calls) == 7:  # in the second epoch, two steps after the names changed
            raise Stopped
        return changing(view, batch)

    with pytest.raises(Stopped):
        trainer(tmp_path / "parts", dying, student_view()).fit()
    resumed = trainer(tmp_path / "parts", changing, student_view())
    assert resumed.restore()
    resumed.fit()
    assert records(tmp_path / "parts") == records(tmp_path / "whole")


def test_a_bad_loss_before_a_change_of_names_is_found_at_its_step(tmp_path):
    def bad(view, batch):
        found = changing(view, batch)
        return {**found, "loss": found["loss"] * float("nan")} if batch.epoch == 0.75 else found

    with pytest.raises(NonFiniteError, match="not finite at step 3 of 12"):
        trainer(tmp_path, bad, student_view()).fit()


def test_a_phase_of_a_sum_in_a_run(tmp_path):
    view = student_view()
    made = distillation(weighted_sum("ce@until1+kd@from1+0.5*l1")(), view, labels="stored")
    trainer(tmp_path, made, view).fit()
    logged = records(tmp_path)
    assert [("ce" in r, "kd" in r, "l1" in r) for r in logged] == [(True, False, True), *[(False, True, True)] * 2]
    for record in logged:
        parts = [record[name] for name in ("ce", "kd", "l1") if name in record]
        assert record["loss"] == pytest.approx(sum(parts), rel=1e-5)


# --- trackers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def notebook(monkeypatch) -> list[Any]:
    """What a tracker of accelerate, registered as `notebook`, is told."""
    from accelerate import tracking

    told: list[Any] = []

    class Notebook(tracking.GeneralTracker):
        name = "notebook"
        requires_logging_directory = False

        def __init__(self, run_name: str, **_: Any):
            super().__init__()
            told.append(("init", run_name))

        @property
        def tracker(self) -> list[Any]:
            return told

        def store_init_configuration(self, values: dict) -> None:
            """Nothing."""

        def log(self, values: dict, step: int | None = None, **_: Any) -> None:
            told.append((step, values))

        def finish(self) -> None:
            told.append("finished")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    return told


def test_trackers_get_the_figures(tmp_path, notebook):
    made = trainer(tmp_path, changing, student_view(), tracker="notebook", on_epoch=lambda *_: {"top1": 0.5, "per": {}})
    made.fit()
    made.runtime.close_trackers()
    assert notebook[0] == ("init", "synthkit") and notebook[-1] == "finished"
    logged = list(RunDir(tmp_path).metrics())
    assert [step for step, _ in notebook[1:-1]] == [r["step"] for r in logged] == [4, 8, 12]
    for (_, told), record in zip(notebook[1:-1], logged, strict=True):
        assert told == {k: v for k, v in record.items() if k != "per"} and told["loss"] > 0
    assert notebook[-2][1]["top1"] == 0.5


def test_trackers_of_a_run_are_closed(tmp_path, notebook, workshop):
    cfg = DistillConfig(
        bank=str(workshop.bank), student="lenet5_half", steps=2, batch_size=16, augment="none",
        out=str(tmp_path / "run"), runtime=RuntimeConfig(device="cpu", tracker="notebook"),
    )  # fmt: skip
    found = distill(cfg)
    assert notebook[0] == ("init", "synthkit") and notebook[-1] == "finished" and len(notebook) == 3
    step, told = notebook[1]
    assert step == 2 and told["loss"] == found.metrics["loss"]


def test_runs_that_share_a_tracker_are_told_apart(tmp_path, notebook, workshop):
    cfg = DistillConfig(
        bank=str(workshop.bank), student="lenet5_half", steps=2, batch_size=16, augment="none", seeds=2,
        control="noise", out=str(tmp_path / "run"), runtime=RuntimeConfig(device="cpu", tracker="notebook"),
    )  # fmt: skip
    distill(cfg)
    names = [{name.rpartition("/")[0] for name in told} for _, told in notebook[1:-1]]
    assert names == [{"seed0"}, {"seed1"}, {"control"}]


def test_a_tracker_that_is_not_there_is_refused(monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ConfigError, match="not one of accelerate's; got 'tensorbord'; did you mean 'tensorboard'"):
        Runtime.create(RuntimeConfig(device="cpu", tracker="tensorbord"))
    with pytest.raises(ConfigError, match="tracker: wandb is not installed; pip install wandb"):
        Runtime.create(RuntimeConfig(device="cpu", tracker="wandb"))
