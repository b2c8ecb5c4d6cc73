"""IKL and GKL: the originals' numbers, the closed form, and the class priors over epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthkit.distillation.contract import Batch, Setup, Shapes, Taps
from synthkit.distillation.losses.gkl import GKL, gkl_loss
from synthkit.distillation.losses.ikl import IKL, ikl_loss, weighted_mse
from synthkit.distillation.losses.kd import kd_loss
from synthkit.errors import ConfigError

REFERENCE = Path(__file__).parents[2] / "reference"
IKL_CASE: dict[str, Any] = {"alpha": 1.0, "beta": 12.0, "temperature": 4.0, "weight_temperature": 100.0}
GKL_CASE: dict[str, Any] = {"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "weight_temperature": 4.0}


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def close(found, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=rtol, atol=atol)


def value_and_gradient(loss, student):
    student = student.clone().requires_grad_()
    value = loss(student)
    return value.detach(), torch.autograd.grad(value, student)[0]


def ready(loss: Any, classes: int = 10) -> Any:
    """The loss after `setup`, its tables in double precision as the golden numbers are."""
    shapes = Shapes()
    loss.setup(Setup(student=shapes, teacher=shapes, num_classes=classes, batch_size=8, epochs=3, images=100))
    if loss.aux is not None:
        loss.aux.double()
        loss.aux.prior.fill_(1 / classes)  # 0.1 in single precision is another number
    return loss


def feed(loss, student, teacher, labels, epoch: float = 0.0) -> dict[str, Any]:
    batch = Batch(images=torch.zeros(len(student), 1, 1, 1), labels=labels, epoch=epoch)
    return loss(Taps(logits=student), Taps(logits=teacher), batch)


@pytest.mark.parametrize("on", [0, 1])
def test_ikl_is_the_original(on):
    case = golden("ikl_v1")
    prior = case["prior"][case["y"]] if on else None
    value, gradient = value_and_gradient(lambda s: ikl_loss(s, case["t"], prior, **IKL_CASE), case["s"])
    close(value, case[f"out_gi{on}"])
    close(gradient, case[f"out_grad_s_gi{on}"])
    close(ikl_loss(case["s"], case["t"], prior, **{**IKL_CASE, "alpha": 0.0, "beta": 1.0}), case[f"out_gi{on}_mse"])
    close(ikl_loss(case["s"], case["t"], **{**IKL_CASE, "beta": 0.0}), case["out_gi0_sce"])


@pytest.mark.parametrize("gamma", [0, 0.3, 0.6, 1])
@pytest.mark.parametrize("on", [0, 1])
def test_gkl_is_the_original(gamma, on):
    case = golden("gkl_v2")
    prior = case["prior"][case["y"]] if on else None
    options: dict[str, Any] = {**GKL_CASE, "gamma": float(gamma)}
    value, gradient = value_and_gradient(lambda s: gkl_loss(s, case["t"], prior, **options), case["s"])
    key = f"out_g{gamma}_gi{on}"
    close(value, case[key])
    close(gradient, case[f"{key}_grad_s"])
    close(gkl_loss(case["s"], case["t"], prior, **{**options, "alpha": 0.0, "beta": 1.0}), case[f"{key}_mse"])
    per_sample = gkl_loss(case["s"], case["t"], prior, **options, reduction="none")
    close(per_sample.mean(), case[key])


def test_closed_form_is_the_sum_over_pairs():
    generator = torch.Generator().manual_seed(6)
    s, t, w = (torch.rand(5, 6, dtype=torch.float64, generator=generator) for _ in range(3))
    naive = []
    for row, weights in zip((s - t).tolist(), w.tolist(), strict=True):
        pairs = [(weights[j] * weights[k], row[j] - row[k]) for j in range(6) for k in range(6)]
        naive.append(0.25 * sum(both * gap**2 for both, gap in pairs))
    close(weighted_mse(s, t, w), torch.tensor(naive, dtype=torch.float64), rtol=1e-12)
    offset = weighted_mse(s.float() + 1e4, t.float(), w.float())  # a common offset costs no digits but the input's own
    close(offset.double(), torch.tensor(naive, dtype=torch.float64), rtol=2e-2, atol=1e-3)


def test_the_squares_are_what_kl_lacks():
    """With beta 0 the gradient is KL's over T^2; the weighted squares add to it."""
    case = golden("ikl_v1")
    s, t = case["s"], case["t"]
    _, kl = value_and_gradient(lambda x: kd_loss(x, t, temperature=4.0), s)
    _, plain = value_and_gradient(lambda x: ikl_loss(x, t, beta=0.0), s)
    close(plain, kl / 16)
    _, both = value_and_gradient(lambda x: ikl_loss(x, t, beta=8.0), s)
    assert float((both - plain).norm()) > float(plain.norm())


