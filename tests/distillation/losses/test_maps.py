"""What the map losses share, and what all eight promise: documents, options, a real student that learns."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from distillation.losses.map_cases import build, close, random_maps, taps
from synthkit import tables
from synthkit.distillation.contract import Batch, Look, Setup
from synthkit.distillation.losses.maps import attention, pairs, pool_to_smaller, regressor, widen
from synthkit.errors import ConfigError
from synthkit.models.build import build_model
from synthkit.models.taps import TapSet
from synthkit.models.view import ModelView, TeacherView

BETAS = {"ab": 1, "at": 1000, "fitnet": 100, "ft": 200, "nst": 50, "reviewkd": 1, "sp": 3000, "vid": 1}  # method cards
DOCUMENTED = {"ab": "boundary_loss", "fitnet": "hint_loss", "reviewkd": "ReviewKD"}


def test_pooling():
    big, small = random_maps((2, 3, 8, 4), (2, 5, 2, 4))
    for first, second in ((big, small), (small, big)):
        a, b = pool_to_smaller(first, second)
        assert a.shape[2:] == b.shape[2:] == (2, 4)
        assert any(x is small for x in (a, b))  # the smaller one is not touched
    close(pool_to_smaller(big, small)[0], big.unflatten(2, (2, 4)).mean(dim=3))
    wide, tall = random_maps((1, 1, 2, 6), (1, 1, 4, 3))
    assert [f.shape[2:] for f in pool_to_smaller(wide, tall)] == [(2, 3), (2, 3)]


def test_stages_are_paired_from_the_start():
    assert pairs([1, 2, 3], [4, 5]) == [(1, 4), (2, 5)] and pairs([1], [4, 5]) == [(1, 4)]


def test_attention_has_unit_norm_and_survives_zeros():
    f, _ = random_maps((3, 4, 2, 5), (1, 1, 1, 1))
    close(attention(f).norm(dim=1), torch.ones(3, dtype=torch.float64))
    zeros = torch.zeros(1, 4, 2, 2, requires_grad=True)
    attention(zeros).sum().backward()
    assert zeros.grad is not None and not zeros.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_of_squares_is_its_formula_with_gradients(dtype):
    """Power 2 has a backward pass of its own."""
    f = random_maps((3, 4, 2, 5), (1, 1, 1, 1))[0].to(dtype).requires_grad_()
    naive = f.detach().clone().requires_grad_()
    weights = torch.rand(3, 10, dtype=torch.float64)
    (attention(f).double() * weights).sum().backward()
    (F.normalize(naive.double().abs().pow(2).mean(1).flatten(1), dim=1) * weights).sum().backward()
    assert f.grad is not None and naive.grad is not None and f.grad.dtype == dtype
    torch.testing.assert_close(f.grad, naive.grad, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(attention, (f,)) and torch.autograd.gradgradcheck(attention, (f,))


def test_widening():
    assert [widen(torch.ones(1, dtype=d)).dtype for d in (torch.bfloat16, torch.float16)] == [torch.float32] * 2
    assert [widen(torch.ones(1, dtype=d)).dtype for d in (torch.float32, torch.float64)] == [
        torch.float32,
        torch.float64,
    ]


def test_regressor_leaves_its_input():
    """Student maps go into several losses: nothing may be changed in place."""
    (f,) = (x.float() for x in random_maps((2, 3, 4, 4)))
    before = f.clone()
    regressor((3, 4, 4), (2, 4, 4))(f)
    assert torch.equal(f, before)


@pytest.mark.parametrize("name", ["at", "nst", "ft"])
def test_maps_of_one_position_are_refused(name):
    """Normalised over positions they are constant: the loss would teach nothing."""
    kind = tables.lookup("loss", name)
    large, point = random_maps((4, 3, 8, 8), (4, 3, 1, 1))
    with pytest.raises(ConfigError, match=f"loss {name} compares positions.*tap earlier"):
        build(kind(), taps([large]), taps([point]))
    build(kind(), taps([point, large]), taps([large, large]))  # one pair is enough


@pytest.mark.parametrize("name", BETAS)
def test_documents_and_options(name):
    module = importlib.import_module(tables.LOSSES[name].partition(":")[0])
    kind = tables.lookup("loss", name)
    text = inspect.getdoc(getattr(module, DOCUMENTED.get(name, f"{name}_loss"))) or ""
    places = [text.index(word) for word in ("Shapes:", "Source:", "Differs from source:", "Cost:")]
    assert places == sorted(places)
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
    assert len(inspect.getsource(module).splitlines()) <= 200
    config = kind.Config()
    assert kind.Config(**dataclasses.asdict(config)) == config and kind.beta == BETAS[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.anything = 1


def test_no_torch_at_import():
    modules = ", ".join(tables.LOSSES[name].partition(":")[0] for name in BETAS)
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.fixture(scope="module")
def world():
    """Images and a teacher of another family than the student: other widths, sizes and number of stages."""
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    constants = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": (3, 32, 32), "num_classes": 5}
    network = build_model("shufflenetv2", num_classes=5, seed=1)
    return images, TeacherView(network, **constants), constants


@pytest.mark.parametrize("name", BETAS)
def test_a_real_student_learns_under_autocast(world, name):
    images, view, constants = world
    loss = tables.lookup("loss", name)()
    if name == "ft":
        loss.config = type(loss.config)(epochs=1)
    student = TapSet(ModelView(build_model("resnet8", num_classes=5, seed=2), **constants), loss.requires.student)
    teacher = TapSet(view, loss.requires.teacher)
    facts = {"num_classes": 5, "batch_size": 8, "epochs": 1, "images": 8}
    loss.setup(Setup(student=student.shapes, teacher=teacher.shapes, **facts))
    with torch.no_grad():
        target = teacher(images)
    loss.prepare(lambda: iter([Look(teacher=target, labels=None, index=torch.arange(8))]))
    network = student.view.module.train()
    parameters = list(network.parameters())
    trained = parameters + [p for p in (loss.aux.parameters() if loss.aux else []) if p.requires_grad]
    values = []
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(student(images), target, Batch(images=images))[name]
        assert value.dtype == torch.float32
        assert value.shape == (() if loss.requires.relational else (8,))
        gradients = torch.autograd.grad(value.mean(), trained, allow_unused=True)
        size = sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5
        assert size > 0 and any(g is not None and bool(g.any()) for g in gradients[: len(parameters)])
        for p, g in zip(trained, gradients, strict=True):
            if g is not None:
                p.data -= 0.1 * g / size  # a step of fixed length downhill
        values.append(float(value.detach().mean()))
    assert values[-1] < values[0]
