"""SpaceshipNet under the contract of all synthesis methods, and what its docstring promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import SynthesizerContract, frozen_copy
from torch import nn

from synthesis.tiny import MEAN, STD, TinyNet, task, teacher_view
from synthkit.errors import ConfigError, RequirementError
from synthkit.logits import kl_per_sample
from synthkit.models.build import build_model
from synthkit.models.generators import build_generator
from synthkit.models.init import seeded
from synthkit.models.stages import generate_with_maps, stage_maps
from synthkit.models.view import ModelView
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.activation_maps import class_activation_maps, grad_cam, squared_distance
from synthkit.synthesis.generator.spaceshipnet import SpaceshipNet, SpaceshipNetConfig, exchange_channels

SMALL = {
    "epochs": 4, "ep_steps": 4, "batch_size": 16, "synthesis_batch": 12, "g_steps": 2, "nz": 8, "width": 4, "lr": 0.05,
    "T": 4, "feature_memory": 30,
}  # fmt: skip


class TestSpaceshipNet(SynthesizerContract):
    name = "spaceshipnet"
    options = {**SMALL, "student": "convnet_d1_w8_bn"}
    engine_options = {**SMALL, "epochs": 2, "ep_steps": 2, "batch_size": 8, "student": "lenet5_half", "bn": 0}
    inner = {"synthesise": (3, 2), "learn": (3, 1)}
    arrivals = (2, 1)
    falling = ("g_loss", "kd")
    longer = {
        "epochs": 4, "ep_steps": 20, "batch_size": 32, "synthesis_batch": 10, "g_steps": 30, "lr_g": 0.01, "cam": 0,
        "gradcam": 0,
    }  # fmt: skip


def method(images: int = 37, curriculum: str = "none", **settings) -> SpaceshipNet:
    config = SpaceshipNetConfig(**{**SMALL, "student": "convnet_d1_w8_bn", **settings})
    return SpaceshipNet(config, task(images=images, curriculum=Curriculum.named(curriculum)))


def filled(**settings) -> SpaceshipNet:
    """A method after its first two synthesis calls."""
    found = method(**settings)
    for call in (0, 1):
        found.synthesise(call)
    return found


# ---- feature memory --------------------------------------------------------------------------------------------


def test_memory_keeps_the_features_of_the_kept_images():
    """Decoded by the same generator in the same mode, the features are the images."""
    found = method(g_steps=1)
    z, painted = [], []
    found.generator.project.register_forward_hook(lambda layer, args, out: z.append(args[0].clone()))
    layers: Any = found.generator.main
    layers[-1].register_forward_hook(lambda layer, args, out: painted.append(out.detach().clone()))
    before = {k: v.clone() for k, v in found.generator.state_dict().items()}
    images, _ = found.synthesise(0)
    found.generator.load_state_dict(before)
    _, maps = generate_with_maps(found.generator.train(), z[0])
    assert torch.equal(images, painted[0]) and found.kept == 12
    for memory, theirs in zip(found.features, maps, strict=True):
        assert memory.dtype == torch.float16 and len(memory) == 30
        torch.testing.assert_close(memory[:12].float(), theirs.detach(), rtol=1e-3, atol=1e-3)


def test_the_newest_features_push_out_the_oldest():
    found = method(feature_memory=5)
    rows = [torch.full((3, *memory.shape[1:]), 0.0) for memory in found.features]
    for number in range(4):
        found._keep([row + torch.arange(3 * number, 3 * number + 3.0)[:, None, None, None] for row in rows])
    for memory in found.features:
        assert sorted(memory[:, 0, 0, 0].tolist()) == [7, 8, 9, 10, 11]
    found._keep([torch.cat([row + 20, row + 21]) for row in rows])  # more at once than there is room for
    assert sorted(found.features[0][:, 0, 0, 0].tolist()) == [20, 20, 21, 21, 21]


def test_the_memory_is_never_larger_than_the_run():
    assert len(method(images=20, feature_memory=4096).features[0]) == 24
    widths = [4 * 2, 4 * 2, 4]
    assert [tuple(memory.shape[1:]) for memory in method().features] == [
        (widths[0], 2, 2), (widths[1], 4, 4), (widths[2], 8, 8),
    ]  # fmt: skip


def test_bytes_of_an_image_as_the_field_says():
    with torch.device("meta"):
        net = build_generator("small", latent_dim=256, image_size=32, channels=3, width=64)
        maps = generate_with_maps(net, torch.empty(1, 256))[1]
    assert sum(2 * found[0].numel() for found in maps) == 208 * 1024


def test_estimate_counts_the_features():
    small, large = method(feature_memory=1).estimate(), method(feature_memory=37).estimate()
    bytes_of_row = 2 * (8 * 4 + 8 * 16 + 4 * 64)
    assert large["memory_bytes"] - small["memory_bytes"] == pytest.approx(36 * bytes_of_row)


def test_the_memory_survives_a_resumed_run():
    found, again = filled(), method()
    again.load_state_dict(frozen_copy(found.state_dict()))
    assert again.kept == found.kept == 24
    assert torch.equal(again.student_images(), found.student_images())


# ---- the student's images --------------------------------------------------------------------------------------


def exchanged_steps(found: SpaceshipNet, monkeypatch, steps: int) -> int:
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(maps, picks):
        calls.append((maps, picks))
        return exchange_channels(maps, picks)

    monkeypatch.setattr("synthkit.synthesis.generator.spaceshipnet.exchange_channels", watched)
    for found.step in range(steps):
        found.student_images()
    for maps, picks in calls:
        assert picks.shape == (len(maps), maps.shape[1] // 2)
        assert all(len(set(row)) == len(row) for row in picks.tolist())
        assert len({tuple(sorted(row)) for row in picks.tolist()}) > 1, "all samples share one mask"
    return len(calls)


def test_features_are_exchanged_with_the_given_probability(monkeypatch):
    assert exchanged_steps(filled(mix=0.0), monkeypatch, 20) == 0
    assert exchanged_steps(filled(mix=1.0), monkeypatch, 20) == 20
    assert 110 < exchanged_steps(filled(mix=0.7), monkeypatch, 200) < 170  # five standard deviations


def test_all_depths_are_drawn_and_todays_generator_decodes(monkeypatch):
    found, depths = filled(augment="none", mix=0.0), []
    import synthkit.models.stages as stages

    decode = stages.decode
    monkeypatch.setattr(stages, "decode", lambda net, maps, depth: depths.append(depth) or decode(net, maps, depth))
    first = found.student_images()
    for found.step in range(30):
        found.student_images()
    assert set(depths) == {0, 1, 2} and min(depths.count(d) for d in (0, 1, 2)) > 3
    found.step = 0
    assert torch.equal(found.student_images(), first)
    with torch.no_grad():
        layers: Any = found.generator.main
        layers[-2].bias.add_(1.0)
    assert (found.student_images() > first).all()
    assert not found.generator.training and not first.requires_grad


def test_the_bank_holds_unmixed_images():
    found = method(mix=1.0)
    batches = [batch for batch in found.generate() if batch is not None]
    again, images = method(mix=0.0, lr=1e-9), []
    images = [batch for batch in again.generate() if batch is not None]
    assert torch.equal(batches[0].images, images[0].images)  # before the student could have had any influence
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, images, strict=True))  # and without adversary


def test_exchange_is_with_the_mirrored_sample():
    maps = torch.arange(5.0)[:, None].expand(5, 4)[:, :, None, None]
    picks = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3], [0, 3]])
    mixed = exchange_channels(maps, picks)[:, :, 0, 0]
    assert mixed.tolist() == [[0, 0, 4, 4], [3, 3, 1, 1], [2, 2, 2, 2], [1, 3, 1, 3], [4, 0, 0, 4]]


# ---- activation maps -------------------------------------------------------------------------------------------

STAGES = {
    "resnet18": (4, [(32, 64), (16, 128), (8, 256), (4, 512)]),
    "wrn16_1": (3, [(32, 16), (16, 32), (8, 64)]),
    "lenet5_bn": (3, [(28, 6), (10, 16), (1, 120)]),
    "vgg8": (4, [(32, 64), (16, 128), (8, 256), (4, 512)]),
}


@pytest.mark.parametrize("arch", STAGES)
def test_stages_of_the_usual_networks(arch):
    count, expected = STAGES[arch]
    channels = 1 if arch.startswith("lenet") else 3
    net = build_model(arch, num_classes=10, in_channels=channels, image_size=32).eval()
    view = ModelView(net, [0.5] * channels, [0.5] * channels, input_size=(channels, 32, 32), num_classes=10)
    with torch.no_grad(), stage_maps(view) as found:
        logits = view(torch.rand(2, channels, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert len(found.stages) == count
    assert [(size[0], maps.shape[1]) for size, maps in found.stages.items()] == expected
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    maps = class_activation_maps(view, found)  # pooled, they are the logits without the bias
    torch.testing.assert_close(maps.mean((2, 3)) + view.classifier.bias, logits, rtol=1e-4, atol=1e-4)


def test_stages_of_a_resnet_are_its_layers():
    net = build_model("resnet18", num_classes=10, in_channels=3, image_size=8).eval()
    view = ModelView(net, MEAN, STD, input_size=(3, 8, 8), num_classes=10)
    kept: list[torch.Tensor] = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        getattr(net, name).register_forward_hook(lambda layer, args, out: kept.append(out))
    with torch.no_grad(), stage_maps(view) as found:
        view(torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(a, b) for a, b in zip(found.stages.values(), kept, strict=True))


def test_grad_cam_against_a_loop():
    with seeded(0):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    view = ModelView(net, MEAN, STD, input_size=(3, 8, 8), num_classes=10)
    x, labels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([7, 0, 2])
    with stage_maps(view) as found:
        logits = view(x)
    (size,) = found.stages
    (ours,) = grad_cam(logits, [found.stages[size]], labels)
    maps, weight = found.stages[size].detach(), view.classifier.weight.detach()
    for i, label in enumerate(labels):
        expected = torch.zeros(6, 6)
        for c in range(4):
            expected += weight[label].view(4, 6, 6)[c].mean() * maps[i, c]
        torch.testing.assert_close(ours[i].detach(), expected)
    torch.testing.assert_close(class_activation_maps(view, found)[:, :, 0, 0], found.feature @ weight.T)  # type: ignore


def test_maps_of_different_size_meet_at_the_smaller():
    large, small = torch.arange(16.0).view(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)
    means = torch.tensor([2.5, 4.5, 10.5, 12.5])
    torch.testing.assert_close(squared_distance(large, small), means.square().mean()[None])
    torch.testing.assert_close(squared_distance(small, large), means.square().mean()[None])


def test_no_gradient_reaches_the_classifier_through_its_maps():
    found = filled(gradcam=0.0)
    student = found.student_view.module.train().requires_grad_(True)
    images = found.student_images()
    both = found.distil(images)
    plain = found.kd_per_sample(both.student, both.teacher).mean()
    weight = found.student_view.classifier.weight
    (of_both,) = torch.autograd.grad(both.loss, weight, retain_graph=True)
    (of_plain,) = torch.autograd.grad(plain, weight, retain_graph=True)
    torch.testing.assert_close(of_both, of_plain)
    first = next(student.parameters())
    (of_both,) = torch.autograd.grad(both.loss, first, retain_graph=True)
    (of_plain,) = torch.autograd.grad(plain, first)
    assert not torch.allclose(of_both, of_plain)


def test_kl_is_a_mean_over_the_classes_too():
    """What the released `nn.KLDivLoss()` does; the usual batchmean is K times as much."""
    s, t = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(method().kd_per_sample(s, t), kl_per_sample(s, t, 4.0) / 10)
    log_s, p_t = torch.log_softmax(s / 4, 1), torch.softmax(t / 4, 1)
    released = nn.functional.kl_div(log_s, p_t, reduction="sum") / (6 * 10) * 16
    torch.testing.assert_close(method().kd_per_sample(s, t).mean(), released)


def test_the_teacher_keeps_neither_gradient_nor_hook():
    found = filled()
    found.student_view.module.train().requires_grad_(True)
    found.learn(found.student_images())
    for layer in found.teacher.module.modules():
        assert not layer._forward_hooks and not layer._forward_pre_hooks
    assert all(p.grad is None for p in found.teacher.module.parameters())


# ---- curriculum and settings -----------------------------------------------------------------------------------


def test_only_a_ramp_brings_an_adversary():
    for curriculum, expected in (("none", {False}), ("easy2hard", {False, True})):
        found, seen = method(curriculum=curriculum, images=60, begin=0.0, end=1.0), set()
        found.note_generator = lambda terms, loss, seen=seen: seen.add("adversarial" in terms)  # type: ignore
        list(found.generate())
        assert seen == expected


class Mute(TinyNet):
    """A student whose maps have no size in common with the teacher's."""

    def forward(self, x):
        return super().forward(nn.functional.interpolate(x, size=(5, 5)))


def test_networks_without_a_common_size(monkeypatch):
    monkeypatch.setattr("synthkit.models.build.build_model", lambda *args, **kwargs: Mute())
    with pytest.raises(RequirementError, match=r"no feature maps of the same size.*gradcam 0"):
        method()
    assert method(gradcam=0.0).features


@pytest.mark.parametrize("generator", ["dafl", "zskt"])
def test_generators_without_maps_are_refused(generator):
    with pytest.raises(RequirementError, match="small, large or cud"):
        SpaceshipNet(
            SpaceshipNetConfig(**{**SMALL, "student": "convnet_d1_w8_bn", "generator": generator}),
            task(teachers=[teacher_view(size=16)]),
        )


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"mix": 1.5}, "probability"),
        ({"feature_memory": 0}, "feature_memory must be at least 1"),
        ({"cam": -1.0}, "cam must not be negative"),
        ({"views": "crop_flop"}, "did you mean 'crop_flip'"),
    ],
)
def test_settings_out_of_range(settings, what):
    with pytest.raises(ConfigError, match=what):
        SpaceshipNetConfig(**settings)
