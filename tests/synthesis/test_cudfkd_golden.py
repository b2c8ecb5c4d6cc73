"""CuDFKD against numbers that the original implementation produced (tests/reference/cudfkd_*.npz)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synthesis.tiny import TinyNet, task, teacher_view
from synthkit.logits import kl_per_sample, l1_per_sample
from synthkit.synthesis.curriculum import (
    Curriculum,
    adversarial_weight,
    age_at,
    self_paced_regulariser,
    self_paced_weights,
)
from synthkit.synthesis.generator.cudfkd import CuDFKD, CuDFKDConfig, cudfkd_terms
from synthkit.synthesis.losses import adi_divergence, adversarial_js

REFERENCE = Path(__file__).parents[1] / "reference"


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("form", ["log", "hard", "soft"])
def test_self_paced_weights(form):
    case = golden("cudfkd_curr_v")
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if form == "log" else {"rtol": 1e-6, "atol": 1e-6}
    for i, age in enumerate(case["lam"].tolist()):
        weights = self_paced_weights(case["loss"], age, form)
        close(weights, case[f"v_{form}"][i], **tolerance)
        close(self_paced_regulariser(weights, age, form), case[f"g_{form}"][i], **tolerance)


@pytest.mark.parametrize("form", ["log", "hard", "soft"])
def test_weights_minimise_their_objective(form):
    """v(l) is the argmin over v in [0, 1] of v l + g(v): what self-paced learning means."""
    grid = torch.linspace(1e-6, 1 - 1e-6, 4001, dtype=torch.float64)
    for age in (1.0, 3.0):
        for loss in (0.2, 0.9, 2.0, 5.0):
            objective = torch.stack([v * loss + self_paced_regulariser(v[None], age, form).sum() for v in grid])
            best = grid[objective.argmin()]
            v = self_paced_weights(torch.tensor([loss], dtype=torch.float64), age, form)
            assert abs(float(v) - float(best)) < 2e-3


def test_lambda_growth():
    case = golden("cudfkd_lambda_schedule")
    for name, growth in (("cifar10", 1e-4), ("other", 2e-5)):
        for i, age_0 in enumerate(case["lambda_0"].tolist()):
            close([age_at(int(k), age_0, growth) for k in case["steps"]], case[name][i].tolist())


RAMPS = {
    "cifar10_resnet34_resnet18": (250, 0.0, 0.5, 0.25, 0.75),
    "cifar10_wrn402_wrn161": (250, 0.5, 0.05, 0.25, 0.75),
    "cifar100_resnet34_resnet18": (400, 0.0, 0.35, 0.2, 0.8),
    "cifar100_wrn402_wrn161": (500, 0.0, 0.12, 0.2, 0.75),
    "timagenet": (400, 1.0, 0.15, 0.2, 0.75),
    "cifar10_agg": (250, 0.0, 0.0, 0.25, 0.75),  # curriculum none: the ramp is off
    "cifar10_mem": (250, 1.0, 0.0, 0.25, 0.75),
}


@pytest.mark.parametrize("name", RAMPS)
def test_adversarial_ramp(name):
    epochs, *rest = RAMPS[name]
    ours = torch.tensor([adversarial_weight(e, epochs, *rest) for e in range(epochs)], dtype=torch.float64)
    close(ours, golden("cudfkd_adv_ramp")[f"{name}.seed"], atol=1e-12)


LOSS_SETTINGS = {
    "kl": {"adv": 0.7, "adv_type": "kl", "T": 20.0, "act": 0.1},
    "js": {"adv": 1.3, "adv_type": "js", "T": 5.0, "bn": 0.5},
    "warm": {"adv": 0.0, "T": 2.0},
    "nobn": {"adv": 6.2, "T": 20.0, "lambda_ent": -5.0, "oh": 0.3, "act": 0.01, "bn": 0.0},
}


@pytest.mark.parametrize("setting", LOSS_SETTINGS)
def test_generator_loss(setting):
    case = golden("cudfkd_generator_loss")
    options = LOSS_SETTINGS[setting]
    t, s, feat, bn = (case[k].clone().requires_grad_() for k in ("t", "s", "feat", "bn_terms"))
    terms = cudfkd_terms(CuDFKDConfig(**options), t, s, feat, bn.sum(), options["adv"])
    loss = sum(terms.values())
    loss.backward()
    close(loss.detach(), case[f"loss_{setting}"])
    for tensor, name in ((t, "t"), (s, "s"), (feat, "feat"), (bn, "bn")):
        ours = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        close(ours, case[f"grad_{name}_{setting}"])


def test_adi_divergence():
    case = golden("adi_js_divergence")
    s, t = case["s"].clone().requires_grad_(), case["t"].clone().requires_grad_()
    divergence = adi_divergence(s, t)
    close(divergence.detach(), case["j"])
    grads = torch.autograd.grad(divergence, (s, t))
    close(grads[0], case["grad_s_j"])
    close(grads[1], case["grad_t_j"])
    competition = adversarial_js(s, t)
    close(competition.detach(), case["adi"])
    close(torch.autograd.grad(competition, s)[0], case["grad_s_adi"])


@pytest.mark.parametrize("kind", ["kl", "l1"])
def test_per_sample_student_loss(kind):
    case = golden("cudfkd_spl_per_sample")
    s = case["s"].clone().requires_grad_()
    losses = kl_per_sample(s, case["t"], 20.0) if kind == "kl" else l1_per_sample(s, case["t"])
    weights = self_paced_weights(losses, 2.0, "log")
    loss = (weights * losses).mean()
    loss.backward()
    close(weights, case[f"v_{kind}"])
    close(loss.detach(), case[f"loss_{kind}"])
    close(s.grad, case[f"grad_{kind}"])


def load_by_order(module: torch.nn.Module, case: dict, prefix: str) -> None:
    """Copy a stored state into a network whose layers come in the same order under other names."""
    values = [v for k, v in case.items() if k.startswith(prefix)]
    own = module.state_dict()
    assert [v.shape for v in own.values()] == [v.shape for v in values]
    module.load_state_dict(dict(zip(own, values, strict=True)))


def golden_method(case: dict, **config) -> CuDFKD:
    """CuDFKD in float64 on the stored networks, drawing the stored latents."""
    net = TinyNet(width=case["T.conv1.weight"].shape[0]).double()
    load_by_order(net, case, "T.")
    options = {"student": "resnet8", "nz": 6, "width": 2, "depth": 2, "T": 20.0, **config}
    method = CuDFKD(CuDFKDConfig(batch_size=case["z"].shape[1], **options), task(teachers=[teacher_view(net)]))
    student = TinyNet(width=case["S.conv1.weight"].shape[0]).double()
    load_by_order(student, case, "S.")
    method.generator.double()
    load_by_order(method.generator, case, "G.")
    method.student_view.module = student
    for view in (method.teacher, method.student_view):
        view._scale, view._shift = (
            1 / torch.tensor(view.std, dtype=torch.float64).view(1, -1, 1, 1),
            -(torch.tensor(view.mean, dtype=torch.float64) / torch.tensor(view.std, dtype=torch.float64)).view(
                1, -1, 1, 1
            ),
        )
    method.optimizer_g = torch.optim.Adam(method.generator.parameters(), lr=1e-3, betas=(0.9, 0.99))
    method.optimizer_s = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    latents = iter(case["z"])
    method.latents = lambda n, rng: next(latents)
    return method


def test_full_generator_update():
    case = golden("cudfkd_generator_update")
    method = golden_method(case, adv=0.7, grad_adv=0.0)
    method.set_modes(generating=True)
    losses = [torch.stack(list(method.generator_step().values())).sum().detach() for _ in range(3)]
    close(torch.stack(losses), case["losses"], rtol=1e-7, atol=1e-9)
    after = [v for k, v in case.items() if k.startswith("after.")]
    for ours, theirs in zip(method.generator.state_dict().values(), after, strict=True):
        close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_full_student_update():
    """Three student steps of the released code, whose self-paced weight is one scalar per batch."""
    case = golden("cudfkd_student_update")
    method = golden_method(case, loss="l1", lambda_0=2.0, granularity="batch")
    method.task.curriculum = Curriculum.named("easy2hard")
    method.step = 400
    method.set_modes(generating=False)
    losses = []
    for _ in range(3):
        losses.append(method.student_step().detach())
        method.step += 1
    close(torch.stack(losses), case["losses"], rtol=1e-7, atol=1e-9)
    assert method.step == int(case["global_iter_after"])
    state = method.student_view.module.state_dict()
    for name, value in state.items():
        close(value, case[f"after.{name}"], rtol=1e-7, atol=1e-9)
    for name, parameter in method.student_view.module.named_parameters():
        close(method.optimizer_s.state[parameter]["momentum_buffer"], case[f"mom.{name}"], rtol=1e-7, atol=1e-9)
    first_bn = next(m for m in method.generator.modules() if isinstance(m, torch.nn.BatchNorm2d))
    close(first_bn.running_mean, case["G_bn_mean_after"], rtol=1e-7, atol=1e-9)
