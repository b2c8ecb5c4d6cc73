"""DC, DSA and DM: what they alone promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from synthkit import tables
from synthkit.data.dsa import DIGITS_STRATEGY, STRATEGY
from synthkit.errors import ConfigError, DataError, NonFiniteError, RequirementError
from synthkit.synthesis.base import ImageSpec, makes_of
from synthkit.synthesis.matching import dc as dc_module
from synthkit.synthesis.matching.dc import DC
from synthkit.synthesis.matching.distances import gradient_distance
from synthkit.synthesis.matching.dm import feature_network
from synthkit.synthesis.matching.siamese import augmented, augmented_pair, freeze_statistics, strategy_of
from synthkit.synthesis.memory import SavedBytes

from .tiny import task
from .tiny_real import patterned

SMALL: dict[str, Any] = {"arch": "convnet_d2_w8", "iterations": 2, "batch_real": 6}


def build(name: str, settings: dict[str, Any] | None = None, **of_task: Any):
    method = tables.lookup("method", name)
    values = {"teachers": [], "images": 20, "data": patterned(), "spec": task().image_spec, **of_task}
    return method(method.Config(**{**SMALL, **(settings or {})}), task(**values))


@pytest.mark.parametrize("name", ["dc", "dsa", "dm", "mtt"])
def test_no_teacher_but_data_is_needed(name):
    with pytest.raises(RequirementError, match="--data"):
        tables.lookup("method", name)(tables.lookup("method", name).Config(), task(images=10))


@pytest.mark.parametrize("name", ["dc", "dsa", "dm"])
def test_rows_start_from_real_images_of_their_class(name):
    method = build(name, {"init": "real"}, images=37)
    assert method.labels.tolist() == [row % 10 for row in range(37)]
    stored = method.task.data.images.float()
    seen = (method.space.leave(method.pixels) * 255).round()
    for image, label in zip(seen, method.labels, strict=True):
        hits = (stored == image).flatten(1).all(1).nonzero()[:, 0]
        assert method.task.data.labels[hits].tolist() == [label]
    assert len(seen.unique(dim=0)) == 37
    assert makes_of(type(method), method.config).contains_real
    assert not makes_of(type(method), method.Config(init="noise")).contains_real


def test_a_small_class_is_named():
    with pytest.raises(DataError, match="class 'class .' has 3 images, 4 are to start from.*lower --ipc"):
        build("dsa", images=31, data=patterned(per_class=3))
    assert build("dc", images=31, data=patterned(per_class=3)).ipc == 4  # from noise any number will do


def test_pixels_leave_the_unit_interval_and_images_do_not():
    method = build("dc", {"lr_img": 10.0})
    batches = [batch for batch in method.generate() if batch is not None]
    pixels, images = (torch.cat([getattr(b, name) for b in batches]) for name in ("pixels", "images"))
    assert pixels.min() < 0 and pixels.max() > 1 and images.dtype == torch.uint8
    assert torch.equal(images, pixels.clamp(0, 1).mul(255).round().to(torch.uint8))
    torch.testing.assert_close(pixels, method.space.leave(method.pixels))


def test_class_by_class_equals_one_backward(monkeypatch):
    """The graph of one class at a time gives the gradient of the summed loss."""
    method = build("dc", {"init": "real"})
    network, label_rows = method.fresh_network("x"), {}
    draw = method.real.draw
    monkeypatch.setattr(method.real, "draw", lambda c, n, g: label_rows.setdefault(c, draw(c, n, g)))
    taken = []
    monkeypatch.setattr(method, "update", taken.append)
    figures = method.matching_step(network, torch.Generator().manual_seed(0))
    pixels = method.pixels.clone().requires_grad_()
    weights = [p for p in network.parameters() if p.ndim > 1]
    total = torch.zeros(())
    for label, rows in label_rows.items():
        gradients = []
        for images in (method.real.take(rows), pixels[method.labels == label]):
            loss = F.cross_entropy(network(images), torch.full((len(images),), label))
            gradients.append(torch.autograd.grad(loss, weights, create_graph=True))
        total = total + gradient_distance(gradients[1], gradients[0])
    torch.testing.assert_close(taken[0], torch.autograd.grad(total, pixels)[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(figures["matching_loss"], total.detach() / 10)


def test_synthetic_images_equal_to_the_real_ones_have_no_distance():
    method = build("dc", {"init": "real", "batch_real": 100}, images=120)
    figures = method.matching_step(method.fresh_network("x"), torch.Generator().manual_seed(0))
    assert figures["matching_loss"] < 1e-3  # all twelve images of each class on both sides, in another order


@pytest.mark.parametrize("distance", ["rows", "mse", "cos"])
@pytest.mark.parametrize("arch", ["convnet_d2_w8", "convnet_d2_w8_bn"])
def test_dc_runs_with_every_distance_and_with_batchnorm(arch, distance):
    method = build("dc", {"arch": arch, "distance": distance, "outer": 2, "inner": 1})
    before = method.pixels.clone()
    list(method.generate())
    assert not torch.equal(method.pixels, before) and torch.isfinite(method.pixels).all()


def test_the_network_is_trained_between_matching_steps_only(monkeypatch):
    calls: list[str] = []
    method = build("dc", {"outer": 3, "inner": 2, "iterations": 1})
    for name in ("matching_step", "train_epoch"):
        function = getattr(method, name)
        monkeypatch.setattr(method, name, lambda *a, n=name, f=function: calls.append(n) or f(*a))
    list(method.generate())
    assert calls == ["matching_step", *["train_epoch"] * 2] * 2 + ["matching_step"]


def test_the_inner_training_is_plain_sgd():
    method = build("dc", {"batch_train": 7, "lr_net": 0.05})
    network, twin = method.fresh_network("x"), method.fresh_network("x")
    method.train_epoch(network, torch.Generator().manual_seed(4))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    for rows in torch.randperm(20, generator=torch.Generator().manual_seed(4)).split(7):
        optimizer.zero_grad()
        F.cross_entropy(twin(method.pixels[rows]), method.labels[rows]).backward()
        optimizer.step()
    for found, wanted in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_published_loops_by_images_per_class():
    assert (build("dc").outer, build("dc").inner) == (1, 1)
    ten = build("dc", images=100)
    assert (ten.outer, ten.inner) == (10, 50) and (build("dc", {"outer": 4}, images=100).inner) == 50


def test_batchnorm_statistics_come_from_all_classes_and_hold_still():
    method = build("dc", {"arch": "convnet_d2_w8_bn"})
    network = method.fresh_network("x")
    freeze_statistics(network, method.real, torch.Generator().manual_seed(0))
    layer = network.features[0].norm
    before = layer.running_mean.clone()
    network(method.real.take(method.real.rows[0]))
    assert not layer.training and network.training and before.abs().sum() > 0
    assert torch.equal(layer.running_mean, before)


def test_dm_features_do_not_hang_on_the_batch_with_instance_norm_but_do_with_batchnorm(monkeypatch):
    calls = []
    for arch, count in (("convnet_d2_w8", 10), ("convnet_d2_w8_bn", 1)):
        method = build("dm", {"arch": arch, "strategy": "none", "iterations": 1})
        network = feature_network(method.fresh_network("x"))
        assert not any(p.requires_grad for p in network.parameters()) and network.training
        assert network(method.pixels).shape == (20, 8 * 2 * 2)
        sizes: list[int] = []
        forward = type(network).forward
        with monkeypatch.context() as patch:
            patch.setattr(type(network), "forward", lambda self, x, s=sizes, f=forward: s.append(len(x)) or f(self, x))
            list(method.generate())
        calls.append(sizes)
        assert len(sizes) == count + 1 and sum(sizes) == 60 + 20


def test_the_same_transform_reaches_both_batches():
    draw = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 16, 16, generator=draw)
    for seed in range(12):
        many, few = augmented_pair(
            image.expand(20, -1, -1, -1), image.expand(3, -1, -1, -1), STRATEGY, torch.Generator().manual_seed(seed)
        )
        torch.testing.assert_close(many, many[:1].expand_as(many))
        torch.testing.assert_close(few, many[:3])
    single = augmented(image.expand(20, -1, -1, -1), "rotate", draw)
    assert len(single.unique(dim=0)) == 20 and augmented(image, "none", draw) is image


def test_strategies():
    spec = ImageSpec(shape=(1, 8, 8), num_classes=10, mean=[0.5], std=[0.5], class_names=[str(i) for i in range(10)])
    assert strategy_of("auto", spec) == DIGITS_STRATEGY and strategy_of("flip", spec) == "flip"
    assert strategy_of("auto", task().image_spec) == STRATEGY
    with pytest.raises(ConfigError, match="not a family.*did you mean 'flip'"):
        build("dsa", {"strategy": "flipp"})


def test_pixels_that_are_not_finite_end_the_run():
    with pytest.raises(NonFiniteError, match="lower --method.lr_img"):
        list(build("dc", {"lr_img": 1e38, "iterations": 5}).generate())


def test_the_estimate_scales_with_the_loops(monkeypatch):
    monkeypatch.setattr(dc_module.time, "perf_counter", iter(float(2**i) for i in range(9)).__next__)
    method = build("dc", {"outer": 3, "inner": 5})
    assert DC.measured_iteration(method) == 3 * 1 + 2 * 5 * 2  # matched in 1 s, trained in 2 s


def test_saved_bytes_count_what_is_alive_at_once():
    x = torch.randn(1000, requires_grad=True)
    with SavedBytes() as one:
        x.exp().sum().backward()
    with SavedBytes() as two:
        for _ in range(5):
            x.exp().sum().backward()
    with SavedBytes() as held:
        kept = [x.exp().sum() for _ in range(5)]
    assert one.bytes == two.bytes == 4000 and held.bytes == 20000
    del kept
    assert held._alive == 0
