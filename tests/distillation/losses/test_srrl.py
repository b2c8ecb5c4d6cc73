"""SRRL against the original code's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from synthkit.distillation.contract import Batch, Setup, Shapes, Taps
from synthkit.distillation.losses.srrl import SRRL, srrl_loss
from synthkit.errors import ConfigError, RequirementError

REFERENCE = Path(__file__).parents[2] / "reference"


@pytest.fixture
def golden():
    with np.load(REFERENCE / "srrl.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def setup(classifier: nn.Linear | None, width=10) -> Setup:
    shapes = Shapes(pooled=6), Shapes(pooled=width)
    return Setup(
        student=shapes[0],
        teacher=shapes[1],
        num_classes=12,
        batch_size=8,
        epochs=1,
        images=40,
        teacher_classifier=classifier,
    )


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_equals_the_original_code(golden):
    classifier = nn.Linear(10, 12).double().requires_grad_(False)
    classifier.load_state_dict({"weight": golden["cls.weight"], "bias": golden["cls.bias"]})
    loss = SRRL()
    loss.setup(setup(classifier))
    aux = loss.aux
    assert aux is not None
    aux.double().load_state_dict(
        {k.removeprefix("srrl.transfer."): v for k, v in golden.items() if k.startswith("srrl.transfer.")}, strict=False
    )
    student = golden["f_s"].requires_grad_()
    taps = Taps(logits=torch.zeros(8, 12), pooled=student), Taps(logits=golden["t"], pooled=golden["f_t"])
    value = loss(*taps, Batch(images=torch.zeros(8, 1, 2, 2)))["srrl"]
    assert value.shape == (8,)
    close(value.mean().detach(), golden["out_loss"])
    close(golden["out_loss_feat"] + golden["out_loss_logit"], golden["out_loss"])
    weight = next(aux.parameters())
    gradients = torch.autograd.grad(value.mean(), [student, weight])
    close(gradients[0], golden["out_grad_f_s"])
    close(gradients[1], golden["out_grad_conv_weight"])
    for name in ("running_mean", "running_var"):
        close(aux.state_dict()[f"1.{name}"], golden[f"out_srrl.transfer.1.{name}"])
    assert classifier.weight.grad is None


def test_both_terms_separately(golden):
    f, g, t, p = golden["f_t"], golden["out_feat"], golden["t"], golden["out_pred"]
    close(srrl_loss(g, f, t, t), golden["out_loss_feat"])
    close(srrl_loss(f, f, p, t), golden["out_loss_logit"])
    close(srrl_loss(g, f, p, t, reduction="none").mean(), golden["out_loss"])
    assert torch.autograd.gradcheck(
        lambda x, y: srrl_loss(x, f[:2], y, t[:2]), (g[:2].requires_grad_(), p[:2].requires_grad_())
    )


def test_only_the_projection_is_trained_and_stored():
    loss = SRRL()
    loss.setup(setup(nn.Linear(10, 12)))
    assert loss.aux is not None
    assert sum(p.numel() for p in loss.aux.parameters()) == 6 * 10 + 2 * 10
    assert not any("classifier" in key for key in loss.aux.state_dict())


def test_teachers_without_a_fitting_classifier_are_refused():
    with pytest.raises(RequirementError, match="linear classifier"):
        SRRL().setup(setup(None))
    with pytest.raises(ConfigError, match="input of its classifier"):
        SRRL().setup(setup(nn.Linear(10, 12), width=9))
