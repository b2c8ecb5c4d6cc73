"""Augmentation against naive loops that draw the same numbers."""

from __future__ import annotations

import math
import time

import pytest
import torch

from synthkit.data import augment as module
from synthkit.data.augment import augment, check_policy
from synthkit.data.policies import POLICIES
from synthkit.errors import ConfigError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 16, shape: tuple[int, int, int] = (3, 32, 32)) -> torch.Tensor:
    return torch.rand((n, *shape), generator=seeded(99))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 9, 14)])
def test_shape_range_and_repeatability(policy, shape):
    for images in (batch(8, shape), (batch(8, shape) * 255).to(torch.uint8), batch(8, shape).half()):
        state = torch.random.get_rng_state()
        once, again, other = (augment(images, policy, seeded(s)) for s in (1, 1, 2))
        assert once.shape == images.shape and once.dtype == images.dtype
        assert torch.equal(once, again) and (policy == "none" or not torch.equal(once, other))
        top = 255 if images.dtype == torch.uint8 else 1.0
        assert float(once.min()) >= 0 and float(once.max()) <= top + 1e-6
        assert torch.equal(state, torch.random.get_rng_state())


def test_successive_calls_draw_on():
    generator, images = seeded(), batch()
    assert not torch.equal(augment(images, "crop", generator), augment(images, "crop", generator))


def test_none_is_the_tensor_itself_and_empty_batches_pass():
    images = batch()
    assert augment(images, "none", seeded()) is images
    assert augment(images[:0], "crop_flip", seeded()).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("policy", "pad", "flip"),
    [("crop", (4, 4), False), ("crop_flip", (4, 4), True), ("flip", (0, 0), True), ("shift", (2, 2), False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_crop_and_flip_match_a_loop(policy, pad, flip, dtype):
    images = batch(24) if dtype == torch.float32 else (batch(24) * 255).to(torch.uint8)
    found = augment(images, policy, seeded(5))
    generator = seeded(5)
    rows = torch.randint(0, 2 * pad[0] + 1, (24,), generator=generator).tolist()
    columns = torch.randint(0, 2 * pad[1] + 1, (24,), generator=generator).tolist()
    mirrored = torch.randint(0, 2, (24,), generator=generator).tolist() if flip else [0] * 24
    for i in range(24):
        for y in range(0, 32, 3):
            for x in range(32):
                from_y = y + rows[i] - pad[0]
                from_x = (31 - x if mirrored[i] else x) + columns[i] - pad[1]
                inside = 0 <= from_y < 32 and 0 <= from_x < 32
                wanted = images[i, :, from_y, from_x] if inside else torch.zeros(3, dtype=dtype)
                assert torch.equal(found[i, :, y, x], wanted)


def test_every_offset_and_both_orientations_occur():
    images = torch.zeros(4000, 1, 8, 8)
    images[:, 0, 3, 2] = 1  # asymmetric in x
    found = augment(images, "crop_flip", seeded())
    places = {tuple(p) for p in found.nonzero()[:, 2:].tolist()}
    assert places == {(y, x) for y in (2, 3, 4) for x in (1, 2, 3, 4, 5, 6)}
    share = float((found[..., 4:].sum((1, 2, 3)) > 0).float().mean())
    assert abs(share - 0.5) < 0.05


def test_gradients_flow_through_crop_flip():
    images = batch(4).requires_grad_()
    augment(images, "crop_flip", seeded()).sum().backward()
    assert images.grad is not None and set(images.grad.unique().tolist()) <= {0.0, 1.0}


def test_cutout_is_one_square_of_the_batch_mean():
    images = batch(64)
    found = module.cutout(images, seeded(3))
    mean = images.mean((0, 2, 3))
    generator = seeded(3)
    top = (torch.randint(0, 32, (64,), generator=generator) - 8).tolist()
    left = (torch.randint(0, 32, (64,), generator=generator) - 8).tolist()
    for i in range(64):
        wanted = images[i].clone()
        wanted[:, max(0, top[i]) : max(0, top[i] + 16), max(0, left[i]) : max(0, left[i] + 16)] = mean.view(3, 1, 1)
        torch.testing.assert_close(found[i], wanted)


def test_affine_matches_a_loop():
    images = batch(6, (1, 11, 11))
    found = augment(images, "affine", seeded(4))
    generator = seeded(4)
    angle = (torch.rand(6, generator=generator) * 30 - 15).tolist()
    scale = (torch.rand(6, generator=generator) * 0.2 + 0.9).tolist()
    move_x = ((torch.rand(6, generator=generator) * 0.2 - 0.1) * 11).tolist()
    move_y = ((torch.rand(6, generator=generator) * 0.2 - 0.1) * 11).tolist()

    def pixel(i: int, y: int, x: int) -> float:
        return float(images[i, 0, y, x]) if 0 <= y < 11 and 0 <= x < 11 else 0.0

    for i in range(6):
        turn = math.radians(angle[i])
        for y in range(11):
            for x in range(11):
                # output = centre + move + scale * R(turn) * (input - centre), clockwise as y points down
                dx, dy = (x - 5 - move_x[i]) / scale[i], (y - 5 - move_y[i]) / scale[i]
                sx = 5 + math.cos(turn) * dx + math.sin(turn) * dy
                sy = 5 - math.sin(turn) * dx + math.cos(turn) * dy
                x0, y0 = math.floor(sx), math.floor(sy)
                ax, ay = sx - x0, sy - y0
                wanted = (pixel(i, y0, x0) * (1 - ax) + pixel(i, y0, x0 + 1) * ax) * (1 - ay)
                wanted += (pixel(i, y0 + 1, x0) * (1 - ax) + pixel(i, y0 + 1, x0 + 1) * ax) * ay
                assert abs(wanted - float(found[i, 0, y, x])) < 2e-4


def test_affine_of_nothing_is_the_image(monkeypatch):
    for name in ("ROTATION_DEGREES", "SCALE_RANGE", "TRANSLATION"):
        monkeypatch.setattr(module, name, 0.0)
    images = (batch(4) * 255).to(torch.uint8)
    assert torch.equal(augment(images, "affine", seeded()), images)


def test_errors():
    with pytest.raises(ConfigError, match="did you mean 'crop_flip'"):
        check_policy("cropflip")
    with pytest.raises(ConfigError, match=r"\(B, C, H, W\)"):
        augment(batch()[0], "crop", seeded())


@pytest.mark.slow
def test_crop_flip_is_fast():  # wants an idle machine, hence slow
    images, generator = batch(512), seeded()
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        augment(images, "crop_flip", generator)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.03  # about 2 ms on one idle thread


@pytest.mark.gpu
def test_the_same_on_the_gpu():
    for policy in POLICIES:
        images = batch(64)
        torch.testing.assert_close(
            augment(images.cuda(), policy, seeded(1)).cpu(), augment(images, policy, seeded(1)), atol=2e-5, rtol=1e-4
        )
