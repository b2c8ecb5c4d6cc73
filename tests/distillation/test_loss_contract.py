"""What every loss of the table promises, on the features of real networks."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn

from synthkit import tables
from synthkit.distillation.contract import Batch, Look, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.objective import Distillation, drawer
from synthkit.distillation.pulls import gradient_norms
from synthkit.models.bn_stats import running_statistics_kept
from synthkit.models.build import build_model
from synthkit.models.taps import TapSet
from synthkit.models.view import ModelView, TeacherView

CLASSES, ROWS = 5, 12
NAMES = sorted(tables.LOSSES)


def views() -> tuple[ModelView, TeacherView]:
    """A student and a wider teacher of colour images of 16 x 16."""
    common = {"input_size": (3, 16, 16), "num_classes": CLASSES}
    networks = [build_model(name, num_classes=CLASSES, image_size=16, seed=3) for name in ("resnet8", "resnet14x2")]
    student, teacher = networks
    return (
        ModelView(student, [0.5] * 3, [0.25] * 3, name="student", **common),
        TeacherView(teacher, [0.5] * 3, [0.25] * 3, name="teacher", **common),
    )


class Scene:
    """A loss set up on both networks, and what one batch shows."""

    def __init__(self, name: str, seed: int = 0):
        self.student, self.teacher = views()
        self.loss: Loss = tables.lookup("loss", name)()
        needs = self.loss.requires
        self.taps, self.teacher_taps = TapSet(self.student, needs.student), TapSet(self.teacher, needs.teacher)
        generator = torch.Generator().manual_seed(5)
        self.images = torch.rand(ROWS, 3, 16, 16, generator=generator)
        self.labels = torch.arange(ROWS) % CLASSES
        self.loss.setup(
            Setup(
                student=self.taps.shapes, teacher=self.teacher_taps.shapes, num_classes=CLASSES, batch_size=ROWS,
                epochs=2, images=40, student_points=self.taps.names, student_classifier=self.student.classifier,
                teacher_classifier=self.teacher.classifier, bank_labels=torch.arange(40) % CLASSES, seed=seed,
            )
        )  # fmt: skip

    def taught(self, rows: slice = slice(None)) -> Taps:
        with torch.no_grad():
            taps = self.teacher_taps(self.images[rows])
        members = [taps.logits, 0.5 * taps.logits] if self.loss.requires.teachers > 1 else None
        return dataclasses.replace(taps, members=members)

    def looks(self):
        yield Look(teacher=self.taught(), labels=self.labels, index=torch.arange(ROWS))

    def batch(self, rows: slice = slice(None)) -> Batch:
        return Batch(
            images=self.images[rows], labels=self.labels[rows], index=torch.arange(ROWS)[rows], epoch=1.0,
            progress=0.5, draw=drawer(0, 7),
        )  # fmt: skip

    def values(self, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        return self.loss(self.taps(self.images[rows]), self.taught(rows), self.batch(rows))


@pytest.mark.parametrize("name", NAMES)
def test_config_and_needs(name):
    kind = tables.lookup("loss", name)
    config = kind.Config()
    assert issubclass(kind, Loss) and isinstance(kind().requires, LossNeeds) and kind.beta > 0
    assert kind.Config(**dataclasses.asdict(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.temperature = 2.0


@pytest.mark.parametrize("name", NAMES)
def test_a_step(name):
    before = torch.random.get_rng_state()
    scene = Scene(name)
    assert torch.equal(before, torch.random.get_rng_state())  # weights come from the seed alone
    scene.loss.prepare(scene.looks)
    found = scene.values()
    assert found and all(v.shape in ((ROWS,), ()) and torch.isfinite(v).all() for v in found.values())
    if any(v.ndim == 0 for v in found.values()):
        assert scene.loss.requires.relational
    torch.stack([v.mean() for v in found.values()]).sum().backward()
    moved = [p for p in scene.student.module.parameters() if p.grad is not None and bool(p.grad.any())]
    assert moved and all(bool(torch.isfinite(p.grad).all()) for p in moved if p.grad is not None)
    assert all(p.grad is None for p in scene.teacher.module.parameters())
    for network in (scene.student.module, scene.teacher.module):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize("name", NAMES)
def test_a_look_at_the_gradients_leaves_no_trace(name):
    scene = Scene(name)
    needs = scene.loss.requires
    if needs.teachers > 1:
        return  # the scene has no ensemble
    scene.loss.prepare(scene.looks)
    parts = nn.ModuleDict({"student": scene.student.module, **({"aux": scene.loss.aux} if scene.loss.aux else {})})
    before = {k: v.clone() for k, v in parts.state_dict().items()}
    objective = Distillation(scene.loss, scene.taps, scene.teacher_taps)
    with torch.random.fork_rng(), running_statistics_kept(parts):
        norms = gradient_norms(objective, scene.student.module, scene.batch())
    assert norms and sum(norms.values()) > 0
    assert all(torch.equal(v, before[k]) for k, v in parts.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_modules(name):
    first, again, other = Scene(name, 1).loss.aux, Scene(name, 1).loss.aux, Scene(name, 2).loss.aux
    if first is None:
        assert again is None
        return
    assert again is not None and other is not None
    states = [module.state_dict() for module in (first, again, other)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    if any(True for _ in first.parameters()):
        assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_found_before_the_first_step_is_stored(name):
    """A killed run restores its modules and does not prepare again."""
    scene = Scene(name)
    if scene.loss.aux is None:
        return
    keys = {k: v.shape for k, v in scene.loss.aux.state_dict().items()}
    scene.loss.prepare(scene.looks)
    state = scene.loss.aux.state_dict()
    assert {k: v.shape for k, v in state.items()} == keys
    other = Scene(name, seed=9)
    assert other.loss.aux is not None
    other.loss.aux.load_state_dict(state)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = scene.values()
        torch.manual_seed(0)
        again = other.values()
    assert all(torch.equal(found[k], again[k]) for k in found)


@pytest.mark.parametrize("name", NAMES)
def test_only_relational_losses_compare_samples(name):
    scene = Scene(name)
    if scene.loss.requires.relational or scene.loss.requires.index:
        return
    scene.loss.prepare(scene.looks)
    for module in (scene.student.module, scene.loss.aux or nn.Identity()):
        module.eval()  # BatchNorm apart, which compares samples whatever the loss
    with torch.random.fork_rng():
        whole, part = scene.values(), scene.values(slice(0, 5))
    for key, value in whole.items():
        torch.testing.assert_close(part[key], value[:5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bf16(name):
    scene = Scene(name)
    scene.loss.prepare(scene.looks)
    with torch.autocast("cpu", torch.bfloat16):
        found = scene.values()
        total = torch.stack([v.float().mean() for v in found.values()]).sum()
    total.backward()
    assert bool(torch.isfinite(total))


@pytest.mark.parametrize("name", NAMES)
def test_documentation(name):
    module = importlib.import_module(tables.LOSSES[name].partition(":")[0])
    members = [m for m in vars(module).values() if getattr(m, "__module__", "") == module.__name__]
    texts = [inspect.getdoc(m) or "" for m in members if callable(m)]
    words = ("Shapes:", "Source:", "Differs from source:", "Cost:")
    full = [text for text in texts if all(word in text for word in words)]
    assert full, f"no docstring with {words}"
    assert [full[0].index(word) for word in words] == sorted(full[0].index(word) for word in words)
    assert doctest.testmod(module).failed == 0
    assert len(inspect.getsource(module).splitlines()) <= 200


def test_loss_files_do_not_import_torch():
    modules = ", ".join(path.partition(":")[0] for path in tables.LOSSES.values())
    code = f"import {modules}, synthkit.distillation.protocols, synthkit.cli.distill, synthkit.cli.teach, sys; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
