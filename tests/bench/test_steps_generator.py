"""`synthkit bench steps --family generator`: a floor is exactly the network calls of the piece that it stands under."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from synthesis.tiny import runtime
from torch import nn

from synthkit.bench import steps_generator
from synthkit.bench.floor import Bare, recording
from synthkit.cli.main import main

SMALL = argparse.Namespace(
    method="cudfkd", teacher="resnet8", student="resnet8", batch=4, classes=10, kd_steps=2, iterations=2, compile=False
)


def of(method: str) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(SMALL), "method": method})


def recorded(method: str) -> dict[str, list]:
    """The calls of every piece of a method: (network, train, grad, input needs it, weights get it, backwards)."""
    built = steps_generator._method(of(method), runtime())
    known = {built.teacher.module: "teacher", built.student_view.module: "student", built.generator: "generator"}
    found = {}
    pool = hasattr(built, "synthesise")
    pieces = steps_generator._pool_pieces(built) if pool else steps_generator._online_pieces(built)
    for name, piece in pieces.items():
        with recording() as calls:
            piece()
        found[name] = [
            (known[c.network], c.training, c.grad, c.inputs[0].requires_grad, c.trained, max(c.backwards))
            for c in calls
        ]  # fmt: skip
    return found


def test_the_calls_of_cudfkd():
    found = recorded("cudfkd")
    assert found["generator_step"] == [
        ("generator", True, True, False, True, 1),
        ("teacher", False, True, True, False, 1),
        ("student", False, True, True, False, 1),
    ]
    assert found["kd_step"] == [
        ("generator", False, False, False, False, 0),
        ("teacher", False, False, False, False, 0),
        ("student", True, True, False, True, 1),
    ]


class Odd(nn.Module):
    """A network with a submodule that is called alone, a keyword, and two outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, scale=1.0):
        hidden = self.first(x)
        return self.second(hidden) * scale, hidden


def test_recording_outermost_calls_and_gradients_that_came_back():
    network, x = Odd(), torch.randn(5, 3, requires_grad=True)
    with recording() as calls:
        out, hidden = network(x, scale=2.0)
        torch.autograd.grad(out.sum(), x, retain_graph=True)
        assert calls[0].backwards == [1, 1] and not calls[0].trained  # to the input alone
        out.sum().backward()
        nn.CrossEntropyLoss()(out, torch.zeros(5, dtype=torch.int64))  # holds no weights
        with torch.no_grad():
            network.second(hidden)
    assert [c.network for c in calls] == [network, network.second]
    assert calls[0].backwards == [2, 2] and calls[0].options == {"scale": 2.0} and calls[0].trained
    assert calls[1].backwards == [0] and not calls[1].grad
    network(x)
    assert len(calls) == 2, "closed is closed"


def test_of_two_calls_only_the_trained_one_is():
    """A gradient to the input alone, then one to weights and input at once, in the same network."""
    network = Odd()
    x, z = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    with recording() as calls:
        torch.autograd.grad(network(x)[0].sum(), x)
        network(z)[0].sum().backward()
    assert [(c.trained, max(c.backwards)) for c in calls] == [(False, 1), (True, 1)]


def test_a_gradient_that_ends_in_the_middle_is_not_counted():
    """Grad-CAM asks for the gradient of a feature map: no pass through the layers before it."""
    network, x = Odd(), torch.randn(5, 3)
    with recording() as calls:
        out, hidden = network(x)
        torch.autograd.grad(out.sum(), hidden, retain_graph=True)
        assert calls[0].backwards == [0, 0]
        out.sum().backward()
    assert calls[0].backwards == [1, 1] and calls[0].cuts == [0]  # it came to the output of the first layer
    assert not network.first.weight._backward_hooks
    with recording() as again:
        Bare(calls, runtime(), channels_last=False)()
    assert again[0].cuts == [0] and again[0].backwards == [1, 1]


