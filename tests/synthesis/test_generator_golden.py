"""DAFL, ZSKT, DFAD and DFQ against numbers that the original implementations produced (tests/reference)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthesis.tiny import TinyNet, task, teacher_view
from synthkit.models.generators import build_generator
from synthkit.models.view import TeacherView
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.dafl import DAFL, DAFLConfig, dafl_terms
from synthkit.synthesis.generator.dfad import DFAD, DFADConfig
from synthkit.synthesis.generator.dfq import DFQ, DFQConfig, dfq_terms
from synthkit.synthesis.generator.loop import GeneratorLoop
from synthkit.synthesis.generator.zskt import ZSKT, ZSKTConfig, attention_gap
from synthkit.synthesis.losses import adversarial_kl, adversarial_l1

REFERENCE = Path(__file__).parents[1] / "reference"
LOOSE = {"rtol": 1e-7, "atol": 1e-9}


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms.values())).sum()


# ---- losses ------------------------------------------------------------------------------------------------------


def weighted(form: str, t, s, feat, bn) -> torch.Tensor:
    """The generator loss of the zju benchmark in each of its weightings, by our methods."""
    if form == "dafl":
        config = DAFLConfig(form="benchmark", oh=1.0, act=0.001, balance=20.0)
        return total(dafl_terms(config, t, None, feat, 0.0))
    if form == "dfad":
        return adversarial_l1(s, t)
    zero: dict[str, Any] = {"bn": 0.0, "oh": 0.0, "balance": 0.0} if form == "zskt" else {}
    return total(dfq_terms(DFQConfig(**zero), t, s, bn.sum(), 1.0))


@pytest.mark.parametrize("form", ["dafl", "zskt", "dfad", "dfq"])
def test_generative_loss(form):
    case = golden("generative_loss")
    t, s, feat, bn = (case[k].clone().requires_grad_() for k in ("t", "s", "feat", "bn_terms"))
    loss = weighted(form, t, s, feat, bn)
    loss.backward()
    close(loss.detach(), case[f"loss_{form}"])
    for tensor, name in ((t, "t"), (s, "s"), (feat, "feat")):
        close(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad, case[f"grad_{name}_{form}"])


def test_dafl_losses():
    case = golden("dafl_losses")
    t = case["t"].clone().requires_grad_()
    terms = dafl_terms(DAFLConfig(oh=1.0, balance=1.0, act=1.0), t, None, case["feat"], 0.0)
    for ours, theirs in (("one_hot", "one_hot"), ("balance", "info_entropy"), ("activation", "activation")):
        close(terms[ours].detach(), case[theirs])
    weights = {"mnist": (1.0, 5.0, 0.1), "cifar10": (0.05, 5.0, 0.01), "cifar100": (0.5, 20.0, 0.1)}
    for name, (oh, balance, act) in weights.items():
        loss = total(dafl_terms(DAFLConfig(oh=oh, balance=balance, act=act), t, None, case["feat"], 0.0))
        close(loss.detach(), case[f"total_{name}"])
        if name == "cifar10":
            close(torch.autograd.grad(loss, t)[0], case["grad_t_cifar10"])
    close(DAFL(DAFLConfig(**SMALL), task()).kd_per_sample(case["s"], case["t"]).mean(), case["kd"])


def test_dafl_entropy_is_log10_in_the_original_and_natural_in_the_benchmark():
    t = golden("dafl_losses")["t"]
    one, other = (
        dafl_terms(DAFLConfig(form=form, balance=1.0), t, None, None, 0.0)["balance"]  # type: ignore[arg-type]
        for form in ("original", "benchmark")
    )
    close(other, one * math.log(10))


def test_zskt_losses():
    case = golden("zskt_losses")
    s = case["s"].clone().requires_grad_()
    maps = [case[f"a_s{i}"].clone().requires_grad_() for i in range(3)]
    divergence = -adversarial_kl(s, case["t"]) / 10
    close(-divergence.detach(), case["gen"])
    close(divergence.detach(), case["student_noat"])
    loss = divergence + 250 * sum(attention_gap(m, case[f"a_t{i}"]) for i, m in enumerate(maps))
    close(loss.detach(), case["student"])
    loss.backward()
    close(s.grad, case["grad_s"])
    close(maps[0].grad, case["grad_a_s0"])
    close(maps[2].grad, case["grad_a_s2"])


# ---- whole iterations --------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"student": "convnet_d1_w8_bn", "generator": "small", "nz": 6, "width": 2}


def load_by_order(module: torch.nn.Module, case: dict, prefix: str) -> None:
    """Copy a stored state into a network whose layers come in the same order under other names."""
    values = [v for k, v in case.items() if k.startswith(prefix)]
    own = module.state_dict()
    assert [v.shape for v in own.values()] == [v.shape for v in values]
    module.load_state_dict(dict(zip(own, values, strict=True)))


def tiny(case: dict, prefix: str) -> TinyNet:
    net = TinyNet(width=case[f"{prefix}conv1.weight"].shape[0]).double()
    load_by_order(net, case, prefix)
    return net


def stored_method(method: type, config: Any, case: dict, *, normalised: bool, **of_task: Any) -> Any:
    """A method in float64 on the stored networks, drawing the stored latents."""
    plain = {"mean": [0.0] * 3, "std": [1.0] * 3, "input_size": (3, 8, 8), "num_classes": 10, "name": "tiny"}
    net = tiny(case, "T.").float()
    teacher = teacher_view(net) if normalised else TeacherView(net, **plain)
    made = method(config, task(teachers=[teacher], curriculum=Curriculum.named("none"), **of_task))
    load_by_order(net.double(), case, "T.")
    made.generator = build_generator("small", latent_dim=6, image_size=8, channels=3, width=2).double()
    load_by_order(made.generator, case, "G.")
    made.student_view.module = tiny(case, "S.")
    for view in (made.teacher, made.student_view):
        std, mean = (torch.tensor(x, dtype=torch.float64).view(1, -1, 1, 1) for x in (view.std, view.mean))
        view._scale, view._shift = 1 / std, -mean / std
    made.optimizer_s = made._student_optimizer()
    made.optimizer_g = torch.optim.Adam(made.generator.parameters(), lr=config.lr_g, betas=config.betas_g)
    latents = iter(case["z"] if case["z"].ndim == 3 else [case["z"]])
    made.latents = lambda n, rng: next(latents)
    return made


def same_state(network: torch.nn.Module, case: dict, prefix: str) -> None:
    after = [v for k, v in case.items() if k.startswith(prefix)]
    for ours, theirs in zip(network.state_dict().values(), after, strict=True):
        close(ours, theirs, **LOOSE)


class Losses(list):
    """What every step of a method minimised, in order."""

    def __init__(self, method: Any):
        super().__init__()
        learn, note = method.learn, method.note_generator

        def learnt(images):
            loss = learn(images)
            self.append(loss.detach())
            return loss

        def noted(terms, loss):
            self.append(loss.detach())
            note(terms, loss)

        method.learn, method.note_generator = learnt, noted


@pytest.mark.parametrize(("betas", "after"), [((0.5, 0.999), "after."), ((0.9, 0.99), "after_seed.")])
def test_dfq_generator_update(betas, after):
    case = golden("generative_update")
    config = DFQConfig(**SMALL, batch_size=case["z"].shape[1], betas_g=betas)
    method = stored_method(DFQ, config, case, normalised=True)
    method.set_modes(generating=True)
    losses = Losses(method)
    for _ in range(2):
        method.generator_step()
    close(torch.stack(losses), case["losses"], **LOOSE)
    same_state(method.generator, case, after)


def test_dafl_iteration():
    """One iteration of the original: both networks learn from one batch."""
    case = golden("dafl_update")
    method = stored_method(DAFL, DAFLConfig(**SMALL, batch_size=8), case, normalised=False)
    losses = Losses(method)
    method.run_cycle(1)
    close(torch.stack(losses).sum(), case["loss"], **LOOSE)
    same_state(method.generator, case, "afterG.")
    same_state(method.student_view.module, case, "afterS.")


def test_zskt_cycle():
    """One cycle of the original: one latent batch, images made anew at every call, the teacher asked once."""
    case = golden("zskt_cycle")
    method = stored_method(ZSKT, ZSKTConfig(**SMALL, batch_size=6, kd_steps=3), case, normalised=False)
    del method.latents  # the method's own keep the latents of the cycle
    drawn: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GeneratorLoop, "latents", lambda self, n, rng: drawn.append(n) or case["z"])
        losses = Losses(method)
        method.run_cycle(3)
    assert drawn == [6]
    close(torch.stack(losses), case["losses"], **LOOSE)
    same_state(method.generator, case, "afterG.")
    same_state(method.student_view.module, case, "afterS.")


def test_dfad_iteration():
    """One iteration of the original: five student steps, then the generator's, all in train mode."""
    case = golden("dfad_iteration")
    method = stored_method(DFAD, DFADConfig(**SMALL, batch_size=6), case, normalised=False)
    losses = Losses(method)
    method.run_cycle(5)
    close(torch.stack(losses), case["losses"], **LOOSE)
    same_state(method.generator, case, "afterG.")
    same_state(method.student_view.module, case, "afterS.")
