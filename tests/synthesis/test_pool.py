"""The loop with a memory bank: when it synthesises, what the student sees, what it carries and reads back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import frozen_copy
from workshop import save_teacher, shard_hashes

from synthesis.tiny import task
from synthkit import tables
from synthkit.bank import Bank
from synthkit.config.parse import parse_config
from synthkit.errors import ConfigError
from synthkit.synthesis.base import to_uint8
from synthkit.synthesis.engine import synthesize
from synthkit.synthesis.generator.config import PoolConfig
from synthkit.synthesis.generator.pool import PoolLoop

SMALL: dict[str, Any] = {
    "epochs": 4, "ep_steps": 5, "batch_size": 8, "synthesis_batch": 6, "g_steps": 3, "student": "convnet_d1_w8_bn",
}  # fmt: skip


class Flat(PoolLoop):
    """Noise around the grey level of the call: rows tell which call they are of.

    Source: none.
    Cost: none.
    """

    def synthesise(self, call: int):
        size = (self.config.synthesis_batch, *self.teacher.input_size)
        noise = torch.rand(size, generator=self.task.rng(f"call-{call}-noise"))
        labels = torch.arange(self.config.synthesis_batch) % self.teacher.num_classes
        return (noise + call) / 16, labels


def build(images: int = 20, **settings: Any) -> Flat:
    return Flat(PoolConfig(**{**SMALL, **settings}), task(images=images))


def calls_at(method: Flat) -> list[int]:
    """Student steps done before every call."""
    found, honest = [], method.synthesise

    def spied(call: int):
        found.append(method.learned)
        return honest(call)

    method.synthesise = spied  # type: ignore[method-assign]  # a spy
    list(method.generate())
    return found


def test_calls_are_spread_evenly():
    assert calls_at(build()) == [0, 5, 10, 15]
    assert calls_at(build(warmup=0.5)) == [0, 0, 0, 10]
    assert calls_at(build(warmup=1.0)) == [0, 0, 0, 0]
    assert calls_at(build(images=1)) == [0]


def test_more_calls_than_student_steps():
    assert calls_at(build(images=48, epochs=1, ep_steps=3)) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_the_student_sees_what_was_made_so_far_and_nothing_else():
    method, seen = build(augment="none"), []
    honest = method.learn
    method.learn = lambda images: (seen.append(images), honest(images))[1]  # type: ignore[method-assign]
    list(method.generate())
    for step, images in enumerate(seen):
        levels = images.float().amax((1, 2, 3)) / 255 if images.dtype == torch.uint8 else images.amax((1, 2, 3))
        assert levels.max() * 16 <= step // 5 + 1 + 0.1  # calls 0 ... step // 5
    newest = torch.stack([images.float().amax() for images in seen[15:]]).max()
    assert newest > torch.stack([images.float().amax() for images in seen[:5]]).max()


def test_the_memory_is_what_is_yielded():
    method = build()
    batches = [batch for batch in method.generate() if batch is not None]
    assert [len(b.images) for b in batches] == [6, 6, 6, 2]
    assert torch.equal(torch.cat([b.images for b in batches]), method.memory)
    expected = torch.cat([to_uint8(method.synthesise(call)[0]) for call in range(4)])[:20]
    assert torch.equal(method.memory, expected)


def test_a_batch_is_yielded_when_its_student_steps_are_done():
    steps = [batch.step for batch in build().generate() if batch is not None]
    assert steps == [3 + 5, 6 + 10, 9 + 15, 12 + 20]


def test_adversary_is_off_in_the_warm_up():
    method, weights = build(warmup=0.5, adv=2.0, grad_adv=0.0), []
    honest = method.synthesise
    method.synthesise = lambda call: (weights.append(method.adversarial_weight(0)), honest(call))[1]  # type: ignore
    list(method.generate())
    assert weights == [0, 0, 2, 2]


def test_state_leaves_the_memory_to_the_bank():
    method = build()
    stream = method.generate()
    kept = []
    while len(kept) < 2:
        batch = next(stream)
        kept += [] if batch is None else [batch]
    next(stream)  # a safe point: the third batch is made, and not yielded
    stored = torch.cat([batch.images for batch in kept])
    method.task.earlier = lambda n: stored[:n]
    state = frozen_copy(method.state_dict())
    assert "memory" not in state
    again = build()
    again.task.earlier = lambda n: stored[:n]
    again.load_state_dict(state)
    assert torch.equal(again.memory, method.memory) and again.remembered == 18


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="no such policy"):
        PoolConfig(augment="crop_flop")
    with pytest.raises(ConfigError, match="warmup"):
        PoolConfig(warmup=1.5)


@pytest.mark.parametrize("per_shard", [4, 9, 20])
@pytest.mark.parametrize("dies", ["learn", "_call"])
def test_killed_runs_read_their_memory_back_from_the_bank(tmp_path, monkeypatch, per_shard, dies):
    monkeypatch.setitem(tables.METHODS, "flat", f"{__name__}:Flat")
    teacher = save_teacher(tmp_path / "teacher")
    monkeypatch.setattr("synthkit.synthesis.run.SAFE_POINT_SECONDS", 0.0)

    def config(out: str):
        method = {"name": "flat", **SMALL, "student": "lenet5_half"}
        values = {"teacher": str(teacher), "method": method, "images": 20, "images_per_shard": per_shard}
        return parse_config("synthesize", {**values, "out": str(tmp_path / out), "resume": True})

    synthesize(config("whole"))

    class Killed(BaseException):
        pass

    honest = getattr(Flat, dies)
    for nth in {"learn": (2, 3, 1), "_call": (1, 1)}[dies]:
        left = [nth]

        def dying(self, *args, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return honest(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Flat, "estimate", lambda self: {"seconds": 0.0, "memory_bytes": 0.0})
            patch.setattr(Flat, dies, dying)
            with pytest.raises(Killed):
                synthesize(config("killed"))
    synthesize(config("killed"))
    assert shard_hashes(tmp_path / "killed") == shard_hashes(tmp_path / "whole")
    assert len(Bank(tmp_path / "killed")) == 20
