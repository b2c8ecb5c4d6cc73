"""The tests that every synthesis method inherits.

A method's test file holds a class that derives from `SynthesizerContract` and says how to run the method in a fraction
of a second; `test_every_method_has_its_contract` fails for a method of the table that has none.

    class TestCuDFKD(SynthesizerContract):
        name = "cudfkd"
        options = {"epochs": 4, ...}
"""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from synthesis.tiny import task, teacher_view
from workshop import save_teacher, shard_hashes

from synthkit import tables
from synthkit.bank import Bank, BankWriter
from synthkit.config.fields import describe
from synthkit.config.parse import config_to_dict, dump_config, parse_config
from synthkit.synthesis import engine, run
from synthkit.synthesis.base import (
    ImageBatch,
    Requires,
    Synthesizer,
    flatten_state,
    makes_of,
    requirements,
    unflatten_state,
)
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.record import RunRecord
from synthkit.synthesis.shards import ShardRun

SECTIONS = ("Source:", "Cost:")
COLUMNS = ("images", "labels", "logits", "difficulty", "pixels")
ROOT = Path(__file__).parents[1]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package may catch it."""


def frozen_copy(state: dict[str, Any]) -> dict[str, Any]:
    """A state as the bank brings it back: tensors through contiguous arrays, the rest through plain values."""
    tensors, plain = flatten_state(state)
    arrays = {key: np.array(value.cpu().contiguous().numpy()) for key, value in tensors.items()}
    return unflatten_state({key: torch.from_numpy(value.copy()) for key, value in arrays.items()}, plain)


def equal_batches(left: ImageBatch, right: ImageBatch) -> bool:
    """Whether two batches are equal bit for bit."""
    pairs = [(getattr(left, name), getattr(right, name)) for name in COLUMNS]
    same = [a is None and b is None or a is not None and b is not None and torch.equal(a, b) for a, b in pairs]
    return all(same) and left.step == right.step


def equal_runs(left: list[ImageBatch], right: list[ImageBatch]) -> bool:
    """Whether two runs yielded the same batches."""
    return len(left) == len(right) and all(map(equal_batches, left, right))


def equal_states(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two nested states are equal bit for bit."""
    (a, plain_a), (b, plain_b) = flatten_state(left), flatten_state(right)
    return plain_a == plain_b and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def whole(batches: list[ImageBatch | None]) -> list[ImageBatch]:
    """The batches without the safe points among them."""
    return [batch for batch in batches if batch is not None]


def batches_of(method: Synthesizer) -> list[ImageBatch]:
    """What a run yields, without its safe points."""
    return whole(list(method.generate()))