def test_gamma_one_is_ikl():
    case = golden("gkl_v2")
    options: dict[str, Any] = {"alpha": 1.0, "beta": 3.0, "temperature": 4.0, "weight_temperature": 2.0}
    close(gkl_loss(case["s"], case["t"], gamma=1.0, **options), ikl_loss(case["s"], case["t"], **options))


@pytest.mark.parametrize("loss", [ikl_loss, gkl_loss])
def test_gradients(loss):
    case = golden("ikl_v1")
    s, t, prior = case["s"][:4], case["t"][:4], case["prior"][:4]
    for rows in (None, prior):
        assert torch.autograd.gradcheck(
            lambda x, rows=rows: loss(x, t, rows, reduction="none"), s.clone().requires_grad_()
        )


@pytest.mark.parametrize("loss", [ikl_loss, gkl_loss])
def test_extreme_logits_stay_finite(loss):
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = loss(student, torch.tensor([[-1e4, 1e4, 0.0]]))
    value.backward()
    assert bool(torch.isfinite(value)) and student.grad is not None and bool(torch.isfinite(student.grad).all())


# --- the class priors -------------------------------------------------------------------------------------------------


def test_the_prior_of_the_next_epoch_is_the_originals():
    case = golden("ikl_v1")
    loss = ready(IKL(IKL.Config(class_prior=True, beta=12.0)))
    uniform = torch.full((8, 10), 0.1, dtype=torch.float64)
    first = feed(loss, case["s"], case["t"], case["y"], epoch=0.0)
    close(first["ikl_wmse"], 12 * weighted_mse(case["s"], case["t"], uniform))
    feed(loss, torch.zeros_like(case["t_extra"]), case["t_extra"], case["y_extra"], epoch=0.5)
    close(loss.aux.prior, torch.full((10, 10), 0.1, dtype=torch.float64))  # an epoch uses the one before it
    second = feed(loss, case["s"], case["t"], case["y"], epoch=1.0)
    close(loss.aux.prior, case["out_next_prior"])
    rows = case["out_next_prior"][case["y"]]
    close(second["ikl_wmse"], 12 * weighted_mse(case["s"], case["t"], rows))


def test_the_golden_priors_through_the_class():
    case = golden("ikl_v1")
    loss = ready(IKL(IKL.Config(class_prior=True, beta=12.0)))
    loss.aux.prior.copy_(case["prior"])
    found = feed(loss, case["s"], case["t"], case["y"])
    close(found["ikl_wmse"].mean() + found["ikl_soft_ce"].mean(), case["out_gi1"])
    case = golden("gkl_v2")
    loss = ready(GKL(GKL.Config(class_prior=True, beta=8.0, gamma=0.3)))
    loss.aux.prior.copy_(case["prior"])
    found = feed(loss, case["s"], case["t"], case["y"])
    close(found["gkl_wmse"].mean() + found["gkl_soft_ce"].mean(), case["out_g0.3_gi1"])


