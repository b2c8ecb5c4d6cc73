"""SimKD against the original code's numbers; the deployed network is in tests/distillation/heads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from synthkit.distillation.contract import Batch, Look, Setup, Shapes, Taps
from synthkit.distillation.heads.simkd import projector, shrink
from synthkit.distillation.losses.simkd import SimKD, simkd_loss
from synthkit.errors import ConfigError, ModelError, RequirementError

REFERENCE = Path(__file__).parents[2] / "reference"
CASES = ("f2_s_larger", "f2_t_larger", "f2_equal", "f4_s_larger", "f4_t_larger")


def golden(case: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"simkd_{case}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def setup(student=(6, 8, 8), teacher=(8, 4, 4), classifier: nn.Linear | None = None) -> Setup:
    shapes = {"student": Shapes(maps=[(3, 16, 16), student]), "teacher": Shapes(maps=[teacher])}
    known = {"num_classes": 12, "batch_size": 6, "epochs": 1, "images": 40, "student_points": ["layer1", "layer2"]}
    return Setup(**shapes, **known, teacher_classifier=classifier)


def built(case: dict[str, torch.Tensor], factor: int) -> SimKD:
    classifier = nn.Linear(8, 12).double()
    classifier.load_state_dict({"weight": case["cls.weight"], "bias": case["cls.bias"]})
    loss = SimKD(SimKD.Config(factor=factor))
    loss.setup(setup(tuple(case["f_s"].shape[1:]), tuple(case["f_t"].shape[1:]), classifier))
    state = {k.removeprefix("simkd.transfer."): v for k, v in case.items() if k.startswith("simkd.transfer.")}
    head = loss.aux.double()  # type: ignore[union-attr]  # set up
    head.load_state_dict({**{k: v for k, v in head.state_dict().items() if "num_batches" in k}, **state})
    return loss


@pytest.mark.parametrize("name", CASES)
def test_equals_the_original_code(name):
    case = golden(name)
    loss = built(case, int(name[1]))
    head, student = loss.aux, case["f_s"].requires_grad_()
    assert head is not None
    size = (case["f_t"].shape[2], case["f_t"].shape[3])
    with torch.no_grad():
        close(loss._classifier(head.eval()(shrink(student, size)).mean((2, 3))), case["out_logits_eval"])
    head.train()
    taps = Taps(logits=torch.zeros(6, 12), maps=[student]), Taps(logits=torch.zeros(6, 12), maps=[case["f_t"]])
    value = loss(*taps, Batch(images=torch.zeros(6, 3, 32, 32)))["simkd"]
    assert value.shape == (6,)
    close(value.mean().detach(), case["out_loss"])
    close(simkd_loss(case["out_proj"], case["out_target"]), case["out_loss"])
    close(torch.stack([(p - t).square().mean() for p, t in zip(case["out_proj"], case["out_target"], strict=True)]),
          value.detach())  # fmt: skip
    gradients = torch.autograd.grad(value.mean(), [student, next(head.parameters())])
    close(gradients[0], case["out_grad_f_s"])
    close(gradients[1], case["out_grad_conv0_weight"])
    for layer in (1, 4, 7):
        for kind in ("running_mean", "running_var"):
            close(head.state_dict()[f"{layer}.{kind}"], case[f"out_simkd.transfer.{layer}.{kind}"])


def test_gradients():
    case = golden("f2_equal")
    inputs = case["out_proj"][:1, :2].requires_grad_(), case["out_target"][:1, :2]
    assert torch.autograd.gradcheck(simkd_loss, inputs)


@pytest.mark.parametrize(
    ("student", "factor", "count"),
    [(256, 8, 26_240), (256, 4, 70_400), (256, 2, 214_016), (256, 1, 722_432),
     (1024, 8, 50_816), (1024, 4, 119_552), (1024, 2, 312_320), (1024, 1, 919_040)],
)  # fmt: skip
def test_parameter_counts(student, factor, count):
    head = projector(student, 256, factor)
    assert sum(p.numel() for p in head.parameters()) == count
    width = 256 // factor
    assert count == width * student + 9 * width**2 + width * 256 + 4 * width + 2 * 256


def test_teachers_that_do_not_fit_are_refused():
    with pytest.raises(RequirementError, match="linear classifier"):
        SimKD().setup(setup())
    with pytest.raises(ModelError, match="8 channels, its classifier takes 9"):
        SimKD().setup(setup(classifier=nn.Linear(9, 12)))
    with pytest.raises(ConfigError, match="not be above 8"):
        SimKD(SimKD.Config(factor=9)).setup(setup(classifier=nn.Linear(8, 12)))
    before_relu = dataclasses.replace(setup(classifier=nn.Linear(8, 12)), student_points=["layer1", "layer2@pre"])
    with pytest.raises(ConfigError, match="at the output of a module"):
        SimKD().setup(before_relu)
    with pytest.raises(ConfigError, match="loss.factor"):
        SimKD.Config(factor=0)


def test_a_classifier_that_reads_something_else_is_refused_before_training():
    classifier = nn.Linear(8, 12)
    loss = SimKD()
    loss.setup(setup(classifier=classifier))
    maps = torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(0))

    def look(feature):  # what the classifier of this teacher reads
        with torch.no_grad():
            logits = classifier(feature.mean((2, 3)))
        return lambda: iter([Look(teacher=Taps(logits=logits, maps=[maps]), labels=None, index=torch.arange(5))])

    loss.prepare(look(maps))
    with pytest.raises(ModelError, match="does not read its pooled last map"):
        loss.prepare(look(maps.relu()))  # a WRN: BatchNorm and ReLU follow the last map


def test_maps_of_half_precision_are_compared_in_float32():
    case = golden("f2_equal")
    p, t = case["out_proj"].bfloat16(), case["out_target"].bfloat16()
    assert simkd_loss(p, t).dtype == torch.float32
