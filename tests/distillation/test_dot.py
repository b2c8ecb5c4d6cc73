"""DOT: SGD where both momenta agree, the released update where they do not, and its state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from synthkit.distillation.dot import DOT
from synthkit.errors import ConfigError, RunError


def make(seed: int = 0):
    torch.manual_seed(seed)
    shared, task_only, kd_only = (nn.Parameter(torch.randn(3, 2, dtype=torch.float64)) for _ in range(3))
    data = torch.randn(8, 2, 3, 2, dtype=torch.float64)
    return [shared, task_only, kd_only], data


def losses(params, target):
    shared, task_only, kd_only = params
    task = ((shared + task_only - target[0]) ** 2).sum()
    kd = ((shared * kd_only - target[1]) ** 2).sum()
    return task, kd


def dot_step(optimizer, params, target):
    task, kd = losses(params, target)
    optimizer.zero_grad()
    task.backward(retain_graph=True)
    optimizer.keep_task()
    kd.backward()
    optimizer.step()


def run_dot(params, data, **options):
    optimizer = DOT(params, 0.02, **options)
    for target in data:
        dot_step(optimizer, params, target)
    return optimizer


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_a_difference_it_is_sgd_with_momentum(weight_decay):
    params, data = make()
    plain = [nn.Parameter(p.detach().clone()) for p in params]
    run_dot(params, data, delta=0.0, weight_decay=weight_decay)
    sgd = torch.optim.SGD(plain, lr=0.02, momentum=0.9, weight_decay=weight_decay)
    for target in data:
        sgd.zero_grad()
        torch.stack(losses(plain, target)).sum().backward()
        sgd.step()
    for ours, theirs in zip(params, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_update_equals_the_formula():
    """Hand-written: two buffers for the shared parameter, one with the middle momentum for the others."""
    params, data = make()
    m, d, decay, lr = 0.9, 0.075, 0.1, 0.02
    theta = [p.detach().clone() for p in params]
    v_task, v_kd = torch.zeros(3, 2).double(), torch.zeros(3, 2).double()
    v_single = [torch.zeros(3, 2).double(), torch.zeros(3, 2).double()]
    for target in data:
        a, b, c = theta
        g_task, g_kd = 2 * (a + b - target[0]), 2 * (a * c - target[1])
        v_task = (m - d) * v_task + g_task + decay * a
        v_kd = (m + d) * v_kd + g_kd * c
        v_single[0] = m * v_single[0] + g_task + decay * b
        v_single[1] = m * v_single[1] + g_kd * a + decay * c
        theta = [a - lr * (v_task + v_kd), b - lr * v_single[0], c - lr * v_single[1]]
    optimizer = run_dot(params, data, delta=d, weight_decay=decay)
    for found, expected in zip(params, theta, strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-13)
    assert sorted(len(optimizer.state[p]) for p in params) == [1, 1, 2]
    with_sgd, _ = make()
    run_dot(with_sgd, data, delta=0.0, weight_decay=decay)
    assert not torch.allclose(with_sgd[0], params[0])


def test_micro_batches_add_up():
    params, data = make()
    halves = [nn.Parameter(p.detach().clone()) for p in params]
    run_dot(params, data)
    optimizer = DOT(halves, 0.02)
    for target in data:
        for _ in range(2):
            task, kd = losses(halves, target)
            (task / 2).backward(retain_graph=True)
            optimizer.keep_task()
            (kd / 2).backward()
            optimizer.keep_distillation()
        assert all(p.grad is None for p in halves)
        optimizer.step()
    for a, b in zip(params, halves, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_gradients_may_be_changed_part_by_part():
    """As two ranks do it: half of the gradients each, then their sum."""
    params, data = make()
    halves = [nn.Parameter(p.detach().clone()) for p in params]
    run_dot(params, data)
    optimizer = DOT(halves, 0.02)
    present: list[list[bool]] = []

    def double(parameters):
        present.append([p.grad is not None for p in parameters])
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(2)

    for target in data:
        task, kd = losses(halves, target)
        (task / 2).backward(retain_graph=True)
        optimizer.keep_task()
        (kd / 2).backward()
        optimizer.each_part(double)
        assert all(p.grad is None for p in halves)
        optimizer.step()
    assert present == [[True, True, False], [True, False, True]] * len(data)
    for a, b in zip(params, halves, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_state_round_trip_is_exact():
    params, data = make()
    first = run_dot(params, data[:4], weight_decay=0.1)
    saved = copy.deepcopy(first.state_dict())
    again = [nn.Parameter(p.detach().clone()) for p in params]
    second = DOT(again, 1.0)
    second.load_state_dict(saved)
    for target in data[4:]:
        dot_step(first, params, target)
        dot_step(second, again, target)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
    assert second.param_groups[0]["weight_decay"] == 0.1 and second.param_groups[0]["lr"] == 0.02


def test_groups_have_their_own_rate():
    params, data = make()
    still = params[0].detach().clone()
    optimizer = DOT([{"params": params[:1], "lr": 0.0}, {"params": params[1:]}], 0.02)
    dot_step(optimizer, params, data[0])
    assert torch.equal(params[0], still) and not torch.equal(params[1], make()[0][1])


def test_gradients_must_be_told_apart():
    params, data = make()
    optimizer = DOT(params, 0.02)
    torch.stack(losses(params, data[0])).sum().backward()
    with pytest.raises(RunError, match="keep_task"):
        optimizer.step()
    optimizer.keep_task()
    optimizer.zero_grad()
    with pytest.raises(RunError, match="keep_task"):  # a new step has begun
        optimizer.step()


@pytest.mark.parametrize("bad", [{"momentum": 0.95, "delta": 0.1}, {"momentum": 0.05}, {"weight_decay": -1.0}])
def test_bad_options_are_refused(bad):
    with pytest.raises(ConfigError, match="dot:"):
        DOT(make()[0], 0.1, **bad)


@pytest.mark.gpu
def test_cuda_equals_cpu():
    params, data = make()
    there = [nn.Parameter(p.detach().cuda()) for p in params]
    run_dot(params, data, weight_decay=0.1)
    run_dot(there, data.cuda(), weight_decay=0.1)
    for a, b in zip(params, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-10, atol=1e-12)