def test_a_class_without_images_keeps_its_prior():
    """The released table divides by the row's sum, which is 0 / 0 for a class that an epoch did not have."""
    loss = ready(IKL(IKL.Config(class_prior=True, weight_temperature=1.0)), classes=3)
    teacher = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 3.0]], dtype=torch.float64)
    labels = torch.tensor([0, 2])
    feed(loss, torch.zeros_like(teacher), teacher, labels, epoch=0.0)
    released = loss.aux.sums / loss.aux.sums.sum(dim=1, keepdim=True)
    assert bool(released[1].isnan().all())
    feed(loss, torch.zeros_like(teacher), teacher, labels, epoch=1.0)
    expected = torch.stack([teacher[0].softmax(0), torch.full((3,), 1 / 3, dtype=torch.float64), teacher[1].softmax(0)])
    close(loss.aux.prior, expected, rtol=1e-7)


def test_priors_resume():
    case = golden("ikl_v1")
    steps = [(case["s"], case["t"], case["y"], epoch) for epoch in (0.0, 0.5, 1.0, 1.5, 2.0)]
    whole = ready(IKL(IKL.Config(class_prior=True)))
    straight = [feed(whole, *step)["ikl_wmse"] for step in steps]
    before = ready(IKL(IKL.Config(class_prior=True)))
    for step in steps[:3]:
        feed(before, *step)
    after = ready(IKL(IKL.Config(class_prior=True)))
    after.aux.load_state_dict(before.aux.state_dict())
    assert all(
        torch.equal(feed(after, *step)["ikl_wmse"], value) for step, value in zip(steps[3:], straight[3:], strict=True)
    )


def test_mixed_precision_keeps_the_table_exact():
    case = golden("ikl_v1")
    exact, mixed = (ready(IKL(IKL.Config(class_prior=True, weight_temperature=1.0))) for _ in range(2))
    for loss, on in ((exact, False), (mixed, True)):
        loss.aux.float()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            feed(loss, case["s"].float(), case["t"].float(), case["y"])
    assert torch.equal(exact.aux.sums, mixed.aux.sums)


def test_needs():
    assert not IKL().requires.labels and not IKL().requires.relational and ready(IKL()).aux is None
    assert IKL(IKL.Config(class_prior=True)).requires.relational and IKL(IKL.Config(class_prior=True)).requires.labels
    assert GKL().requires.relational and not GKL().requires.labels  # the divisor is the batch's
    assert not GKL(GKL.Config(gamma=0.0)).requires.relational and not GKL(GKL.Config(gamma=1.0)).requires.relational
    assert GKL(GKL.Config(gamma=1.0, class_prior=True)).requires.relational


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_at_gamma_zero_and_one_parts_of_a_batch_average_to_the_whole(gamma):
    case = golden("gkl_v2")
    whole = gkl_loss(case["s"], case["t"], gamma=gamma)
    parts = [gkl_loss(case["s"][i : i + 4], case["t"][i : i + 4], gamma=gamma) for i in (0, 4)]
    close(sum(parts) / 2, whole)
    uneven = [gkl_loss(case["s"][i : i + 4], case["t"][i : i + 4], gamma=0.5) for i in (0, 4)]
    assert abs(float(sum(uneven) / 2 - gkl_loss(case["s"], case["t"], gamma=0.5))) > 1e-6


def test_the_classes_without_priors():
    case = golden("ikl_v1")
    found = feed(IKL(IKL.Config(beta=12.0)), case["s"], case["t"], None)
    assert all(value.shape == (8,) for value in found.values())
    close(found["ikl_wmse"].mean() + found["ikl_soft_ce"].mean(), case["out_gi0"])
    case = golden("gkl_v2")
    found = feed(GKL(GKL.Config(beta=8.0, gamma=0.6)), case["s"], case["t"], None)
    close(found["gkl_wmse"].mean() + found["gkl_soft_ce"].mean(), case["out_g0.6_gi0"])


@pytest.mark.parametrize("kind, option", [(IKL, {"alpha": -1.0}), (IKL, {"temperature": 0.0}), (GKL, {"gamma": 1.5})])
def test_bad_options(kind, option):
    with pytest.raises(ConfigError, match=f"loss.{next(iter(option))}"):
        kind.Config(**option)
