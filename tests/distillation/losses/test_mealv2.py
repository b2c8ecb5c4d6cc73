"""MEAL V2 against the original code's numbers; the discriminator with and without reversal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthkit.distillation.contract import Batch, Setup, Shapes, Taps
from synthkit.distillation.losses.mealv2 import MEALV2, build_discriminator, discriminator_loss, ensemble_ce
from synthkit.errors import ConfigError
from synthkit.logits import soft_ce_per_sample

BATCH = Batch(images=torch.zeros(6, 1, 2, 2))


@pytest.fixture
def case():
    with np.load(Path(__file__).parents[2] / "reference" / "mealv2.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def made(classes: int, **options: Any) -> MEALV2:
    loss = MEALV2(MEALV2.Config(**options))
    shapes = Shapes(), Shapes()
    loss.setup(Setup(student=shapes[0], teacher=shapes[1], num_classes=classes, batch_size=6, epochs=1, images=6))
    return loss


def released(case, **options: Any) -> MEALV2:
    loss = made(64, divisor=4, **options)
    assert loss.aux is not None
    loss.aux.double().load_state_dict(
        {
            f"{2 * (n - 1)}.{kind}": case[f"disc.conv{n}.{kind}"].flatten(1 if kind == "weight" else 0)
            for n in (1, 2, 3)
            for kind in ("weight", "bias")
        }
    )
    return loss


def test_step_equals_the_original_code(case):
    loss = released(case)
    assert loss.aux is not None
    s = case["s"].clone().requires_grad_()
    members = [case["t1"], case["t2"]]
    value = ensemble_ce(s, members)
    close(value.detach(), case["out_g"])
    close(torch.autograd.grad(value, s)[0], case["out_grad_s_g"])
    d = discriminator_loss(loss.aux, s, case["out_mean_teacher_logits"])
    close(d.detach(), case["out_d"])
    close(torch.autograd.grad(d, s)[0], case["out_grad_s_d"])
    taps = Taps(logits=case["t1"], members=members)  # members go before the combined logits
    parts = loss(Taps(logits=s), taps, BATCH)
    assert all(v.shape == (6,) for v in parts.values())
    close(parts["mealv2"].mean().detach(), case["out_g"])
    torch.testing.assert_close(parts["discriminator"].mean().double(), case["out_d"], rtol=1e-6, atol=0)
    total = ensemble_ce(s, members) + discriminator_loss(loss.aux, s, torch.stack(members).mean(dim=0))
    grads = torch.autograd.grad(total, [s, *loss.aux.parameters()])
    close(grads[0], case["out_grad_s"])
    names = [f"out_grad_disc.conv{n}.{kind}" for n in (1, 2, 3) for kind in ("weight", "bias")]
    for name, grad in zip(names, grads[1:], strict=True):
        close(grad, case[name].view_as(grad))
        assert name != "out_grad_disc.conv1.weight" or float(grad.abs().sum()) > 0


def test_reversal_turns_the_student_only(case):
    s = case["s"].clone().requires_grad_()
    grads = []
    for reverse in (False, True):
        aux = released(case, reverse=reverse).aux
        assert aux is not None
        value = discriminator_loss(aux, s, case["out_mean_teacher_logits"], reverse=reverse)
        close(value.detach(), case["out_d"])
        grads.append(torch.autograd.grad(value, [s, *aux.parameters()]))
    close(grads[1][0], -case["out_grad_s_d"])
    for plain, turned in zip(grads[0][1:], grads[1][1:], strict=True):
        close(turned, plain)
    # the option of the loss reaches it
    parts = [released(case, reverse=r)(Taps(logits=s), Taps(logits=case["t1"]), BATCH) for r in (False, True)]
    turned = [torch.autograd.grad(p["discriminator"].sum(), s)[0] for p in parts]
    assert float(turned[0].abs().sum()) > 0
    torch.testing.assert_close(turned[0], -turned[1])


def test_one_teacher_is_soft_cross_entropy(case):
    close(ensemble_ce(case["s"], [case["t1"]], reduction="none"), soft_ce_per_sample(case["s"], case["t1"]))
    probabilities = (case["t1"].softmax(1) + case["t2"].softmax(1)) / 2
    close(case["out_soft"], probabilities)
    combined = probabilities.log()  # the logits of an ensemble of probabilities
    close(ensemble_ce(case["s"], [combined]), case["out_g"])


def test_gradients(case):
    s = case["s"][:2].clone().requires_grad_()
    members = [case["t1"][:2], case["t2"][:2]]
    assert torch.autograd.gradcheck(lambda x: ensemble_ce(x, members, reduction="none"), s)
    aux = released(case).aux
    assert aux is not None
    mean = case["out_mean_teacher_logits"][:2]
    assert torch.autograd.gradcheck(lambda x: discriminator_loss(aux, x, mean, reduction="none"), s)


def test_widths_and_parameters():
    sizes = [m.in_features for m in build_discriminator(1000, 8) if isinstance(m, torch.nn.Linear)]
    assert sizes == [1000, 125, 15]
    assert sum(p.numel() for p in build_discriminator(1000, 8).parameters()) == 125_125 + 1_890 + 32
    sizes = [m.in_features for m in build_discriminator(10, 8) if isinstance(m, torch.nn.Linear)]
    assert sizes == [10, 1, 1]


def test_without_discriminator():
    loss = made(10, discriminator=0.0)
    assert loss.aux is None
    assert set(loss(Taps(logits=torch.randn(6, 10)), Taps(logits=torch.randn(6, 10)), BATCH)) == {"mealv2"}


def test_bad_options_are_refused():
    options: list[dict[str, Any]] = [{"discriminator": -1.0}, {"divisor": 0}]
    for bad in options:
        with pytest.raises(ConfigError, match=f"loss.{next(iter(bad))}"):
            MEALV2.Config(**bad)
