"""What the training loop does beyond plain batches: micro-batches, moving averages, changing figures, trackers,
optimiser groups and DOT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from synthkit.config.schema import DistillConfig, RuntimeConfig
from synthkit.distillation import trainer as trainer_module
from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.distill import distill
from synthkit.distillation.losses.pkt import pkt_loss
from synthkit.distillation.objective import Distillation
from synthkit.distillation.protocols import Plan
from synthkit.distillation.sources import RandomOrder, ResidentStore, StoreSource, stream_seed
from synthkit.distillation.trainer import Trainer
from synthkit.distillation.weighted import weighted_sum
from synthkit.errors import ConfigError, NonFiniteError
from synthkit.models.taps import TapSet
from synthkit.models.view import ModelView, TeacherView
from synthkit.runtime import RunDir, Runtime

CPU = torch.device("cpu")
CLASSES, COUNT, SHAPE = 3, 48, (1, 6, 6)


def network(*, norm: bool = False, dropout: float = 0.0, width: int = 8) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(7 + width)
        middle = [nn.BatchNorm1d(width)] if norm else []
        return nn.Sequential(
            nn.Flatten(), nn.Linear(36, width), *middle, nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, CLASSES)
        )


def student_view(**options) -> ModelView:
    return ModelView(network(**options), [0.5], [0.25], input_size=SHAPE, num_classes=CLASSES)


def layers(view: ModelView) -> nn.Sequential:
    assert isinstance(view.module, nn.Sequential)
    return view.module


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (COUNT, *SHAPE), generator=generator, dtype=torch.uint8)
    return images, (images.float().mean((1, 2, 3)).argsort().argsort() // (COUNT // CLASSES)).long()


def plan_of(**changes) -> Plan:
    return Plan(**{"lr": 0.05, "epochs": 3, "batch_size": 12, "weight_decay": 1e-3, **changes})


def trainer(path, objective: Any, view: ModelView, plan: Plan | None = None, *, tracker: str | None = None, **options):
    plan = plan or plan_of()
    store = ResidentStore(*data(), None, CPU)
    source = StoreSource(store, RandomOrder(np.arange(COUNT), 3), plan.batch_size, policy=plan.augment, device=CPU)
    return Trainer(
        runtime=Runtime.create(RuntimeConfig(device="cpu", tracker=tracker)), view=view, objective=objective,
        source=source, plan=plan, run_dir=RunDir(path).create(), **options,
    )  # fmt: skip


def distillation(loss: Loss, view: ModelView, **options) -> Distillation:
    """A loss set up on the student and a wider teacher."""
    teacher = TeacherView(network(width=16), [0.5], [0.25], input_size=SHAPE, num_classes=CLASSES)
    taps, taught = TapSet(view, loss.requires.student), TapSet(teacher, loss.requires.teacher)
    loss.setup(
        Setup(
            student=taps.shapes, teacher=taught.shapes, num_classes=CLASSES, batch_size=12, epochs=3, images=COUNT,
            seed=4,
        )
    )  # fmt: skip
    return Distillation(loss, taps, taught, **options)


def records(path) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in RunDir(path).metrics()]


def assert_same(a: nn.Module, b: nn.Module, *, rtol: float = 0, atol: float = 0) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


class Relation(Loss):
    """Similarities of a batch, of the student's pooled features behind a trained layer: a batch in parts is another
    loss."""

    requires = LossNeeds(student=("pooled",), teacher=("pooled",), relational=True)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Nothing."""

    def setup(self, setup: Setup) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(setup.seed)
            self.aux = nn.Linear(setup.student.pooled, setup.teacher.pooled)

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, torch.Tensor]:
        assert self.aux is not None and student.pooled is not None and teacher.pooled is not None
        return {"relation": 50 * pkt_loss(self.aux(student.pooled), teacher.pooled)}


LOSSES: dict[str, Callable[[], Loss]] = {
    "per sample": lambda: weighted_sum("ce+0.5*kd")(),
    "relational": lambda: weighted_sum("ce+dist")(),
    "relational with modules": Relation,
}


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
        found.append(layers(whole.view)[1].weight.detach())
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


class Stopped(Exception):
    pass


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


def test_a_tracker_that_is_not_there_is_refused(monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ConfigError, match="not one of accelerate's; got 'tensorbord'; did you mean 'tensorboard'"):
        Runtime.create(RuntimeConfig(device="cpu", tracker="tensorbord"))
    with pytest.raises(ConfigError, match="tracker: wandb is not installed; pip install wandb"):
        Runtime.create(RuntimeConfig(device="cpu", tracker="wandb"))


# --- optimiser groups -------------------------------------------------------------------------------------------------


class Grouped(Relation):
    """Half the rate on the student's first layer, none on its own module, the last layer left out."""

    def parameter_groups(self, student: nn.Module) -> list[dict[str, Any]]:
        assert self.aux is not None and isinstance(student, nn.Sequential)
        return [
            {"params": list(student[1].parameters()), "lr_scale": 0.5},
            {"params": list(self.aux.parameters()), "lr_scale": 0.0, "weight_decay": 0.0},
        ]


