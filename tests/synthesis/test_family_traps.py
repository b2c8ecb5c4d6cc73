"""Traps of data-free distillation (methods/dfkd.md 5 and 6), for every method of the generator family.

Each method runs with the options of its own contract class on the tiny teacher.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import SynthesizerContract, batches_of, equal_states, frozen_copy
from torch import nn

from synthesis.tiny import TinyNet, task, teacher_view
from synthkit.bench.steps_generator import names
from synthkit.models.view import ModelView, TeacherView
from synthkit.synthesis.curriculum import Curriculum
from synthkit.tables import lookup

HERE = Path(__file__).parent
FAMILY = [name for name in names() if (HERE / f"test_contract_{name}.py").exists()]
POOL = [name for name in FAMILY if hasattr(lookup("method", name), "synthesise")]
ONLINE = [name for name in FAMILY if name not in POOL]
ADVERSARIES = ("adversarial", "disagreement")
"""What the methods call the term."""
WITHOUT_ADVERSARY = {"softtarget", "spaceshipnet", "zskd"}
"""Their images do not look at the student (cards 2.12, 2.13, 2.15)."""


def contract_of(name: str) -> type[SynthesizerContract]:
    module = importlib.import_module(f"synthesis.test_contract_{name}")
    found = [
        c for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, SynthesizerContract) and getattr(c, "name", None) == name
    ]  # fmt: skip
    return found[0]


def build(name: str, *, settings: dict[str, Any] | None = None, **of_task: Any) -> Any:
    contract = contract_of(name)
    method = lookup("method", name)
    config = method.Config(**{**contract.options, **(settings or {})})
    return method(config, task(**{"images": contract.images, **contract.of_task, **of_task}))


def modules_of(thing: Any, depth: int = 4, seen: dict[int, Any] | None = None) -> Iterator[nn.Module]:
    """Every network that an object holds, however deep in the package's own objects."""
    seen = {} if seen is None else seen  # holds what it knows, so that no address is given twice
    if id(thing) in seen or depth < 0:
        return
    seen[id(thing)] = thing
    if isinstance(thing, nn.Module):
        yield from thing.modules()
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from modules_of(value, depth - 1, seen)
    elif isinstance(thing, dict):
        yield from modules_of(list(thing.values()), depth, seen)
    elif type(thing).__module__.startswith("synthkit"):
        yield from modules_of(vars(thing), depth - 1, seen)


def attached(method: Any) -> set[tuple[int, str]]:
    """(module, kind of hook or override) of everything attached to a network of the method."""
    kinds = [kind for kind in vars(nn.Module()) if kind.endswith("hooks")]
    return {
        (id(module), kind)
        for module in modules_of(method)
        for kind in [*kinds, "forward"]
        if (kind in vars(module) if kind == "forward" else vars(module).get(kind))
    }


# ---- one normalisation -----------------------------------------------------------------------------------------


class Spy:
    """Watches a view: what it normalises, and what its network is given."""

    def __init__(self, view: ModelView):
        self.normalised: list[torch.Tensor] = []
        self.raw_inputs = 0
        self.outside = 0
        self.calls = 0
        honest = view.normalize

        def normalize(images: torch.Tensor) -> torch.Tensor:
            if images.dtype != torch.uint8 and not bool(((images > -1.5) & (images < 2.5)).all()):
                self.outside += 1  # what is normalised already spans +-10 here
            self.normalised.append(honest(images))
            return self.normalised[-1]

        def arrives(_network: nn.Module, args: Any) -> None:
            self.calls += 1
            self.raw_inputs += not any(args[0] is known for known in self.normalised)

        view.normalize = normalize  # type: ignore[method-assign]  # a spy
        view.module.register_forward_pre_hook(arrives)


@pytest.mark.parametrize("name", FAMILY)
def test_images_are_normalised_exactly_once(name):
    """Of mean 0.5 and deviation 0.05, so that a second normalisation leaves every sensible range."""
    net = teacher_view().module
    view = TeacherView(net, [0.5] * 3, [0.05] * 3, input_size=(3, 8, 8), num_classes=10, name="narrow")
    method = build(name, teachers=[view], images=12)
    spies = Spy(view), Spy(method.student_view)
    batches_of(method)
    for spy in spies:
        assert spy.calls > 0 and spy.raw_inputs == 0, "a network saw images that its view did not normalise"
        assert spy.outside == 0, "an image was normalised twice"


# ---- the adversary ---------------------------------------------------------------------------------------------


