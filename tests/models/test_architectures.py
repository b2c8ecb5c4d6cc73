"""Every classifier against the published networks: parameters, tensors, buffers, taps, initialisation.

`tests/reference/models.json` is an extract of what the original implementations gave (repository@commit in each row).
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from synthkit.errors import ModelError
from synthkit.models import names
from synthkit.models.build import build_model, count_parameters

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "models.json").read_text())


def _ids(rows: list[dict]) -> list[str]:
    return [f"{r['arch']}-{r['classes']}-{r.get('size', '')}-{r.get('channels', '')}".strip("-") for r in rows]


def _buffers(module: nn.Module) -> int:
    return sum(b.numel() for b in module.buffers())


@pytest.mark.parametrize("row", REFERENCE["classifiers"], ids=_ids(REFERENCE["classifiers"]))
def test_data_free_registry(row):
    channels, size, _ = row["input"]
    with torch.device("meta"):
        net = build_model(row["arch"], num_classes=row["classes"], in_channels=channels, image_size=size)
        logits = net(torch.empty(2, channels, size, size))
    assert count_parameters(net) == row["params"]
    assert len(list(net.parameters())) == row["tensors"]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == row["bn"]
    assert _buffers(net) == row["buffers"]
    assert tuple(logits.shape) == (2, row["classes"])


@pytest.mark.parametrize("row", REFERENCE["convnets"], ids=_ids(REFERENCE["convnets"]))
def test_convnets_of_dataset_distillation(row):
    name = names.resolve_name(row["arch"])
    with torch.device("meta"):
        net = build_model(name, num_classes=row["classes"], in_channels=row["channels"], image_size=row["size"])
        logits = net(torch.empty(2, row["channels"], row["size"], row["size"]))
    assert (count_parameters(net), len(list(net.parameters())), _buffers(net)) == (
        row["params"],
        row["tensors"],
        row["buffers"],
    )
    assert tuple(logits.shape) == (2, row["classes"])
    if row["features"] is not None:
        assert net.classifier.in_features == row["features"]


@pytest.mark.parametrize("row", REFERENCE["dd"], ids=_ids(REFERENCE["dd"]))
def test_other_networks_of_dataset_distillation(row):
    with torch.device("meta"):
        net = build_model(row["arch"], num_classes=row["classes"], in_channels=row["channels"], image_size=row["size"])
        logits = net(torch.empty(2, row["channels"], row["size"], row["size"]))
    assert (count_parameters(net), len(list(net.parameters())), _buffers(net)) == (
        row["params"],
        row["tensors"],
        row["buffers"],
    )
    assert tuple(logits.shape) == (2, row["classes"])
    if row["features"] is not None:
        assert [m for m in net.modules() if isinstance(m, nn.Linear)][-1].in_features == row["features"]


def test_average_pooling_halves_like_a_stride():
    """With 1x1 convolutions of weight one the block keeps the mean of every 2x2 square on its shortcut."""
    from synthkit.models.dd import Block

    block = Block(1, 1, half=True, norm="instance", average=True)
    with torch.no_grad():
        block.conv2.weight.zero_()
        block.norm2.bias.zero_()
        block.shortcut[0].weight.fill_(1.0)
        block.shortcut[2] = nn.Identity()
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert block(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_sizes_that_the_distillation_networks_refuse():
    for name, channels, size in (("lenet_dd", 3, 28), ("lenet_dd", 1, 32), ("vgg11_in", 3, 16), ("alexnet_dd", 3, 4)):
        with pytest.raises(ModelError):
            build_model(name, num_classes=10, in_channels=channels, image_size=size)


@pytest.mark.parametrize("row", REFERENCE["taps"], ids=_ids(REFERENCE["taps"]))
def test_taps_and_shapes_of_the_distillation_tables(row):
    net = build_model(row["arch"], num_classes=row["classes"], seed=0)
    shapes = sorted(list(p.shape) for p in net.parameters())
    assert hashlib.sha1(str(shapes).encode()).hexdigest() == row["shapes_sha1"]
    assert count_parameters(net) == row["params"]
    assert len(shapes) == row["tensors"]
    assert _buffers(net) == row["buffers"]
    taps: dict[str, torch.Tensor] = {}
    for point in net.tap_points:
        net.get_submodule(point).register_forward_hook(lambda m, i, out, point=point: taps.update({point: out}))
    with torch.no_grad():
        logits = net(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    maps = [taps[p] for p in net.tap_points]
    assert [list(t.shape[1:]) for t in maps] == row["feats"]
    assert [bool((t < 0).any()) for t in maps] == row["negative"]
    assert logits.shape == (2, row["classes"])


@pytest.mark.parametrize("row", REFERENCE["imagenet"], ids=_ids(REFERENCE["imagenet"]))
def test_networks_of_double_width_for_imagenet(row):
    assert (names.default_input(row["arch"]), names.default_classes(row["arch"])) == ((3, row["size"]), row["classes"])
    with torch.device("meta"):
        net = build_model(row["arch"], num_classes=row["classes"], image_size=row["size"])
        shapes = sorted(list(p.shape) for p in net.parameters())
        maps: list[torch.Tensor] = []
        for point in ("maxpool", "layer1", "layer2", "layer3", "layer4"):
            net.get_submodule(point).register_forward_hook(lambda m, i, out: maps.append(out))
        net(torch.empty(2, 3, row["size"], row["size"]))
    assert hashlib.sha1(str(shapes).encode()).hexdigest() == row["shapes_sha1"]
    assert (count_parameters(net), len(shapes), _buffers(net)) == (row["params"], row["tensors"], row["buffers"])
    assert [list(t.shape[1:]) for t in maps] == row["feats"][:-1]
    assert [m for m in net.modules() if isinstance(m, nn.Linear)][-1].in_features == row["feats"][-1][0]


# name -> parameters at K=10, from method card `dfkd` 1.4 and 9 (and arithmetic for the added BatchNorms)
CARD = {
    "lenet5": 61_706,
    "lenet5_half": 15_738,
    "lenet5_bn": 61_706 + 2 * (6 + 16 + 120),
    "lenet5_half_bn": 15_738 + 2 * (3 + 8 + 60),
    "resnet20_a": 269_722,
    "resnet20": 272_474,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "wrn16_1": 175_066,
    "wrn40_2": 2_243_546,
    "vgg8": 3_918_858,
}


@pytest.mark.parametrize("name", CARD)
def test_card_counts(name):
    channels, size = names.default_input(name)
    with torch.device("meta"):
        net = build_model(name, num_classes=10, in_channels=channels, image_size=size)
    assert count_parameters(net) == CARD[name]


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56, 110])
def test_option_a_has_only_the_shortcut_missing(depth):
    """B adds to A two 1x1 convolutions with BatchNorm: 16x32 + 32x64 weights and 2 x (32 + 64) BN weights."""
    with torch.device("meta"):
        a, b = (build_model(f"resnet{depth}{s}", num_classes=10) for s in ("_a", ""))
    assert count_parameters(b) - count_parameters(a) == 16 * 32 + 32 * 64 + 2 * (32 + 64)


def test_zero_padding_shortcut_by_hand():
    from synthkit.models.resnet import ZeroPadShortcut

    x = torch.arange(2 * 4 * 4, dtype=torch.float32).view(1, 2, 4, 4)
    out = ZeroPadShortcut(2, 4, 2)(x)
    assert out.shape == (1, 4, 2, 2)
    assert out[0, 0].eq(0).all() and out[0, 3].eq(0).all()
    assert out[0, 1].tolist() == [[0, 2], [8, 10]]
    assert out[0, 2].tolist() == [[16, 18], [24, 26]]


def test_channel_shuffle_by_hand():
    from synthkit.models.shufflenet import ChannelShuffle

    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert ChannelShuffle(2)(x).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert ChannelShuffle(3)(x).flatten().tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("name", names.ARCHITECTURES)
def test_contract_of_every_architecture(name):
    """Logits (B, K), the classifier is the last linear layer, ReLUs are modules, taps exist."""
    channels, size = names.default_input(name)
    size = max(size, {"convnet_d5": 64, "convnet_d6": 64}.get(name, 0))
    with torch.device("meta"):
        net = build_model(name, num_classes=7, in_channels=channels, image_size=size)
        out = net(torch.empty(3, channels, size, size))
    assert out.shape == (3, 7)
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    assert last.out_features == 7
    assert any(isinstance(m, nn.ReLU) for m in net.modules())
    for point in getattr(net, "tap_points", ()):
        net.get_submodule(point)


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "wrn16_1", "vgg8", "mobilenetv2_half", "shufflenetv2"])
def test_grey_and_64_pixel_images(name):
    with torch.device("meta"):
        grey = build_model(name, num_classes=5, in_channels=1, image_size=32)(torch.empty(2, 1, 32, 32))
        large = build_model(name, num_classes=5, in_channels=3, image_size=64)(torch.empty(2, 3, 64, 64))
    assert grey.shape == large.shape == (2, 5)


def test_vgg_pools_once_more_for_64_pixels():
    net = build_model("vgg8", num_classes=3, image_size=64, seed=0)
    sides = []
    net.block4.register_forward_hook(lambda m, i, out: sides.append(out.shape[-1]))
    with torch.no_grad():
        net(torch.rand(1, 3, 32, 32))
        net(torch.rand(1, 3, 64, 64))
    assert sides == [4, 4]


def _std(weight: torch.Tensor) -> float:
    return float(weight.detach().std())


def test_initialisation_resnet_b():
    net = build_model("resnet20", num_classes=10, seed=1)
    weight = net.layer3[1].conv1.weight
    assert _std(weight) == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)
    assert net.layer2[0].downsample[0].weight.std().item() == pytest.approx(math.sqrt(2 / 32), rel=0.1)
    assert net.bn1.weight.eq(1).all() and net.bn1.bias.eq(0).all()
    assert net.fc.weight.abs().max() <= 1 / math.sqrt(64) and net.fc.bias.ne(0).any()  # torch's default


def test_initialisation_resnet_a():
    net = build_model("resnet20_a", num_classes=100, seed=1)
    assert _std(net.layer3[0].conv1.weight) == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.05)  # fan-in
    assert _std(net.linear.weight) == pytest.approx(math.sqrt(2 / 64), rel=0.05)


def test_initialisation_wrn():
    net = build_model("wrn16_2", num_classes=100, seed=1)
    assert _std(net.block3.layer[1].conv1.weight) == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.05)
    assert net.fc.bias.eq(0).all() and net.fc.weight.abs().max() <= 1 / math.sqrt(128)


def test_initialisation_vgg_and_mobilenet():
    for name in ("vgg8", "mobilenetv2_half"):
        net = build_model(name, num_classes=100, seed=1)
        head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
        assert _std(head.weight) == pytest.approx(0.01, rel=0.05) and head.bias.eq(0).all()
        conv = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.groups == 1][-1]
        assert _std(conv.weight) == pytest.approx(
            math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels)), rel=0.05
        )


@pytest.mark.parametrize("name", ["lenet5", "resnet18", "shufflenetv1", "convnet"])
def test_initialisation_torch_default(name):
    """Uniform in +-1/sqrt(fan-in), for weights and biases."""
    channels, size = names.default_input(name)
    net = build_model(name, num_classes=10, in_channels=channels, image_size=size, seed=1)
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(m.weight[0].numel())
            assert 0.8 * bound < m.weight.abs().max() <= bound or m.weight.numel() < 30
            if m.bias is not None:
                assert m.bias.abs().max() <= bound


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (build_model("resnet8", num_classes=10, seed=s) for s in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("r18", "resnet18"),
        ("R34", "resnet34"),
        ("ResNet-50", "resnet50"),
        ("wrn_40_2", "wrn40_2"),
        ("WRN-28-10", "wrn28_10"),
        ("wrn22_3", "wrn22_3"),
        ("LeNet5", "lenet5"),
        ("lenet5half", "lenet5_half"),
        ("ResNet20A", "resnet20_a"),
        ("vgg11_bn", "vgg11"),
        ("mobile_half", "mobilenetv2_half"),
        ("ConvNetD3", "convnet"),
        ("convnet_d4_w256_batch", "convnet_d4_w256_bn"),
        ("convnetw64", "convnet_w64"),
        ("timm:resnet18", "timm:resnet18"),
    ],
)
def test_names_are_understood(name, canonical):
    assert names.resolve_name(name) == canonical


def test_generic_names_build():
    one_block_per_stage = sum(2 * 9 * w * w + 4 * w for w in (16, 32, 64))
    assert count_parameters(build_model("wrn10_1", num_classes=10)) == 175_066 - one_block_per_stage
    by_hand = (3 * 9 * 64 + 64 + 128) + (64 * 9 * 64 + 64 + 128) + (64 * 8 * 8 * 10 + 10)
    assert count_parameters(build_model("convnet_d2_w64", num_classes=10)) == by_hand


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt18", "did you mean 'resnet18'"),
        ("wrn17_2", "6n \\+ 4"),
        ("convnet_d9", "1 to 8 blocks"),
        ("timm:", "missing after the colon"),
        ("nothing_like_it_at_all", "allowed: lenet5"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ModelError, match=message):
        names.resolve_name(name)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("lenet5", {"in_channels": 1, "image_size": 28}, "32x32"),
        ("convnet", {"image_size": 4}, "at least 8x8"),
        ("convnet_w6_group", {}, "multiple of 4"),
        ("vgg8", {"image_size": 4}, "at least 8x8"),
        ("mobilenetv2", {"image_size": 8}, "at least 16x16"),
        ("resnet8", {"in_channels": 0}, "in_channels"),
        ("resnet8", {"num_classes": -1}, "num_classes"),
        ("resnet8", {"num_classes": 2.5}, "num_classes"),
        ("torchvision:resnet18", {"in_channels": 1}, "3-channel"),
        ("torchvision:resnt18", {}, "did you mean torchvision:resnet18"),
        ("torchvision:inception_v3", {}, "auxiliary"),
    ],
)
def test_inputs_an_architecture_cannot_take(name, arguments, message):
    with pytest.raises(ModelError, match=message):
        build_model(name, **{"num_classes": 10, **arguments})


def test_torchvision_architecture():
    with torch.device("meta"):
        net = build_model("torchvision:resnet18", num_classes=1000, image_size=224)
    assert count_parameters(net) == 11_689_512  # method card `kd` 3.1


def test_listing_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from synthkit.models import names, card; names.resolve_name('r18'); "
        "assert all(len(v) == 3 and all(v) for v in names.ARCHITECTURES.values()); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
