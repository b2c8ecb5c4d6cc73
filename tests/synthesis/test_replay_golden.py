"""PRE-DFKD, MB-DFKD and LRA against numbers that the original implementations produced (tests/reference)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from synthesis.tiny import TinyNet, task
from synthkit.models.generators import build_generator
from synthkit.models.view import TeacherView
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.lra import LRA, LRAConfig
from synthkit.synthesis.generator.mbdfkd import CyclicMemory
from synthkit.synthesis.generator.predfkd import PREDFKD, PREDFKDConfig
from synthkit.synthesis.generator.replay import ReplayConfig, replay_terms
from synthkit.synthesis.losses import adversarial_js

REFERENCE = Path(__file__).parents[1] / "reference"
STEPS = {"rtol": 1e-7, "atol": 1e-9}


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


def load_by_order(module: nn.Module, case: dict[str, torch.Tensor], prefix: str) -> None:
    """Copy a stored state into a network whose layers come in the same order under other names."""
    values = [v for k, v in case.items() if k.startswith(prefix)]
    own = module.state_dict()
    assert [v.shape for v in own.values()] == [v.shape for v in values]
    module.load_state_dict(dict(zip(own, values, strict=True)))


def same_state(module: nn.Module, case: dict[str, torch.Tensor], prefix: str) -> None:
    stored = [v for k, v in case.items() if k.startswith(prefix)]
    for ours, theirs in zip(module.state_dict().values(), stored, strict=True):
        close(ours, theirs, **STEPS)


def plain_task(case: dict[str, torch.Tensor]):
    """The stored teacher in float64; the cases hand images over without normalisation."""
    net = TinyNet(width=case["T.conv1.weight"].shape[0]).double()
    load_by_order(net, case, "T.")
    view = TeacherView(net, [0.0] * 3, [1.0] * 3, input_size=(3, 8, 8), num_classes=10, name="golden")
    return task(teachers=[view], curriculum=Curriculum.named("none"))


def set_student(method: Any, case: dict[str, torch.Tensor]) -> None:
    student = TinyNet(width=case["S.conv1.weight"].shape[0]).double()
    load_by_order(student, case, "S.")
    method.student_view.module = student
    method.optimizer_s = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


# ---- the generator's loss ------------------------------------------------------------------------------------


def test_element_mean_divergence():
    case = golden("adi_js_divergence")
    s = case["s"].clone().requires_grad_()
    term = adversarial_js(s, case["t"], mean="element")
    close(term.detach(), case["pre"])
    close(torch.autograd.grad(term, s)[0], case["grad_s_pre"])


def test_novel_loss():
    case = golden("predfkd_novel_loss")
    t, s, feat = (case[k].clone().requires_grad_() for k in ("t", "s", "feat"))
    terms = replay_terms(ReplayConfig(), t, s, feat, 1.0)
    loss = torch.stack(list(terms.values())).sum()
    close(loss.detach(), case["loss"])
    close(terms["adversarial"].detach(), case["disagreement"])
    for ours, name in zip(torch.autograd.grad(loss, (t, s)), ("t", "s"), strict=True):
        close(ours, case[f"grad_{name}"])


# ---- PRE-DFKD ------------------------------------------------------------------------------------------------


class TinyEncoder(nn.Module):
    """The encoder of the golden case: two linear heads."""

    def __init__(self, inputs: int, latents: int):
        super().__init__()
        self.mu, self.lv = nn.Linear(inputs, latents), nn.Linear(inputs, latents)

    def forward(self, x):
        return self.mu(x.flatten(1)), self.lv(x.flatten(1))


def predfkd(case: dict[str, torch.Tensor], leak: bool) -> PREDFKD:
    """PRE-DFKD on the stored networks, drawing the stored latents; one student step is a cycle."""
    config = PREDFKDConfig(
        batch_size=8, memory_share=3 / 8, nz=6, width=2, kd_steps=1, vae_steps=1, student="resnet8", leak=leak
    )
    method = PREDFKD(config, plain_task(case))
    for name, prefix in (("generator", "G."), ("memory", "M.")):
        network = build_generator("small", latent_dim=6, image_size=8, channels=3, width=2).double()
        load_by_order(network, case, prefix)
        setattr(method, name, network)
    method.encoder = TinyEncoder(192, 6).double()  # type: ignore[assignment]  # stands for the real one
    load_by_order(method.encoder, case, "E.")
    set_student(method, case)
    method.optimizer_g = torch.optim.Adam(method.generator.parameters(), lr=config.lr_g, betas=config.betas_g)
    method.optimizer_v = torch.optim.Adam(
        [*method.memory.parameters(), *method.encoder.parameters()], lr=config.lr_memory
    )
    z, z_mem = case["z"], case["z_mem"]
    draws = iter([z[0], z[1], z_mem[0], case["eps1"], z[2], z_mem[1], z_mem[2], case["eps2"]])

    def latents(n: int, rng: torch.Generator) -> torch.Tensor:
        values = next(draws)
        assert len(values) == n
        return values.clone()

    method.latents = latents
    return method


def predfkd_losses(method: PREDFKD, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """One generator step and two student steps; the losses in the order in which the original walks back."""
    losses: list[torch.Tensor] = []
    rehearse, vae_step, learn = method.rehearse, method.vae_step, method.learn

    def noting(function, pick):
        def call(*args):
            value = function(*args)
            losses.append(pick(value).detach())
            return value

        return call

    monkeypatch.setattr(method, "rehearse", noting(rehearse, lambda pair: pair[1]))
    monkeypatch.setattr(method, "vae_step", noting(vae_step, lambda loss: loss))
    monkeypatch.setattr(method, "learn", noting(learn, lambda loss: loss))
    method.set_modes(generating=True)
    losses.append(torch.stack(list(method.generator_step().values())).sum().detach())
    method.set_modes(generating=False)
    for _ in range(2):
        method.student_step()
        method.step += 1
    return losses


def test_predfkd_steps_as_released(monkeypatch):
    case = golden("predfkd_steps")
    method = predfkd(case, leak=True)
    losses = predfkd_losses(method, monkeypatch)
    close(torch.stack(losses), case["losses"], **STEPS)
    for network, prefix in (
        (method.generator, "G_after."),
        (method.memory, "M_after."),
        (method.encoder, "E_after."),
        (method.student_view.module, "S_after."),
    ):
        same_state(network, case, prefix)


def test_predfkd_steps_without_the_leak(monkeypatch):
    """Both values: all losses are equal up to the last update, which moves the memory generator elsewhere."""
    case = golden("predfkd_steps")
    method = predfkd(case, leak=False)
    losses = predfkd_losses(method, monkeypatch)
    close(torch.stack(losses), case["losses"], **STEPS)
    for network, prefix in (
        (method.generator, "G_after."),
        (method.encoder, "E_after."),
        (method.student_view.module, "S_after."),
    ):
        same_state(network, case, prefix)
    weights = [p.detach().flatten() for p in method.memory.parameters()]
    released = [v.flatten() for k, v in case.items() if k.startswith("M_after.") and k.endswith(("weight", "bias"))]
    before = [v.flatten() for k, v in case.items() if k.startswith("M.") and k.endswith(("weight", "bias"))]
    ours, theirs, start = map(torch.cat, (weights, released, before))
    assert (ours - theirs).norm() > 0.05 * (theirs - start).norm()


# ---- MB-DFKD -------------------------------------------------------------------------------------------------


def test_cyclic_memory():
    order = golden("mbdfkd_memory_step")["order"].tolist()
    memory = CyclicMemory(4)
    for push, slots in enumerate(order):
        memory.push(torch.full((1, 1, 1, 1), float(push)))
        held = [int(entry.item()) for entry in memory.entries]
        assert held + [-1] * (4 - len(held)) == slots


# ---- LRA -----------------------------------------------------------------------------------------------------


def lra(case: dict[str, torch.Tensor], released: bool) -> LRA:
    method = LRA(
        LRAConfig(batch_size=5, nz=6, width=2, student="resnet8", lr_inner=0.9, released=released), plain_task(case)
    )
    set_student(method, case)
    method.set_modes(generating=False)
    return method


def gradients(method: LRA, case: dict[str, torch.Tensor], prefix: str) -> None:
    for name, parameter in method.student_view.module.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad, case[f"{prefix}.{name}"], **STEPS)


def test_lra_meta_step_as_released():
    case = golden("lra_meta_step")
    method = lra(case, released=True)
    losses = []
    for call in range(2):
        images = torch.cat([case["x"][call], case["xm"][call]])
        if call == 0:
            first = method.distil(images).per_sample.mean()
            method = lra(case, released=True)  # the look above moved the BatchNorm statistics
            close(first.detach(), case["loss_kd_first"], **STEPS)
        losses.append(method.learn(images).detach())
        if call == 0:
            gradients(method, case, "grad1")
    close(torch.stack(losses), case["losses"], **STEPS)
    same_state(method.student_view.module, case, "S_after.")


def test_lra_meta_step_as_meant():
    """The default: the same loss, with the second-order gradient that the published algorithm calls for."""
    case = golden("lra_meta_step")
    method = lra(case, released=False)
    loss = method.learn(torch.cat([case["x"][0], case["xm"][0]]))
    close(loss.detach(), case["intended.total"], **STEPS)
    close(loss.detach(), case["losses"][0], **STEPS)
    gradients(method, case, "intended")
    assert not torch.allclose(case["intended.conv1.weight"], case["grad1.conv1.weight"])
