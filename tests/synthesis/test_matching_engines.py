"""The gradient engines against each other, and what they hold in memory."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from synthkit.data.dsa import apply, draw
from synthkit.models.build import build_model
from synthkit.synthesis.matching.distances import soft_cross_entropy
from synthkit.synthesis.matching.engines import ENGINES, Gradients, InnerRun, minibatches
from synthkit.synthesis.matching.flat import FlatNetwork, flattened
from synthkit.synthesis.memory import SavedBytes

CLASSES, SIDE, COUNT = 4, 8, 6


def problem(
    steps: int, *, soft: bool = False, size: int = 4, strategy: str = "color_crop_cutout_scale_rotate", norm: str = ""
) -> tuple[InnerRun, torch.Tensor, torch.Tensor]:
    """A run in float64 with minibatches and augmentation, its pixels and labels."""
    generator = torch.Generator().manual_seed(3)
    module = build_model(f"convnet_d2_w4{norm}", num_classes=CLASSES, image_size=SIDE, seed=0).double()
    network, start = FlatNetwork(module), flattened(module)
    target = start + 0.02 * torch.randn(start.shape, generator=generator, dtype=torch.float64)
    pixels = torch.randn(COUNT, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    labels = (
        torch.randn(COUNT, CLASSES, generator=generator, dtype=torch.float64) if soft else torch.arange(6) % CLASSES
    )
    batches = minibatches(COUNT, size, steps, generator)
    records = [
        draw(strategy, len(b), SIDE, generator, siamese=False, dtype=torch.float64, device="cpu") for b in batches
    ]

    def loss(theta, images, y):
        logits = network(theta, images)
        return soft_cross_entropy(logits, y) if y.is_floating_point() else F.cross_entropy(logits, y)

    run = InnerRun(
        loss=loss,
        start=start,
        target=target,
        batches=batches,
        augment=[functools.partial(apply, record=record) for record in records],
    )
    return run, pixels, labels


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def differences(found: Gradients, wanted: Gradients) -> list[float]:
    pairs = [(found.loss, wanted.loss), (found.pixels, wanted.pixels), (found.alpha, wanted.alpha)]
    if wanted.labels is not None:
        assert found.labels is not None
        pairs.append((found.labels, wanted.labels))
    return [relative(a, b) for a, b in pairs]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_sweep_equals_unrolling(steps, soft):
    run, pixels, labels = problem(steps, soft=soft)
    alpha = torch.tensor(0.05, dtype=torch.float64)
    found, wanted = (ENGINES[name](run, pixels, labels, alpha) for name in ("sweep", "unroll"))
    assert max(differences(found, wanted)) < 1e-10
    assert (found.labels is not None) == soft
    assert run.start.grad is None and not run.start.requires_grad and not pixels.requires_grad


def test_sweep_equals_unrolling_with_batchnorm():
    run, pixels, labels = problem(5, norm="_bn")
    alpha = torch.tensor(0.05, dtype=torch.float64)
    found, wanted = (ENGINES[name](run, pixels, labels, alpha) for name in ("sweep", "unroll"))
    assert max(differences(found, wanted)) < 1e-10


def test_unrolling_equals_finite_differences():
    """The reference itself, in the direction of a random change of pixels and step size."""
    run, pixels, labels = problem(3)
    alpha, h = torch.tensor(0.05, dtype=torch.float64), 1e-6
    way = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = ENGINES["unroll"](run, pixels, labels, alpha)
    up, down = (ENGINES["unroll"](run, pixels + s * h * way, labels, alpha + s * h).loss for s in (1, -1))
    slope = (up - down) / (2 * h)
    torch.testing.assert_close(slope, (found.pixels * way).sum() + found.alpha, rtol=1e-5, atol=1e-9)


def test_tesla_is_exact_for_one_step_only():
    alpha = torch.tensor(0.05, dtype=torch.float64)
    run, pixels, labels = problem(1, soft=True)
    assert (
        max(differences(ENGINES["tesla"](run, pixels, labels, alpha), ENGINES["unroll"](run, pixels, labels, alpha)))
        < 1e-10
    )
    run, pixels, labels = problem(10)
    tesla, exact = ENGINES["tesla"](run, pixels, labels, alpha), ENGINES["unroll"](run, pixels, labels, alpha)
    assert relative(tesla.loss, exact.loss) < 1e-10 and relative(tesla.pixels, exact.pixels) > 1e-3
    released = ENGINES["tesla_as_released"](run, pixels, labels, alpha)
    assert torch.equal(released.pixels, tesla.pixels / 2) and torch.equal(released.alpha, tesla.alpha)


def test_only_unrolling_holds_every_step():
    held: dict[str, list[int]] = {}
    for name in ("sweep", "tesla", "unroll"):
        for steps in (5, 20):
            run, pixels, labels = problem(steps, size=COUNT, strategy="none")
            alpha = torch.tensor(0.05, dtype=torch.float64)
            with SavedBytes() as saved:
                found = ENGINES[name](run, pixels, labels, alpha)
            assert max(differences(found, ENGINES[name](run, pixels, labels, alpha))) < 1e-12, "counting changed it"
            held.setdefault(name, []).append(saved.bytes)
            assert saved._alive == 0, f"{name} left a graph behind"
    for name in ("sweep", "tesla"):
        assert held[name][1] < 1.1 * held[name][0] < held["unroll"][0]
    assert held["unroll"][1] > 3 * held["unroll"][0]


def test_a_gradient_that_is_not_finite_is_told():
    run, pixels, labels = problem(2)
    found = ENGINES["sweep"](run, pixels, labels, torch.tensor(0.05, dtype=torch.float64))
    assert found.finite()
    pixels[0, 0, 0, 0] = float("nan")
    assert not ENGINES["sweep"](run, pixels, labels, torch.tensor(0.05, dtype=torch.float64)).finite()


def test_minibatches_use_every_image_before_any_comes_again():
    batches = minibatches(7, 3, 6, torch.Generator().manual_seed(0))
    assert [len(b) for b in batches] == [1, 3, 3, 1, 3, 3]
    for half in (batches[:3], batches[3:]):
        assert sorted(torch.cat(half).tolist()) == list(range(7))
    assert all(len(b) == 7 for b in minibatches(7, 100, 3, torch.Generator()))