def adversary_against(name: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> float | None:
    """The adversarial term that is minimised against a student whose classifier is `scale` times the teacher's."""
    options = contract_of(name).options
    has = lookup("method", name).Config(**options).adv
    settings: dict[str, Any] = {} if name in WITHOUT_ADVERSARY else {"adv": has or 1.0, "grad_adv": 0.0}
    if name in POOL:
        settings |= {} if name in WITHOUT_ADVERSARY else {"warmup": 0.0}
    student = TinyNet()
    student.load_state_dict(teacher_view().module.state_dict())
    with torch.no_grad():
        student.linear.weight.mul_(scale)
        student.linear.bias.mul_(scale)
    with monkeypatch.context() as patch:
        patch.setattr("synthkit.models.build.build_model", lambda *_, **__: student)
        method = build(name, settings=settings, curriculum=Curriculum.named("none"), images=40)
    found: list[float] = []
    honest = method.note_generator

    def note(terms: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
        found.extend(float(value.detach()) for key, value in terms.items() if key in ADVERSARIES)
        honest(terms, loss)

    method.note_generator = note
    if name in POOL:
        student.eval().requires_grad_(False)
        method.synthesise(0)
    else:
        method.set_modes(generating=True)
        method.generator_step()
    return found[0] if found else None


@pytest.mark.parametrize("name", FAMILY)
def test_the_adversary_looks_at_the_student(name, monkeypatch):
    """The trap of Fast-Datafree#11: handed the teacher twice it is 0 for ever, whatever the student does.

    Half a teacher agrees with it everywhere, as decision adversaries want; minus a teacher never does.
    """
    terms = [adversary_against(name, scale, monkeypatch) for scale in (1.0, 0.5, -1.0)]
    if name in WITHOUT_ADVERSARY:
        assert terms == [None, None, None]
        return
    equal, half, opposite = terms
    assert equal is not None and half is not None and opposite is not None
    assert min(half, opposite) < equal - 1e-5, "a student further from the teacher must lower what is minimised"
    assert half != 0 or opposite != 0


# ---- hooks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_nothing_stays_attached_after_a_run(name):
    method = build(name, images=12)
    before = attached(method)
    batches_of(method)
    assert attached(method) <= before


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_nothing_stays_attached_after_an_exception(name, whose):
    """The network fails in the middle of its n-th forward, wherever in the run that is."""
    for nth in (1, 5):
        method = build(name, images=12)
        view = method.task.teacher if whose == "teacher" else method.student_view
        before, left = attached(method), [nth]

        def fail(*_: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("in the middle of a forward")

        handle = view.classifier.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            list(method.generate())
        handle.remove()
        assert attached(method) <= before, f"after a failure in forward {nth}"


# ---- what a resumed run has ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_resume_restores_age_ramp_networks_optimisers_and_memory(name):
    """From the middle of a run; the contract compares what follows, this what is there."""
    ramped = {} if name in WITHOUT_ADVERSARY else {"grad_adv": 0.5, "begin": 0.0, "end": 1.0}
    method, again = (build(name, settings={"alpha": 0.01, **ramped}) for _ in range(2))
    stream = method.generate()
    while method.learned < method.student_steps // 2:
        next(stream)
    again.load_state_dict(frozen_copy(method.state_dict()))
    assert again.step == method.step > 0 and again.learned == method.learned > 0
    assert again.age == method.age > method.config.lambda_0
    assert again.epoch == method.epoch and again.stored == method.stored
    assert again.adversarial_weight(again.epoch) == method.adversarial_weight(method.epoch)
    ours, theirs = list(modules_of(method)), list(modules_of(again))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert equal_states(one.state_dict(), other.state_dict())
    assert equal_states(frozen_copy(again.state_dict()), frozen_copy(method.state_dict()))
    assert again.optimizer_s.state_dict()["state"], "the student's momentum"
    if name in POOL:
        filled = method.remembered
        assert again.remembered == filled > 0 and torch.equal(again.memory[:filled], method.memory[:filled])
    else:
        assert again.optimizer_g.state_dict()["state"], "the generator's moments"
        assert torch.equal(again.noise.get_state(), method.noise.get_state())


# ---- both numbers of steps -------------------------------------------------------------------------------------


def counted(method: Any, name: str) -> list[int]:
    """A list that grows with every step of the optimiser `name`."""
    steps: list[int] = []
    optimizer = getattr(method, name)
    honest = optimizer.step
    optimizer.step = lambda *args, **kwargs: (steps.append(method.step), honest(*args, **kwargs))[1]
    return steps


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize(("kd_steps", "g_steps"), [(1, 2), (3, 1)])
def test_both_numbers_of_steps_are_honoured(name, kd_steps, g_steps):
    """The seed ignored kd_steps for all methods and g_steps for one."""
    settings: dict[str, Any] = {"kd_steps": kd_steps, "g_steps": g_steps, "ep_steps": 3}
    settings |= {"form": "benchmark"} if name == "dafl" else {}  # its own form is one step of each by definition
    method = build(name, settings=settings)
    generator, student = counted(method, "optimizer_g"), counted(method, "optimizer_s")
    for cycle in (1, 2):
        method.run_cycle(kd_steps)
        assert (len(generator), len(student), method.step) == (cycle * g_steps, cycle * kd_steps, cycle * kd_steps)


@pytest.mark.parametrize("name", POOL)
@pytest.mark.parametrize("g_steps", [1, 3])
def test_a_synthesis_call_makes_its_iterations(name, g_steps):
    method = build(name, settings={"g_steps": g_steps, "epochs": 2, "ep_steps": 3})
    calls, made = [], []
    honest, note = method.synthesise, method.note_generator
    method.synthesise = lambda call: (calls.append(call), honest(call))[1]
    method.note_generator = lambda *args: (made.append(1), note(*args))[1]
    student = counted(method, "optimizer_s")
    batches_of(method)
    assert calls == list(range(method.calls)) and len(made) == g_steps * method.calls
    assert len(student) == 6
