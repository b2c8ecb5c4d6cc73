"""BatchNorm statistics against the original hooks, naive formulas and the promise to leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from synthesis.tiny import TinyNet, teacher_view

from synthkit.errors import ModelError
from synthkit.models.bn_stats import StatisticsEMA
from synthkit.models.view import TeacherView

REFERENCE = Path(__file__).parents[1] / "reference"


def golden(name: str):
    with np.load(REFERENCE / f"{name}.npz") as file:
        case = {key: torch.as_tensor(file[key]) for key in file.files}
    net = TinyNet(width=case["T.conv1.weight"].shape[0]).double()
    net.load_state_dict({k[2:]: v for k, v in case.items() if k.startswith("T.")})
    # the stored batches are already normalised: mean 0, std 1
    view = TeacherView(net, [0, 0, 0], [1, 1, 1], input_size=(3, 8, 8), num_classes=10, name="golden")
    return case, view


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_hook_case():
    case, view = golden("bn_stats_hook")
    x = case["x"].clone().requires_grad_()
    with view.bn_statistics() as statistics:
        view(x)
        loss = statistics.loss()
    loss.backward()
    close(torch.stack(statistics.per_layer()).detach(), case["per_layer"])
    close(loss.detach(), case["total"])
    close(x.grad, case["grad_x"])


def test_first_layer_multiplier():
    case, view = golden("bn_stats_hook_first_multiplier")
    x = case["x"].clone().requires_grad_()
    with view.bn_statistics() as statistics:
        view(x)
    loss = statistics.loss(first_multiplier=10.0)
    loss.backward()
    close(loss.detach(), case["loss"])
    close(x.grad, case["grad_x"])


def test_momentum():
    case, view = golden("bn_stats_hook_momentum")
    ema = StatisticsEMA(0.9)
    for call, forwards in enumerate(case["x"]):
        for i, batch in enumerate(forwards):
            x = batch.clone().requires_grad_()
            with view.bn_statistics() as statistics:
                view(x)
            close(torch.stack(statistics.per_layer(ema)).detach(), case["per_layer"][call, i])
            (grad,) = torch.autograd.grad(statistics.loss(ema=ema), x)
        ema.update(statistics.batch)
    close(grad, case["grad_x_last"])
    for i, (mean, var) in enumerate(ema.memory):
        close(mean, case[f"ema_mean.{i}"])
        close(var, case[f"ema_var.{i}"])


def test_fused_node_equals_autograd_of_the_formula():
    view = teacher_view(TinyNet().double(), size=8)
    layer = view.module.bn1
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64, requires_grad=True)

    def fused(x):
        with view.bn_statistics() as statistics:
            y = layer(x)
            return y, *statistics.batch[0]

    assert torch.autograd.gradcheck(fused, (x,))
    y, mean, var = fused(x)
    close(mean, x.mean((0, 2, 3)))
    close(var, x.var((0, 2, 3), correction=0))
    close(y, layer(x))


def test_nothing_stays_attached():
    view = teacher_view()
    x = torch.rand(4, 3, 8, 8)
    before = view(x)
    with pytest.raises(RuntimeError, match="inside"), view.bn_statistics():
        view(x)
        raise RuntimeError("inside")
    view.features(x)
    assert all(
        "forward" not in vars(m) and not m._forward_pre_hooks and not m._forward_hooks for m in view.module.modules()
    )
    assert torch.equal(view(x), before)


def test_bf16_statistics_are_fp32():
    view = teacher_view()
    x = torch.rand(4, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), view.bn_statistics() as statistics:
        view(x)
        assert all(m.dtype == torch.float32 and v.dtype == torch.float32 for m, v in statistics.batch)
        assert statistics.loss().dtype == torch.float32


def test_teacher_is_frozen_and_normalises_once():
    view = teacher_view()
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    by_hand = (x - torch.tensor(view.mean).view(1, 3, 1, 1)) / torch.tensor(view.std).view(1, 3, 1, 1)
    torch.testing.assert_close(view(x), view.module(by_hand))
    view(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in view.module.parameters())
    as_bytes = (x.detach() * 255).round().to(torch.uint8)
    torch.testing.assert_close(view(as_bytes), view(as_bytes.float() / 255))


def test_without_batchnorm():
    view = TeacherView(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)),
        [0.5] * 3,
        [0.5] * 3,
        input_size=(3, 8, 8),
        num_classes=10,
    )
    assert not view.has_batchnorm
    with pytest.raises(ModelError, match="no BatchNorm2d"), view.bn_statistics():
        pass


def test_wrong_image_size():
    with pytest.raises(ModelError, match=r"takes images of \(3, 8, 8\)"):
        teacher_view()(torch.rand(1, 3, 9, 9))
