"""Generators against the published ones, their value ranges and their initialisation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from synthkit.errors import ModelError
from synthkit.models.build import count_parameters
from synthkit.models.generators import GENERATORS, build_generator

ROWS = json.loads((Path(__file__).parents[1] / "reference" / "models.json").read_text())["generators"]
# The original `deep` has a Linear(256, 3136) that its forward never uses.
UNUSED = {"deep": 256 * 3136 + 3136}


def _tiny(name: str, channels: int = 3, **more):
    size = 16 if name in ("dcgan", "dfad_b", "deep") else 8
    arguments = {"latent_dim": 6, "image_size": size, "width": 2, "mean": [0.4] * channels, "std": [0.2] * channels}
    return build_generator(name, channels=channels, seed=0, **{**arguments, **more})


@pytest.mark.parametrize("row", ROWS, ids=[f"{r['name']}-{r['latent_dim']}-{r['image_size']}" for r in ROWS])
def test_published_counts(row):
    channels = row["channels"]
    with torch.device("meta"):
        net = build_generator(
            row["name"],
            latent_dim=row["latent_dim"],
            image_size=row["image_size"],
            channels=channels,
            depth=row.get("depth", 2),
            width=row.get("width", 64),
            mean=[0.5] * channels,
            std=[0.25] * channels,
        )
        images = net(torch.empty(2, *net.latent_shape))
    assert count_parameters(net) == row["params"] - UNUSED.get(row["name"], 0)
    assert len(list(net.parameters())) == row["tensors"] - (2 if row["name"] in UNUSED else 0)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == row["bn"]
    assert sum(v.numel() for k, v in net.state_dict().items() if "running" in k or "tracked" in k) == row["buffers"]
    assert tuple(images.shape) == (2, channels, row["image_size"], row["image_size"])


def test_every_generator_has_a_published_count():
    assert {r["name"] for r in ROWS} == set(GENERATORS)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("channels", [1, 3])
def test_contract(name, channels):
    net = _tiny(name, channels)
    z = torch.randn(5, *net.latent_shape, generator=torch.Generator().manual_seed(0))
    images = net(z)
    assert images.shape == (5, channels, net.image_size, net.image_size) and images.dtype == torch.float32
    assert net.latent_dim == 6 and net.latent_shape[0] == 6
    if net.bounded:
        assert images.min() >= 0 and images.max() <= 1
    images.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("name", ["dafl", "dfad_a", "zskt"])
def test_normalised_generators_come_back_through_the_teachers_normalisation(name):
    net = _tiny(name).eval()
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert not net.bounded
    torch.testing.assert_close((net(z) - 0.4) / 0.2, net.raw(z))


def test_dafl_output_is_standardised_per_channel():
    net = _tiny("dafl").train()
    raw = net.raw(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(raw.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(raw.var((0, 2, 3), unbiased=False), torch.ones(3), atol=2e-2, rtol=0)
    assert [m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)] == [1e-5, 0.8, 0.8, 1e-5]


@pytest.mark.parametrize(("depth", "size"), [(1, 28), (2, 28), (2, 32), (3, 64), (4, 32)])
def test_cud_any_depth(depth, size):
    net = build_generator("cud", latent_dim=10, image_size=size, channels=1, depth=depth, width=2)
    assert net(torch.zeros(2, 10)).shape == (2, 1, size, size)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [c.in_channels for c in convs] == [2 * 2**i for i in range(depth, 0, -1)] + [2]


def test_cud_equals_large_at_the_published_size():
    a, b = (build_generator(n, latent_dim=8, image_size=8, channels=3, width=2, seed=0) for n in ("cud", "large"))
    b.load_state_dict(a.state_dict())
    z = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(a(z), b(z), rtol=0, atol=0)


def test_initialisation_and_reset():
    net = build_generator("cud", latent_dim=32, image_size=8, channels=3, width=16, seed=0)
    linear = next(m for m in net.modules() if isinstance(m, nn.Linear))
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.05) and linear.bias.eq(0).all()
    assert float(norm.weight.detach().std()) == pytest.approx(0.02, rel=0.4)
    assert float(norm.weight.detach().mean()) == pytest.approx(1, abs=0.01)
    large = build_generator("large", latent_dim=32, image_size=8, channels=3, width=16, seed=0)
    assert next(m for m in large.modules() if isinstance(m, nn.Linear)).bias.ne(0).any()  # torch's default

    before = linear.weight.clone()
    state = torch.get_rng_state()
    net(torch.randn(4, 32))
    torch.set_rng_state(state)
    net.reset(seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(before, linear.weight) and norm.running_mean.eq(0).all()
    after = linear.weight.clone()
    net.reset(seed=1)
    assert torch.equal(after, linear.weight)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cuda", {}, "did you mean 'cud'"),
        ("cud", {"image_size": 30}, "multiple of 4.*use 32"),
        ("cud", {"image_size": 2}, "multiple of 4"),
        ("dcgan", {"image_size": 28}, "multiple of 16"),
        ("cud", {"latent_dim": 0}, "latent_dim"),
        ("cud", {"depth": 0}, "depth"),
        ("dafl", {"mean": None}, "normalised space"),
        ("dafl", {"mean": [0.5]}, "one number per channel"),
    ],
)
def test_wrong_arguments(name, arguments, message):
    fine = {"latent_dim": 4, "image_size": 32, "channels": 3, "width": 2, "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(ModelError, match=message):
        build_generator(name, **{**fine, **arguments})
