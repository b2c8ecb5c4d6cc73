"""The training loop and its state: exact resume, refusal of NaN, figures, no trace in torch's own generator."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from synthkit.config.schema import RuntimeConfig
from synthkit.distillation import trainer as trainer_module
from synthkit.distillation.contract import Batch
from synthkit.distillation.protocols import Plan
from synthkit.distillation.sources import RandomOrder, ResidentStore, StoreSource
from synthkit.distillation.state import StateStore
from synthkit.distillation.trainer import Trainer
from synthkit.errors import NonFiniteError, RunError
from synthkit.models.view import ModelView
from synthkit.runtime import RunDir, Runtime

CPU = torch.device("cpu")


def network() -> nn.Module:
    """Convolution, BatchNorm, dropout and a linear layer: everything that a state must carry."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(36, 3)
        )


def objective(view: ModelView, batch: Batch) -> dict[str, torch.Tensor]:
    logits = view(batch.images)
    assert batch.labels is not None
    return {
        "loss": nn.functional.cross_entropy(logits, batch.labels),
        "top1": (logits.argmax(1) == batch.labels).float().mean(),
    }


def make(path, *, loss=objective, plan=None, **options) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (36, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = (images.float().mean((1, 2, 3)).argsort().argsort() // 12).long()
    plan = plan or Plan(lr=0.05, epochs=5, batch_size=6, nesterov=True, warmup=0.1, augment="shift")
    store = ResidentStore(images, labels, None, CPU)
    return Trainer(
        runtime=Runtime.create(RuntimeConfig(device="cpu")),
        view=ModelView(network(), [0.5], [0.25], input_size=(1, 8, 8), num_classes=3),
        objective=loss,
        source=StoreSource(store, RandomOrder(np.arange(36), 3), plan.batch_size, policy=plan.augment, device=CPU),
        plan=plan,
        run_dir=RunDir(path).create(),
        **options,
    )


class Stopped(Exception):
    pass


def stopping(step: int):
    """An objective that dies at its `step`-th call."""
    calls = iter(range(10**6))

    def loss(view, batch):
        if next(calls) == step:
            raise Stopped
        return objective(view, batch)

    return loss


def records(path) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in RunDir(path).metrics()]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adam"])
@pytest.mark.parametrize("die_at", [0, 3, 13, 29])
def test_resume_is_exact(tmp_path, monkeypatch, optimizer, die_at):
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", 0.0)  # a state after every step, also amid an epoch
    plan = Plan(lr=0.02, epochs=5, batch_size=6, optimizer=optimizer, warmup=0.1, augment="shift")
    whole = make(tmp_path / "whole", plan=plan)
    figures = whole.fit()
    broken = make(tmp_path / "parts", plan=plan, loss=stopping(die_at))
    with pytest.raises(Stopped):
        broken.fit()
    resumed = make(tmp_path / "parts", plan=plan)
    assert resumed.restore() == (die_at > 0) and resumed.step == die_at
    again = resumed.fit()
    assert_same(whole.network, resumed.network)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    same = ("loss", "top1", "epoch", "step", "lr")
    assert {k: again[k] for k in same} == {k: figures[k] for k in same}


def test_metrics_written_after_the_last_state_are_dropped_on_resume(tmp_path):
    whole = make(tmp_path / "whole")
    whole.fit()
    broken = make(tmp_path / "parts", loss=stopping(20))  # epochs of 6 steps: the last state is that of step 18
    with pytest.raises(Stopped):
        broken.fit()
    RunDir(tmp_path / "parts").log({"epoch": 4, "loss": -1.0})  # as if it had died between the record and the state
    resumed = make(tmp_path / "parts")
    assert resumed.restore() and resumed.step == 18
    resumed.fit()
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert_same(whole.network, resumed.network)


def test_the_loss_falls_and_figures_are_means_over_the_epoch(tmp_path):
    seen: list[float] = []

    def spying(view, batch):
        figures = objective(view, batch)
        seen.append(float(figures["loss"].detach()))
        return figures

    plan = Plan(lr=0.05, epochs=12, batch_size=6)
    made = make(tmp_path, loss=spying, plan=plan)
    made.fit()
    logged = records(tmp_path)
    assert [r["epoch"] for r in logged] == list(range(1, 13))
    for at, record in enumerate(logged):
        assert record["loss"] == pytest.approx(sum(seen[6 * at : 6 * at + 6]) / 6, rel=1e-6)
    assert logged[-1]["loss"] < 0.6 * logged[0]["loss"]
    assert logged[-1]["lr"] == plan.lr_at(71, 72, 6)


def test_steps_that_end_amid_an_epoch(tmp_path):
    made = make(tmp_path, plan=Plan(lr=0.05, steps=8, batch_size=6), on_epoch=lambda epoch, view: {"seen": epoch})
    figures = made.fit()
    assert figures["steps"] == 8 and figures["epoch"] == 2 and figures["seen"] == 2
    assert [("seen" in r) for r in records(tmp_path)] == [False, True]


def test_evaluation_sees_the_present_weights_and_leaves_training_alone(tmp_path):
    plain = make(tmp_path / "a")
    plain.fit()
    frozen_sums = []

    def look(epoch, view):
        assert not view.module.training and not any(p.requires_grad for p in view.module.parameters())
        now = sum(float(p.double().sum()) for p in watched.network.state_dict().values())
        frozen_sums.append((sum(float(p.double().sum()) for p in view.module.state_dict().values()), now))
        return {}

    watched = make(tmp_path / "b", on_epoch=look, eval_every=2)
    watched.fit()
    assert len(frozen_sums) == 3 and all(a == b for a, b in frozen_sums)  # epochs 2, 4 and the last
    assert len({a for a, _ in frozen_sums}) == 3
    assert_same(plain.network, watched.network)


def test_torch_generator_is_left_alone(tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    made = make(tmp_path)
    made.fit()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_names_the_step_and_keeps_the_last_state(tmp_path, bad):
    calls = iter(range(100))

    def loss(view, batch):
        figures = objective(view, batch)
        if next(calls) == 14:
            figures["loss"] = figures["loss"] * bad
        return figures

    made = make(tmp_path, loss=loss, description="distill x")
    rate = made.plan.lr_at(14, made.total, 6)
    with pytest.raises(
        NonFiniteError, match=rf"distill x: the loss is not finite at step 14 of 30 \(lr {rate:.3g}\)"
    ) as e:
        made.fit()
    assert "lower lr" in str(e.value) and "state of step 12 is kept" in str(e.value)
    assert [r["epoch"] for r in records(tmp_path)] == [1, 2]
    resumed = make(tmp_path)
    assert resumed.restore() and resumed.step == 12
    assert math.isfinite(resumed.fit()["loss"])


def test_nan_without_any_state(tmp_path):
    made = make(tmp_path, plan=Plan(lr=1e30, schedule="constant", epochs=3, batch_size=6))
    with pytest.raises(NonFiniteError, match="no result was written"):
        made.fit()
    assert not (tmp_path / "state").exists()


# --- the state files --------------------------------------------------------------------------------------------------


def trained_pair():
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.rand(4, 1, 8, 8)).sum().backward()
    optimizer.step()
    return net, optimizer


def test_state_files_hold_no_pickle_and_a_torn_one_does_not_count(tmp_path):
    store = StateStore(tmp_path / "state")
    net, optimizer = trained_pair()
    assert store.newest() is None and store.load(net, optimizer) is None
    for step in (4, 8, 12):
        store.save(step, net, optimizer, {"note": step})
    assert store.steps() == [8, 12]
    assert sorted(p.suffix for p in store.path.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]
    (store.path / "00000012.json").unlink()  # killed between the two files
    other, fresh = network(), None
    fresh = torch.optim.AdamW(other.parameters(), lr=0.5)
    meta = store.load(other, fresh)
    assert meta is not None and meta["step"] == 8 and meta["note"] == 8
    assert_same(net, other)
    assert json.dumps(fresh.state_dict()["param_groups"]) == json.dumps(optimizer.state_dict()["param_groups"])
    for a, b in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    store.clear()
    assert store.steps() == []


def test_state_of_another_network_is_refused(tmp_path):
    store = StateStore(tmp_path)
    store.save(1, *trained_pair(), {})
    other = nn.Linear(2, 2)
    with pytest.raises(RunError, match="belongs to another network"):
        store.load(other, torch.optim.SGD(other.parameters(), lr=0.1))


def test_buffers_are_restored_in_the_layout_of_their_parameters(tmp_path):
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    net(torch.rand(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    store = StateStore(tmp_path)
    store.save(1, net, optimizer, {})
    store.load(net, optimizer)
    assert net.weight.is_contiguous(memory_format=torch.channels_last)
    buffer = optimizer.state[net.weight]["momentum_buffer"]
    assert buffer.stride() == net.weight.stride()