@pytest.mark.parametrize("vectors", [True, False])
def test_groups_of_a_loss_have_their_own_rates(tmp_path, vectors):
    moved = {}
    plan = plan_of(epochs=None, steps=1, momentum=0.0, schedule="constant", weight_decay=0.0, decay_vectors=vectors)
    for kind in (Relation, Grouped):
        view = student_view()
        loss = kind()
        made = trainer(tmp_path / kind.__name__, distillation(loss, view), view, plan)
        assert loss.aux is not None
        before = {k: v.clone() for k, v in made.parts.state_dict().items()}
        made.fit()
        moved[kind] = {k: v - before[k] for k, v in made.parts.state_dict().items()}
    plain, grouped = moved[Relation], moved[Grouped]
    for name in ("network.1.weight", "network.1.bias"):
        assert bool(plain[name].any())
        torch.testing.assert_close(grouped[name], 0.5 * plain[name], rtol=1e-4, atol=1e-7)
    assert bool(plain["aux.weight"].any()) and not bool(grouped["aux.weight"].any())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "dot"])
def test_parameters_in_no_group_stay_and_the_state_is_stored(tmp_path, monkeypatch, optimizer):
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", 0.0)
    plan = plan_of(optimizer=optimizer, lr=0.01, schedule="constant")

    def make(name: str) -> Trainer:
        view = student_view()
        return trainer(tmp_path / name, distillation(Grouped(), view), view, plan)

    whole = make("whole")
    whole.fit()
    started = network()
    ended, began = whole.network.state_dict(), started.state_dict()
    assert torch.equal(ended["4.weight"], began["4.weight"]) and not torch.equal(ended["1.weight"], began["1.weight"])
    broken = make("parts")
    monkeypatch.setattr(broken, "total", 7)
    broken.fit()
    resumed = make("parts")
    assert resumed.restore() and resumed.step == 6  # the last step of a run is no state
    resumed.fit()
    assert_same(whole.parts, resumed.parts)


def test_a_loss_may_set_rates_at_every_step(tmp_path):
    told: list[tuple[float, float]] = []

    class Still(Relation):
        def on_step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
            told.append((progress, optimizer.param_groups[0]["lr"]))
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    view = student_view()
    before = copy.deepcopy(view.module)
    made = trainer(tmp_path, distillation(Still(), view), view)
    made.fit()
    assert [progress for progress, _ in told] == pytest.approx([step / 12 for step in range(12)])
    assert [rate for _, rate in told] == pytest.approx([made.plan.lr_at(step, 12, 4) for step in range(12)])
    assert_same(before, view.module)


# --- dot --------------------------------------------------------------------------------------------------------------


def dot_plan(**changes) -> Plan:
    return plan_of(**{"optimizer": "dot", "schedule": "constant", "lr": 0.05, "epochs": 1, **changes})


def test_dot_keeps_the_labels_part_apart(tmp_path):
    """Four steps against the two momenta written out."""
    view = student_view()
    start = copy.deepcopy(view.module)
    made = trainer(tmp_path, distillation(weighted_sum("ce+2*kd")(), view, labels="stored"), view, dot_plan())
    made.fit()
    mine = ModelView(start, [0.5], [0.25], input_size=SHAPE, num_classes=CLASSES)
    written = distillation(weighted_sum("ce+2*kd")(), mine, labels="stored")
    parameters = list(start.parameters())
    buffers = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    for step in range(4):
        batch = made.source.batch(step)
        seen = written.look(batch)
        assert seen.student is not None and seen.teacher is not None
        values = written.loss(seen.student, seen.teacher, batch)
        for name, momentum, decay, buffer in (("ce", 0.825, 1e-3, buffers[0]), ("kd", 0.975, 0.0, buffers[1])):
            gradients = torch.autograd.grad(values[name].mean(), parameters, retain_graph=True)
            for p, v, g in zip(parameters, buffer, gradients, strict=True):
                v.mul_(momentum).add_(g + decay * p.detach())
        with torch.no_grad():
            for p, task, rest in zip(parameters, *buffers, strict=True):
                p -= 0.05 * (task + rest)
    assert_same(start, view.module, rtol=1e-4, atol=1e-6)


def test_dot_without_labels_is_sgd(tmp_path):
    found = []
    for optimizer in ("dot", "sgd"):
        view = student_view()
        plan = dot_plan(optimizer=optimizer, nesterov=False)
        trainer(tmp_path / optimizer, distillation(weighted_sum("1*kd")(), view), view, plan).fit()
        found.append(view.module)
    assert_same(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_dot_in_micro_batches(tmp_path):
    found = []
    for parts in (1, 3):
        view = student_view()
        made = distillation(weighted_sum("ce+kd")(), view, labels="stored")
        trainer(tmp_path / str(parts), made, view, dot_plan(), accumulate=parts).fit()
        found.append(view.module)
    assert_same(found[0], found[1], rtol=1e-4, atol=1e-6)
