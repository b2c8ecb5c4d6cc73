"""DSA against numbers of the original implementation (tests/reference/dsa.npz), naive loops and its own promises."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit.data import dsa
from synthkit.data.dsa import DSARecord
from synthkit.errors import ConfigError

REFERENCE = Path(__file__).parents[1] / "reference" / "dsa.npz"
EXACT = ("brightness", "saturation", "contrast", "crop", "cutout", "flip")
PARTS = {"color": ("brightness", "saturation", "contrast")}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(REFERENCE) as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws_of(golden: dict[str, torch.Tensor], case: str) -> tuple[torch.Tensor, ...]:
    names = sorted(key for key in golden if key.startswith(f"{case}/draw"))
    return tuple(golden[name].flatten() for name in names)


def close(found, wanted, name):
    tolerance = 1e-12 if name in EXACT else 1e-5
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", dsa.OPS)
def test_one_transform_per_image(golden, name):
    x = golden[f"{name}_single/x"].requires_grad_()
    y = dsa.apply(x, DSARecord(((name, draws_of(golden, f"{name}_single")),), x.shape[-1]))
    close(y, golden[f"{name}_single/y"], name)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    close(torch.autograd.grad((y * weights).sum(), x)[0], golden[f"{name}_single/dx"], name)


@pytest.mark.parametrize("name", dsa.OPS)
def test_one_transform_for_batches_of_any_size(golden, name):
    case = f"{name}_siamese"
    first = tuple(d[:1] for d in draws_of(golden, case))
    record = DSARecord(((name, first),), golden[f"{case}/x"].shape[-1])
    close(dsa.apply(golden[f"{case}/x"], record), golden[f"{case}/y"], name)
    close(dsa.apply(golden[f"{case}/x2"], record), golden[f"{case}/y2"], name)


@pytest.mark.parametrize("call", range(12))
def test_whole_calls(golden, call):
    family = dsa.families(dsa.STRATEGY)[int(golden["siamese_call/family"][call])]
    drawn = golden[f"siamese_call/p{call}"]
    names = PARTS.get(family, (family,))
    numbers = [n.view(1).to(torch.int64) if family in ("crop", "cutout") else n.view(1) for n in drawn]
    each = len(numbers) // len(names)
    ops = tuple((name, tuple(numbers[i * each : (i + 1) * each])) for i, name in enumerate(names))
    found = dsa.apply(golden["siamese_call/x"], DSARecord(ops, 16))
    torch.testing.assert_close(found, golden[f"siamese_call/y{call}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["S", "M"])
@pytest.mark.parametrize("family", dsa.FAMILIES)
def test_siamese_record_is_one_map(family, mode):
    """An image is transformed alike wherever it stands and however large its batch is."""
    images = torch.randn(40, 3, 16, 16, generator=seeded(1))
    record = dsa.draw(family, 40, 16, seeded(2), siamese=True, mode=mode)
    whole = dsa.apply(images, record)
    for part in (slice(0, 1), slice(3, 20), slice(7, 40)):
        torch.testing.assert_close(dsa.apply(images[part], record), whole[part], rtol=0, atol=1e-6)
    assert all(len(d) == 1 for _, draws in record.ops for d in draws)


@pytest.mark.parametrize("family", dsa.FAMILIES)
def test_independent_record_is_one_map_per_image(family):
    same = torch.randn(1, 3, 16, 16, generator=seeded(1)).expand(64, -1, -1, -1)
    found = dsa.apply(same, dsa.draw(family, 64, 16, seeded(2), siamese=False))
    assert len({tuple(image.flatten().tolist()) for image in found}) > (1 if family == "flip" else 20)


def test_record_is_replayed_and_the_global_generator_is_left_alone():
    images = torch.randn(8, 1, 28, 28, generator=seeded(1))
    before = torch.random.get_rng_state()
    for seed in range(20):
        record = dsa.draw(dsa.STRATEGY, 8, 28, seeded(seed), siamese=False)
        again = dsa.draw(dsa.STRATEGY, 8, 28, seeded(seed), siamese=False)
        assert torch.equal(dsa.apply(images, record), dsa.apply(images, record))
        assert torch.equal(dsa.apply(images, record), dsa.apply(images, again))
    assert torch.equal(before, torch.random.get_rng_state())


def test_ranges_of_the_draws():
    n = 20_000
    ops = dict(dsa.draw(dsa.STRATEGY, n, 28, seeded(3), siamese=False, mode="M").ops)
    assert [name for name, _ in dsa.draw(dsa.STRATEGY, 1, 28, seeded(), siamese=True, mode="M").ops] == list(dsa.OPS)
    for down_or_right in ops["crop"]:
        assert set(down_or_right.tolist()) == set(range(-4, 5))
    for centre in ops["cutout"]:
        assert set(centre.tolist()) == set(range(29))  # the box of side 14 is even: 0 to 28 inclusive
    odd = dsa.draw("cutout", n, 10, seeded(3), siamese=False)  # the box of side 5 is odd: 0 to 9
    assert set(odd.ops[0][1][0].tolist()) == set(range(10))
    for name in ("brightness", "saturation", "contrast", "flip", "rotate", "scale"):
        for u in ops[name]:
            assert 0 <= float(u.min()) < 0.01 and 0.99 < float(u.max()) < 1 and abs(float(u.mean()) - 0.5) < 0.02


def test_mode_s_takes_every_family_equally_often():
    generator = seeded(4)
    counts = dict.fromkeys(dsa.OPS, 0)
    for _ in range(3000):
        for name, _draws in dsa.draw("crop_flip_scale", 2, 8, generator, siamese=True).ops:
            counts[name] += 1
    assert sum(counts.values()) == 3000
    assert all(abs(counts[name] - 1000) < 110 for name in ("crop", "flip", "scale"))


def test_rotation_turns_about_the_centre():
    """A quarter of the picture's middle row moves by tan(angle): compared with a pixel-by-pixel sampler."""
    x = torch.randn(1, 1, 9, 9, dtype=torch.float64, generator=seeded(5))
    u = torch.tensor([0.9], dtype=torch.float64)
    angle = (0.9 - 0.5) * 2 * math.radians(15)
    found = dsa.rotate(x, u)
    for i in range(9):
        for j in range(9):
            px, py = (2 * j + 1) / 9 - 1, (2 * i + 1) / 9 - 1
            qx = math.cos(angle) * px - math.sin(angle) * py
            qy = math.sin(angle) * px + math.cos(angle) * py
            cx, cy = ((qx + 1) * 9 - 1) / 2, ((qy + 1) * 9 - 1) / 2
            wanted = 0.0
            for r in (math.floor(cy), math.floor(cy) + 1):
                for c in (math.floor(cx), math.floor(cx) + 1):
                    if 0 <= r < 9 and 0 <= c < 9:
                        wanted += (1 - abs(cy - r)) * (1 - abs(cx - c)) * float(x[0, 0, r, c])
            assert float(found[0, 0, i, j]) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("family", dsa.FAMILIES)
