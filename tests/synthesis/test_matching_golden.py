"""Matching against numbers that the original implementations produced (tests/reference)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synthkit.models.build import build_model
from synthkit.synthesis.curriculum import trajectory_window
from synthkit.synthesis.matching import engines
from synthkit.synthesis.matching.dc import loops_of
from synthkit.synthesis.matching.distances import gradient_distance, soft_cross_entropy
from synthkit.synthesis.matching.dm import distribution_loss
from synthkit.synthesis.matching.engines import ENGINES, InnerRun
from synthkit.synthesis.matching.flat import FlatNetwork, flattened

REFERENCE = Path(__file__).parents[1] / "reference"


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def close(a, b, rtol=1e-8, atol=1e-11):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("kind", "name"), [("rows", "ours"), ("mse", "mse"), ("cos", "cos")])
def test_gradient_distance(kind, name):
    case = golden(f"dc_match_{name}")
    count = sum(key.startswith("gr") for key in case)
    real = [case[f"gr{i}"] for i in range(count)]
    synthetic = [case[f"gs{i}"].requires_grad_() for i in range(count)]
    loss = gradient_distance(synthetic, real, kind)
    close(loss, case["loss"])
    found = torch.autograd.grad(loss, synthetic, allow_unused=True)
    for i, gradient in enumerate(found):
        close(torch.zeros_like(synthetic[i]) if gradient is None else gradient, case[f"dgs{i}"])


@pytest.mark.parametrize("kind", ["rows", "mse", "cos"])
def test_distance_of_equal_gradients_is_zero(kind):
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(s, generator=draw, dtype=torch.float64) for s in ((6, 3, 3, 3), (6,), (10, 32))]
    close(gradient_distance(gradients, gradients, kind), torch.zeros((), dtype=torch.float64), atol=1e-5)
    opposite = gradient_distance([-g for g in gradients], gradients, kind)
    if kind == "rows":  # 2 for every output row of a matrix or kernel, nothing for the bias
        close(opposite, torch.tensor(2.0 * 16, dtype=torch.float64), rtol=1e-5)
    assert opposite > 1


def test_loops():
    case = golden("dc_loops")
    assert [list(loops_of(int(ipc))) for ipc in case["ipc"]] == case["outer_inner"].tolist()
    assert loops_of(5) == (1, 1) and loops_of(11) == (10, 50) and loops_of(1000) == (100, 2)


@pytest.mark.parametrize("name", ["dm_loss", "dm_loss_bn"])
def test_distribution_loss(name):
    case = golden(name)
    real, synthetic = case["real"].flatten(2), case["syn"].requires_grad_()
    loss = distribution_loss(list(real), list(synthetic.flatten(1).split(len(synthetic) // len(real))))
    close(loss, case["loss"])
    close(torch.autograd.grad(loss, synthetic)[0], case["dsyn"])


def test_soft_cross_entropy():
    case = golden("datm_soft_ce")
    logits, labels = case["logits"].requires_grad_(), case["label_logits"].requires_grad_()
    loss = soft_cross_entropy(logits, labels)
    close(loss, case["loss"])
    for found, wanted in zip(
        torch.autograd.grad(loss, [logits, labels]), (case["dlogits"], case["dlabels"]), strict=True
    ):
        close(found, wanted)


def test_window():
    case = golden("datm_range")
    assert [trajectory_window(int(i), 10, 20, 1000) for i in case["it"]] == case["upper_sequential"].tolist()
    assert set(case["upper_off"].tolist()) == {20}
    assert trajectory_window(0, 3, 9, 5) == 3 and trajectory_window(5, 3, 9, 5) == trajectory_window(99, 3, 9, 5) == 9


def recorded_run(case: dict[str, torch.Tensor], size: int, monkeypatch) -> InnerRun:
    """The inner run of a golden case; `minibatches` is fed the permutations that the original drew."""
    network = FlatNetwork(build_model("convnet_d2_w4", num_classes=4, image_size=8, seed=0).double())
    assert network.size == len(case["theta0"])
    rows = iter(case["perms"])
    with monkeypatch.context() as patch:
        patch.setattr(engines.torch, "randperm", lambda *_, **__: next(rows), raising=False)
        batches = engines.minibatches(len(case["images"]), size, 3, torch.Generator())

    def loss(theta, images, labels):
        logits = network(theta, images)
        return soft_cross_entropy(logits, labels) if labels.is_floating_point() else F.cross_entropy(logits, labels)

    return InnerRun(loss=loss, start=case["theta0"], target=case["expert2"], batches=batches, augment=[lambda x: x] * 3)


@pytest.mark.parametrize(
    ("name", "size", "engine"),
    [
        ("mtt_step", 8, "sweep"),
        ("mtt_step", 8, "unroll"),
        ("mtt_step_minibatch", 5, "sweep"),
        ("mtt_step_minibatch", 5, "unroll"),
        ("datm_step", 5, "sweep"),
        ("datm_step", 5, "unroll"),
        ("datm_tesla_step", 5, "tesla"),
        ("tesla_step", 5, "tesla_as_released"),
    ],
)
def test_meta_step(name, size, engine, monkeypatch):
    case = golden(name)
    run = recorded_run(case, size, monkeypatch)
    found = ENGINES[engine](run, case["images"], case["labels"], case["alpha"])
    close(found.loss, case["loss"])
    close(found.pixels, case["dimages"])
    close(found.alpha, case["dalpha"])
    if "dlabels" in case:
        close(found.labels, case["dlabels"])
    else:
        assert found.labels is None


def test_flat_vector_is_a_copy_in_parameter_order():
    network = build_model("convnet_d2_w4", num_classes=4, image_size=8, seed=0)
    theta = flattened(network)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    close(FlatNetwork(network)(theta, images), network(images))
    with torch.no_grad():
        next(network.parameters()).add_(1.0)
    assert not torch.equal(theta, flattened(network)) and theta.untyped_storage().size() == 4 * len(theta)
