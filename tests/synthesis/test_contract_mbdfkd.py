"""MB-DFKD under the contract of all synthesis methods, and what its docstring promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import SynthesizerContract

from synthesis.tiny import task
from synthkit.errors import ConfigError
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.mbdfkd import MBDFKD, CyclicMemory, MBDFKDConfig

SMALL: dict[str, Any] = {
    "epochs": 4, "ep_steps": 4, "kd_steps": 2, "batch_size": 16, "nz": 8, "width": 4, "push_every": 1, "capacity": 2,
    "student": "convnet_d1_w8_bn",
}  # fmt: skip


class TestMBDFKD(SynthesizerContract):
    name = "mbdfkd"
    options = {**SMALL, "epochs": 3, "ep_steps": 2, "batch_size": 8}
    engine_options = {**SMALL, "epochs": 3, "ep_steps": 2, "batch_size": 8, "student": "lenet5_half", "snapshots": 1}
    inner = {"student_step": (4,)}
    arrivals = (9,)
    falling = ("g_loss", "kd")
    longer = {"epochs": 4, "ep_steps": 12, "batch_size": 16, "lr": 0.05, "adv": 0.0}


def build(*, curriculum: str = "none", **settings: Any) -> MBDFKD:
    return MBDFKD(MBDFKDConfig(**{**SMALL, **settings}), task(curriculum=Curriculum.named(curriculum)))


def learned_by(method: MBDFKD, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The images of every student step from now on."""
    seen: list[torch.Tensor] = []
    learn = method.learn
    monkeypatch.setattr(method, "learn", lambda images: seen.append(images) or learn(images))
    return seen


def run_epochs(method: MBDFKD, epochs: int) -> None:
    while method.epoch < epochs:
        method.cycle()


def test_the_first_images_of_an_epochs_last_step_are_remembered_and_rehearsed(monkeypatch):
    method = build(memory_share=0.25, push_every=2, capacity=3)
    seen = learned_by(method, monkeypatch)
    run_epochs(method, 4)
    # epochs 0 and 2 are remembered; from epoch 1 on every step rehearses
    assert [len(images) for images in seen] == [16] * 4 + [20] * 12
    kept = [seen[3][:4].half(), seen[11][:4].half()]
    assert all(torch.equal(a, b) for a, b in zip(method.replay.entries, kept, strict=True))
    for images in seen[4:12]:
        assert torch.equal(images[16:], kept[0].float())
    second = [torch.equal(images[16:], kept[1].float()) for images in seen[12:]]
    assert all(b or torch.equal(images[16:], kept[0].float()) for b, images in zip(second, seen[12:], strict=True))


def test_every_entry_is_drawn_about_equally_often():
    method = build()
    for value in (0.0, 1.0):
        method.replay.push(torch.full((2, 3, 8, 8), value))
    drawn = []
    for step in range(400):
        method.step = step
        entry = method.recall()
        assert entry is not None
        drawn.append(entry[0, 0, 0, 0])
    assert 0.4 < float(torch.stack(drawn).float().mean()) < 0.6


def test_recall_is_a_function_of_the_step_alone():
    one, other = build(), build()
    for method in (one, other):
        for value in range(2):
            method.replay.push(torch.full((2, 3, 8, 8), float(value)))
    for _ in range(2):
        other.recall()
    for step in range(20):
        one.step = other.step = step
        a, b = one.recall(), other.recall()
        assert a is not None and b is not None and torch.equal(a, b)


def test_memory_survives_its_state_with_a_plain_layout():
    """Channels-last images are stored plainly, as a resumed run finds them."""
    memory, again = CyclicMemory(2), CyclicMemory(2)
    for seed in range(3):
        images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        memory.push(images.to(memory_format=torch.channels_last))
    again.load(memory.state(), torch.device("cpu"))
    assert again.pushes == 3 and len(again.entries) == 2
    for a, b in zip(memory.entries, again.entries, strict=True):
        assert torch.equal(a, b) and a.is_contiguous() and a.dtype == torch.float16
    empty = CyclicMemory(2)
    empty.load({"pushes": 0}, torch.device("cpu"))
    assert empty.entries == []


def test_pushed_images_are_copies():
    memory, images = CyclicMemory(1), torch.zeros(2, 1, 2, 2, dtype=torch.float16)
    memory.push(images)
    images.fill_(1)
    assert (memory.entries[0] == 0).all()


def test_curriculum_weighs_rehearsed_samples_as_well(monkeypatch):
    method = build(curriculum="easy2hard", memory_share=0.25)
    run_epochs(method, 1)
    seen = learned_by(method, monkeypatch)
    sizes: list[int] = []
    loss = method.student_loss
    monkeypatch.setattr(method, "student_loss", lambda losses: sizes.append(len(losses)) or loss(losses))
    method.cycle()
    assert sizes == [20, 20] == [len(images) for images in seen]


@pytest.mark.parametrize("setting", ["capacity", "push_every"])
def test_settings_out_of_range(setting):
    with pytest.raises(ConfigError, match=f"{setting} must be at least 1"):
        settings: dict[str, Any] = {setting: 0}
        MBDFKDConfig(**settings)