@pytest.mark.parametrize("siamese", [True, False])
def test_differentiable_twice(family, siamese):
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, generator=seeded(6), requires_grad=True)
    record = dsa.draw(family, 2, 6, seeded(7), siamese=siamese, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda images: dsa.apply(images, record), (x,))
    assert torch.autograd.gradgradcheck(lambda images: dsa.apply(images, record) ** 2, (x,))


def test_channels_last_images_give_the_same():
    images = torch.randn(4, 3, 16, 16, generator=seeded(8))
    record = dsa.draw(dsa.STRATEGY, 4, 16, seeded(9), siamese=False, mode="M")
    torch.testing.assert_close(
        dsa.apply(images.to(memory_format=torch.channels_last), record), dsa.apply(images, record)
    )


def test_strategies():
    assert dsa.families("none") == dsa.families("") == ()
    assert dsa.families("color, crop".replace(" ", "")) == ("color", "crop")
    assert dsa.default_strategy([str(d) for d in range(10)]) == dsa.DIGITS_STRATEGY
    assert "flip" in dsa.families(dsa.default_strategy(["cat", "dog"]))
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(dsa.apply(images, dsa.draw("none", 2, 8, seeded(), siamese=True)), images)


def test_refusals():
    with pytest.raises(ConfigError, match="did you mean 'rotate'"):
        dsa.draw("color_rotat", 2, 8, seeded(), siamese=True)
    with pytest.raises(ConfigError, match="twice"):
        dsa.families("crop_crop")
    with pytest.raises(ConfigError, match="mode"):
        dsa.draw("crop", 2, 8, seeded(), siamese=True, mode="X")  # pyright: ignore[reportArgumentType] the point
    record = dsa.draw("crop", 4, 8, seeded(), siamese=False)
    with pytest.raises(ConfigError, match="for 4 images"):
        dsa.apply(torch.zeros(3, 1, 8, 8), record)
    with pytest.raises(ConfigError, match="side 8"):
        dsa.apply(torch.zeros(4, 1, 8, 9), record)