def test_recording_is_closed_by_an_exception():
    network = Odd()
    with pytest.raises(RuntimeError), recording():
        network(torch.randn(5, 7))
    with recording() as calls:
        network(torch.randn(5, 3))
    assert len(calls) == 1


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_bare_form_makes_the_recorded_calls_again(channels_last):
    """On copies, with the same inputs, modes and gradients; the networks themselves stay as they are."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).train()
    frozen = nn.Conv2d(3, 2, 1).eval().requires_grad_(False)
    x = torch.randn(5, 3, 8, 8)
    with recording() as calls:
        network(x).sum().backward()
        y = x.clone().requires_grad_()
        frozen(y).sum().backward()
        with torch.no_grad():
            network.eval()(x)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    bare = Bare(calls, runtime(), channels_last=channels_last)
    with recording() as again:
        bare()
    assert [type(c.network) for c in again] == [nn.Sequential, nn.Conv2d, nn.Sequential]
    for first, second in zip(calls, again, strict=True):
        assert second.network is not first.network and torch.equal(first.inputs[0], second.inputs[0])
        facts = [(c.training, c.grad, c.trained, c.backwards, c.inputs[0].requires_grad) for c in (first, second)]
        assert facts[0] == facts[1]
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert second.inputs[0].is_contiguous(memory_format=layout)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


@pytest.mark.parametrize("method", ["zskd"])
def test_a_pool_method_has_its_synthesis_and_a_student_step(method):
    pieces = steps_generator.build(of(method), runtime())
    assert set(pieces.floors) == {"synthesis", "kd_step"} == set(pieces.before)
    bare = pieces.run["bare_synthesis_contiguous"]
    assert isinstance(bare, Bare)
    calls = [(c.training, c.inputs[0].shape, c.inputs[0].requires_grad, c.backwards) for c in bare.calls]
    assert calls == [(False, torch.Size([4, 3, 32, 32]), True, [1])] * 2  # the teacher, once an iteration


def test_every_repetition_starts_from_the_same_state(monkeypatch):
    kept: list = []
    honest = steps_generator._method
    monkeypatch.setattr(steps_generator, "_method", lambda *a: kept.append(honest(*a)) or kept[-1])
    pieces = steps_generator.build(of("cudfkd"), runtime())
    (method,) = kept
    states = []
    for _ in range(2):
        pieces.before["generator_step"]()
        states.append({k: v.clone() for k, v in method.generator.state_dict().items()})
        pieces.run["generator_step"]()
    assert all(torch.equal(states[0][k], v) for k, v in states[1].items())
    assert any(not torch.equal(states[1][k], v) for k, v in method.generator.state_dict().items())


def test_several_methods_make_one_table(capsys):
    words = ["bench", "steps", "--family", "generator", "--method", "dfq,zskd", "--teacher", "resnet8"]
    words += ["--student", "resnet8", "--batch", "2", "--repeats", "1", "--iterations", "1", "--threads", "1"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ratio"] == {name: max(found["methods"][name]["ratio"].values()) for name in ("dfq", "zskd")}
    assert set(found["methods"]["dfq"]["floor"]) == {"generator_step", "kd_step"}
    assert set(found["methods"]["zskd"]["floor"]) == {"synthesis", "kd_step"}
    assert found["versions"]["torch"] and found["hardware"]["threads"] == 1 and found["teacher"] == "resnet8"


def test_wrong_use(capsys):
    for words, message in ((["--method", "cudfk"], "did you mean 'cudfkd'"), (["--iterations", "0"], "at least 1")):
        assert main(["bench", "steps", "--family", "generator", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", steps_generator.names())
def test_every_method_can_be_measured(method):
    pieces = steps_generator.build(of(method), runtime())
    for name, piece in pieces.run.items():
        pieces.before.get(name, lambda: None)()
        piece()
    assert all(len(bare.calls) for bare in pieces.run.values() if isinstance(bare, Bare))