class SynthesizerContract:
    """Derive from it, set `name` and `options`."""

    name: ClassVar[str]
    """Name in the method table."""
    options: ClassVar[dict[str, Any]]
    """Settings with which the method finishes within about 0.2 s on the tiny teacher (3 x 8 x 8 images)."""
    engine_options: ClassVar[dict[str, Any]]
    """The same for a LeNet-5 teacher (1 x 32 x 32 images), as the engine runs it."""
    falling: ClassVar[tuple[str, ...]] = ()
    """Figures of the log that must be lower at the end of a longer run (`longer`) than at its start."""
    longer: ClassVar[dict[str, Any]] = {}
    """Settings of that longer run."""
    inner: ClassVar[dict[str, tuple[int, ...]]] = {}
    """Functions of the method inside which a run is killed, each at these calls one run after the other."""
    arrivals: ClassVar[tuple[int, ...]] = (9, 12, 11)
    """Of a sequential method: the batches at whose arrival a run is killed, one run after the other."""
    safe_points: ClassVar[tuple[int, ...]] = ()
    """The same for its safe points (the None's that it yields), at each of which the state is stored in these tests."""
    images: ClassVar[int] = 37
    """Images asked for; not a round number, so that remainders are met."""
    of_task: ClassVar[dict[str, Any]] = {}
    """What the task holds besides a teacher (`data`, ...)."""
    of_config: ClassVar[dict[str, Any]] = {}
    """What a config names besides a teacher (`data`, ...)."""

    # ---- parts -----------------------------------------------------------------------------------------------

    @property
    def method(self) -> Any:
        return tables.lookup("method", self.name)

    @property
    def shardable(self) -> bool:
        return requirements(self.method, self.config()).shardable

    def config(self, **overrides: Any) -> Any:
        return self.method.Config(**{**self.options, **overrides})

    def build(self, *, settings: dict[str, Any] | None = None, **of_task: Any) -> Synthesizer:
        return self.method(self.config(**(settings or {})), task(**{"images": self.images, **self.of_task, **of_task}))

    def run(self, **of_task: Any) -> list[ImageBatch]:
        return batches_of(self.build(**of_task))

    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls) -> tuple[Synthesizer, list[ImageBatch]]:
        """One finished run that several tests look at."""
        method = cls().build()
        return method, batches_of(method)

    # ---- config and table ------------------------------------------------------------------------------------

    def test_config_round_trip(self, tmp_path):
        for options in ({}, self.options):
            values = {"teacher": "lenet5_bn", "method": {"name": self.name, **options}, "images": 12, "seed": 3}
            values |= self.of_config
            config = parse_config("synthesize", values)
            assert config.method == self.method.Config(**options)
            assert parse_config("synthesize", config_to_dict(config)) == config
            recipe = tmp_path / "recipe.yaml"
            recipe.write_text(dump_config("synthesize", config))
            assert parse_config("synthesize", ["--config", str(recipe)]) == config

    def test_config_is_frozen_and_keyword_only(self):
        config = self.config()
        assert dataclasses.is_dataclass(config) and dataclasses.fields(config)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, None)
        with pytest.raises(TypeError):
            self.method.Config("positional")

    def test_every_field_and_the_method_are_documented(self):
        texts = describe(self.method.Config)
        undocumented = [f.name for f in dataclasses.fields(self.method.Config) if not texts.get(f.name)]
        assert not undocumented
        text = inspect.getdoc(self.method) or ""
        assert not [section for section in SECTIONS if section not in text]

    def test_import_leaves_torch_out(self):
        """The command line imports a method's file to know its options; that must not cost seconds."""
        module = tables.methods()[self.name].partition(":")[0]
        code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

    def test_declares_what_it_requires(self):
        assert isinstance(requirements(self.method, self.config()), Requires)

    # ---- what flows ------------------------------------------------------------------------------------------

    def test_exact_number_of_images(self):
        for images in (1, self.images):
            assert sum(len(batch.images) for batch in self.run(images=images)) == images

    def test_images(self, finished):
        method, batches = finished
        for batch in batches:
            assert batch.images.shape[1:] == (3, 8, 8) and len(batch.images) > 0
            if batch.images.dtype != torch.uint8:
                assert batch.images.is_floating_point()
                assert batch.images.min() >= 0 and batch.images.max() <= 1
        pixels = torch.cat([batch.images for batch in batches])
        assert pixels.float().std() > 0, "all images are one flat grey"
        assert len(torch.unique(pixels.flatten(1), dim=0)) > 0.9 * len(pixels), "the same image again and again"

    def test_columns_fit_the_images(self, finished):
        _, batches = finished
        for batch in batches:
            n = len(batch.images)
            if batch.labels is not None:
                assert batch.labels.shape == (n,) and not batch.labels.is_floating_point()
                assert batch.labels.min() >= 0 and batch.labels.max() < 10
            if batch.logits is not None:
                assert batch.logits.shape == (n, 10) and torch.isfinite(batch.logits).all()
            if batch.difficulty is not None:
                assert batch.difficulty.shape == (n,) and torch.isfinite(batch.difficulty).all()
                assert (batch.difficulty >= 0).all()
        steps = [batch.step for batch in batches]
        assert steps == sorted(steps) and steps[-1] <= finished[0].total_steps

    def test_labels_and_logits_are_the_teachers_on_the_stored_image(self, finished):
        method, batches = finished
        stored = torch.cat([b.images for b in batches])
        with torch.no_grad():
            truth = method.task.teacher(stored).float()
        if batches[0].logits is not None:
            logits = torch.cat([b.logits for b in batches])
            torch.testing.assert_close(logits.half().float(), truth, rtol=2e-3, atol=2e-3)
        if batches[0].labels is not None and makes_of(self.method, method.config).label_kind == "argmax":
            labels = torch.cat([b.labels for b in batches])
            top = truth.topk(2).values
            clear = top[:, 0] - top[:, 1] > 1e-4  # a tie may be broken either way in another batch size
            assert clear.float().mean() > 0.9
            assert torch.equal(labels[clear], truth.argmax(1)[clear])

    def test_progress_reaches_the_end(self):
        ticks: list[int] = []
        method = self.build(tick=ticks.append)
        assert method.step == 0
        steps = [method.step for _ in method.generate()]
        assert steps == sorted(steps) and steps[0] > 0
        assert steps[-1] == method.total_steps, "the engine stops at the last image: what would follow is never run"
        assert method.step == method.total_steps == sum(ticks)

    # ---- randomness ------------------------------------------------------------------------------------------

    def test_same_seed_same_bytes(self, finished):
        _, batches = finished
        assert equal_runs(self.run(), batches)

    def test_other_seed_other_bytes(self, finished):
        _, batches = finished
        other = torch.cat([b.images for b in self.run(seed=1)])
        assert not torch.equal(other, torch.cat([b.images for b in batches]))

    def test_global_generators_are_neither_used_nor_touched(self, finished):
        _, batches = finished
        torch.manual_seed(1234)
        np.random.seed(1234)
        random.seed(1234)
        before = torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()
        again = self.run()
        after = torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
        assert equal_runs(again, batches)

    # ---- training --------------------------------------------------------------------------------------------

    def test_loss_falls(self):
        if not self.falling:
            return
        records: list[dict[str, float]] = []
        method = self.build(
            settings=self.longer, log=records.append, curriculum=Curriculum.named("none"), images=self.images
        )
        list(method.generate())
        assert len(records) > 1
        for name in self.falling:
            first, last = records[0][name], records[-1][name]
            assert last < first, f"{name} went from {first:.4g} to {last:.4g}"

    def test_teacher_is_left_as_it_was(self):
        view = teacher_view()
        before = {key: value.clone() for key, value in view.module.state_dict().items()}
        method = self.build(teachers=[view])
        for _ in method.generate():
            pass
        method.estimate()
        after = view.module.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
        for module in view.module.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
            assert "forward" not in vars(module), "a replaced forward was left on the teacher"
            assert not module.training
        for parameter in view.module.parameters():
            assert parameter.grad is None and not parameter.requires_grad

    def test_student_is_trained(self):
        method = self.build()
        student = method.student()
        if student is None:
            return
        before = {key: value.clone() for key, value in student.module.state_dict().items()}
        list(method.generate())
        trained = method.student()
        assert trained is not None
        after = trained.module.state_dict()
        weights = [k for k, _ in trained.module.named_parameters()]
        assert all(not torch.equal(before[k], after[k]) for k in weights)
        assert all(bool(torch.isfinite(v).all()) for v in after.values())

    def test_snapshot_rebuilds_its_generator(self, finished):
        from synthkit.models.generators import build_generator

        method, _ = finished
        snapshot = method.snapshot()
        if snapshot is None:
            return
        network = build_generator(**snapshot.spec, seed=0)
        network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in snapshot.state.items()})
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            images = network.eval()(torch.randn(4, *network.latent_shape, generator=draw))
        assert images.shape == (4, 3, 8, 8) and torch.isfinite(images).all()
        assert snapshot.step == method.total_steps

    # ---- state -----------------------------------------------------------------------------------------------

    def test_resume_at_any_yield(self):
        """From every yield on, the continuation is the same bit for bit, and so is where it ends."""
        method = self.build()
        batches, states = [], []
        for batch in method.generate():
            batches.append(batch)
            states.append(frozen_copy(method.state_dict()))
        safe = [batch is None for batch in batches]
        end = frozen_copy(method.state_dict())
        for k in range(0, len(states), max(1, len(states) // 12)):
            again = self.build()
            again.load_state_dict(states[k])
            assert equal_states(frozen_copy(again.state_dict()), states[k]), f"state {k} is not taken over whole"
            rest = list(again.generate())
            assert [batch is None for batch in rest] == safe[k + 1 :]
            assert equal_runs(whole(rest), whole(batches[k + 1 :])), f"the continuation of yield {k} differs"
            assert equal_states(frozen_copy(again.state_dict()), end), f"the end after yield {k} differs"

    def test_state_is_a_function_of_the_run_alone(self):
        """Asking for the state, the student or a snapshot at every yield changes nothing."""
        curious = self.build()
        batches = []
        for batch in curious.generate():
            curious.state_dict(), curious.student(), curious.snapshot()
            batches.append(batch)
        assert equal_runs(whole(batches), self.run())

    def test_estimate_changes_nothing(self, finished):
        method = self.build()
        before = frozen_copy(method.state_dict())
        estimate = method.estimate()
        assert estimate["seconds"] > 0 and estimate["memory_bytes"] > 0
        assert equal_states(frozen_copy(method.state_dict()), before)
        assert equal_runs(batches_of(method), finished[1])

    # ---- curriculum ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("curriculum", sorted(tables.CURRICULA))
    def test_every_curriculum_runs(self, curriculum):
        batches = self.run(curriculum=Curriculum.named(curriculum))
        assert sum(len(batch.images) for batch in batches) == self.images

    # ---- independent shards ----------------------------------------------------------------------------------

    def test_a_shard_alone_equals_its_part_of_the_whole(self):
        """Shard by shard, in any order and by fresh instances: a pure function of (seed, index)."""
        if not self.shardable:
            return
        every = torch.cat([batch.images for batch in self.run(images_per_shard=10)])
        for index in (2, 0, 3, 1):
            count = min(10, self.images - 10 * index)
            batches = list(self.build(images_per_shard=10).generate_shard(index, count))  # type: ignore[attr-defined]
            assert torch.equal(torch.cat([batch.images for batch in batches]), every[10 * index : 10 * index + count])

    # ---- under the engine ------------------------------------------------------------------------------------

    def engine_config(self, folder: Path, out: str, **overrides: Any) -> Any:
        """The config of a run with five shards of a LeNet-5 teacher that lies in `folder`."""
        card = folder / "teacher" / "card.yaml"
        if not card.exists():
            save_teacher(card.parent)
        values = {
            "teacher": str(card),
            "method": {"name": self.name, **self.engine_options},
            "images": 44,
            "images_per_shard": 10,
            "out": str(folder / out),
            "runtime": {"device": "cpu", "threads": torch.get_num_threads()},
        }
        return parse_config("synthesize", {**values, **self.of_config, **overrides})

    def test_killed_and_resumed_equals_uninterrupted(self, tmp_path, monkeypatch):
        unbroken = shard_hashes(engine.synthesize(self.engine_config(tmp_path, "whole")).path)
        assert sorted(unbroken) == [0, 1, 2, 3, 4]
        independent = {
            "while a shard is made": (self.method, "make_batch", (3, 4, 2)),
            "before a shard": (ShardRun, "_take", (2, 2, 2)),
            "between shard and record": (BankWriter, "_check_claim", (4, 2, 2)),
            "after a shard": (RunRecord, "progress", (1, 2, 1)),
        }
        sequential = {
            "as images arrive": (engine.Run, "_take", self.arrivals),
            "before a state within a shard": (BankWriter, "save_progress", self.safe_points),
            "after a state within a shard": (RunRecord, "progress", self.safe_points),
            "before a state": (engine.Run, "_save_state", (1, 2, 2)),
            "between state and shard": (BankWriter, "write_shard", (1, 2, 2)),
            "after a shard": (BankWriter, "prune_states", (1, 2, 1)),
        }
        places = independent if self.shardable else sequential
        monkeypatch.setattr(run, "SAFE_POINT_SECONDS", 0)
        places = {moment: place for moment, place in places.items() if place[2]}
        places |= {f"in {name}": (self.method, name, calls) for name, calls in self.inner.items()}
        for number, (moment, (owner, function, calls)) in enumerate(places.items()):
            config = self.engine_config(tmp_path, f"killed{number}")
            for nth in calls:
                with monkeypatch.context() as patch, pytest.raises(Killed):
                    patch.setattr(owner, function, dies_at(getattr(owner, function), nth))
                    engine.synthesize(config)
                config = self.engine_config(tmp_path, f"killed{number}", resume=True)
                report = Bank(config.out).verify(deep=True)
                assert report.ok, f"killed {moment}: {report.problems}"
            bank = engine.synthesize(config)
            assert shard_hashes(bank.path) == unbroken, f"killed {moment}"
            assert bank.complete and bank.verify(deep=True).ok


def dies_at(function: Any, nth: int) -> Any:
    """`function`, which at its call number `nth` (from 1) raises `Killed` instead of returning to its caller."""
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise Killed
        return function(*args, **kwargs)

    return dying
