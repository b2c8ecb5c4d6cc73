"""ZSKD and soft-target against numbers that the original implementation produced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthesis.tiny import MEAN, STD, TinyNet, task
from synthkit.models.view import TeacherView
from synthkit.synthesis.generator.softtarget import (
    SoftTarget,
    SoftTargetConfig,
    correlation_factor,
    soft_target_loss,
)
from synthkit.synthesis.generator.zskd import (
    ZSKD,
    ZSKDConfig,
    class_similarity,
    seed_concentration,
)
from synthkit.synthesis.inversion.views import Views

REFERENCE = Path(__file__).parents[1] / "reference"
STUDENT: dict[str, Any] = {"student": "convnet_d1_w8_bn"}


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


def double_teacher(case: dict[str, torch.Tensor], mean: list[float], std: list[float]) -> TeacherView:
    """The stored teacher in float64; the original fed it pixels normalised by `mean` and `std`."""
    values = [v for k, v in case.items() if k.startswith("T.")]
    net = TinyNet(width=case["T.conv1.weight"].shape[0], classes=len(case["T.linear.bias"])).double()
    net.load_state_dict(dict(zip(net.state_dict(), values, strict=True)))
    view = TeacherView(net, mean, std, input_size=(3, 8, 8), num_classes=len(case["T.linear.bias"]), name="golden")
    view._scale = 1 / torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1)
    view._shift = -torch.tensor(mean, dtype=torch.float64).view(1, -1, 1, 1) * view._scale
    return view


def stored_views(case: dict[str, torch.Tensor]) -> list[Views]:
    return [
        Views(roll=roll[None].numpy(), flip=np.array([flip > 0.5]))
        for roll, flip in zip(case["jitter"], case["flip"].tolist(), strict=True)
    ]


def test_class_similarity_and_concentrations():
    case = golden("zskd_class_similarity")
    similarity = class_similarity(case["W"])
    close(similarity, case["sim_1"])
    close(similarity / 0.1, case["sim_0p1"])
    alpha = seed_concentration(similarity)
    close(alpha, case["concentration"])
    close(torch.distributions.Dirichlet(alpha).log_prob(case["targets"]), case["log_prob"])


def test_the_carried_form_is_the_seeds_synthesis():
    """Five classes of two iterations; the seed feeds its pixels unnormalised, which is a teacher of mean 0, std 1."""
    case = golden("zskd_synthesize")
    view = double_teacher(case, [0.0] * 3, [1.0] * 3)
    options = {"form": "seed", "synthesis_batch": 4, "g_steps": 2, "lr_g": 2.0, "T": 10.0, **STUDENT}
    method = ZSKD(ZSKDConfig(**options), task(teachers=[view], images=20))
    views = iter(stored_views(case))
    method.fresh = lambda call, draw: case["x0"].clone().requires_grad_()  # type: ignore[method-assign]
    method.targets = lambda call: case["targets"][call]  # type: ignore[method-assign]
    method.view = lambda pixels, call, iteration: next(views)(pixels)  # type: ignore[method-assign]
    losses: list[torch.Tensor] = []
    honest = method.descend
    method.descend = lambda optimizer, terms: (losses.append(terms["target"].detach()), honest(optimizer, terms))[1]
    for call in range(5):
        images, _ = method.synthesise(call)
        assert method.carried is not None
        close(method.carried.detach(), case["pool"][call], rtol=1e-7, atol=1e-9)
        assert torch.equal(images, method.carried.detach().clamp(0, 1)), "clamped only where it is stored"
    close(torch.stack(losses), case["losses"], rtol=1e-7, atol=1e-9)


def test_correlation_of_the_last_convolution():
    case = golden("softtarget")
    factor = correlation_factor(case["T.conv2.weight"].mean((2, 3)))
    close(factor.T @ factor, case["R"])


def test_soft_target_loss():
    case = golden("softtarget")
    logits = case["logits"].clone().requires_grad_()
    loss = soft_target_loss(logits, case["y_soft"], 20.0)
    close(loss.detach(), case["image_loss"])
    close(torch.autograd.grad(loss, logits)[0], case["grad_logits"])


def soft_target(case: dict[str, torch.Tensor]) -> tuple[SoftTarget, list[torch.Tensor]]:
    """The method on the stored case, as released but for the bug, and the losses that it will note."""
    options = {"synthesis_batch": 5, "g_steps": 2, "resample": True, "clamp": False, **STUDENT}
    method = SoftTarget(SoftTargetConfig(**options), task(teachers=[double_teacher(case, MEAN, STD)], images=5))
    features, views = iter(case["feat"]), iter(stored_views(case))
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    method.fresh = lambda call, draw: ((case["x0"] - mean) / std).requires_grad_()  # type: ignore[method-assign]
    method.soft_targets = lambda rng: method.teacher.classifier(next(features)).detach()  # type: ignore[method-assign]
    method.view = lambda pixels, call, iteration: next(views)(pixels)  # type: ignore[method-assign]
    losses: list[torch.Tensor] = []
    honest = method.descend

    def spied(optimizer: torch.optim.Optimizer, terms: dict[str, torch.Tensor]) -> None:
        losses.append(torch.stack(list(terms.values())).sum().detach())
        honest(optimizer, terms)

    method.descend = spied  # type: ignore[method-assign]
    return method, losses


def test_soft_target_optimises_where_the_seed_returns_its_noise():
    """The seed rebinds a name, so it returns x0 rolled twice; ours moves by two Adam steps. Both are shown."""
    case = golden("softtarget")
    method, losses = soft_target(case)
    images, _ = method.synthesise(0)
    close(losses[0], case["losses"][0], rtol=1e-7, atol=1e-9)  # of the noise itself: nothing has moved yet
    noise = case["x0"]
    for view in stored_views(case):
        noise = view(noise)
    assert torch.equal(noise, case["returned"])
    expected, second = naive_soft_target(case)
    close(images, expected.clamp(0, 1), rtol=1e-7, atol=1e-9)
    close(losses[1], second, rtol=1e-7, atol=1e-9)
    assert float(losses[1] - case["losses"][1]) < -0.05, "one Adam step lowers the loss that the seed sees unchanged"


def naive_soft_target(case: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The intended loop written out: (pixels in [0, 1] units after two iterations, the second loss).

    Adam runs in normalised pixels, as here.
    """
    net = double_teacher(case, MEAN, STD).module
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    x = ((case["x0"] - mean) / std).requires_grad_()
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    loss = torch.zeros(())
    for t, (roll, flip) in enumerate(zip(case["jitter"].tolist(), case["flip"].tolist(), strict=True), 1):
        seen = x.roll(roll, (2, 3))
        seen = seen.flip(3) if flip > 0.5 else seen
        hidden = net.relu(net.bn1(net.conv1(seen)))
        feature = net.relu(net.bn2(net.conv2(hidden))).mean((2, 3))
        p = (net.linear(feature) / 20).softmax(1)
        q = (net.linear(case["feat"][t - 1]) / 20).softmax(1)
        loss = (p * (p / q).log()).mean() - feature.abs().mean()
        (g,) = torch.autograd.grad(loss, x)
        first, second = 0.5 * first + 0.5 * g, 0.99 * second + 0.01 * g * g
        step = 0.1 * (first / (1 - 0.5**t)) / ((second / (1 - 0.99**t)).sqrt() + 1e-8)
        x = (x - step).detach().requires_grad_()
    return x.detach() * std + mean, loss.detach()
