"""Where features are read: the rule for networks that declare no stages, and points that the user names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from synthkit.errors import ConfigError, ModelError
from synthkit.models.build import build_model
from synthkit.models.taps import TapSet
from synthkit.models.view import ModelView

EVERYTHING = ("pooled", "maps", "preact")


def view_of(net: nn.Module, size: int = 32, classes: int = 10, channels: int = 3) -> ModelView:
    half = [0.5] * channels
    return ModelView(net, half, half, input_size=(channels, size, size), num_classes=classes, name="net")


def images(size: int = 32, count: int = 4, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def hooks_of(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def house(name: str, **more) -> tuple[nn.Module, ModelView]:
    net = build_model(name, num_classes=10, seed=0, **more).eval()
    return net, view_of(net)


# --- any other network ------------------------------------------------------------------------------------------------

# torchvision at 224 pixels: side of every map, then the last map's channels and its name
OTHERS = {
    "resnet18": ([56, 28, 14, 7], 512, "layer4"),
    "vgg16_bn": ([224, 112, 56, 28, 14], 512, "features.42"),
    "mobilenet_v2": ([112, 56, 28, 14, 7], 1280, "features.18"),
    "mobilenet_v3_small": ([56, 28, 14, 7], 576, "features.12"),
    "efficientnet_b0": ([112, 56, 28, 14, 7], 1280, "features.8"),
    "convnext_tiny": ([56, 28, 14, 7], 768, "features.7"),
    "vit_b_32": ([7], 768, "encoder"),
    "swin_t": ([56, 28, 14, 7], 768, "permute"),
    "densenet121": ([56, 28, 14, 7], 1024, "features.norm5"),
    "regnet_y_400mf": ([56, 28, 14, 7], 440, "trunk_output.block4"),
    "shufflenet_v2_x1_0": ([28, 14, 7], 1024, "conv5"),
    "alexnet": ([27, 13], 256, "features.11"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_rule_on_torchvision(name):
    sides, channels, last = OTHERS[name]
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # its constructor reads values
        net = torchvision_models.get_model(name, weights=None, num_classes=10)
    with torch.device("meta"):
        taps = TapSet(view_of(net, 224).to("meta"), EVERYTHING)
        given = taps(torch.empty(3, 3, 224, 224))
    assert [s[1:] for s in taps.shapes.maps] == [(side, side) for side in sides]
    assert taps.shapes.maps[-1][0] == channels and taps.names[-1] == last
    assert [m.shape for m in given.maps] == [(3, *s) for s in taps.shapes.maps]
    assert [m.shape for m in given.preact] == [(3, *s) for s in taps.shapes.preact]
    assert given.pooled.shape == (3, taps.shapes.pooled) and given.logits.shape == (3, 10)
    assert hooks_of(net) == 0


def test_in_place_relu_does_not_reach_the_taps():
    """torchvision's ReLUs overwrite their input, and one module serves twice in a block."""
    net = torchvision_models.resnet18(weights=None, num_classes=10).eval()
    taps = TapSet(view_of(net), EVERYTHING)(images())
    for before, after in zip(taps.preact, taps.maps, strict=True):
        assert (before < 0).any() and torch.equal(before.relu(), after)
    normed = TapSet(view_of(net), ("maps",), points=["bn1"])(images()).maps[0]
    assert (normed < 0).any() and torch.equal(normed, net.bn1(net.conv1((images() - 0.5) / 0.5)))


def test_functional_in_place_relu():
    net = torchvision_models.DenseNet(growth_rate=4, block_config=(1, 1), num_init_features=8, num_classes=10).eval()
    last = TapSet(view_of(net, 64), ("maps",))(images(64)).maps[-1]
    assert torch.equal(last, net.features((images(64) - 0.5) / 0.5)) and (last < 0).any()


def test_in_place_dropout_does_not_reach_the_taps():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2), nn.Dropout2d(0.9, inplace=True))
    net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)])
    taps = TapSet(view_of(net.train()), ("maps",))
    given = taps(images())
    assert taps.names == ["1"] and (given.maps[0] != 0).all()


def test_tokens_become_maps():
    """Token n lies at row n // w, column n % w; the class token is dropped."""
    net = torchvision_models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=10
    ).eval()
    nn.init.normal_(net.heads.head.weight)
    view, point = view_of(net, 16), "encoder.layers.encoder_layer_0"
    taps = TapSet(view, ("maps", "pooled"), points=[point, "last"])
    kept = []
    handle = net.get_submodule(point).register_forward_hook(lambda m, i, out: kept.append(out))
    given = taps(images(16))
    handle.remove()
    assert taps.names == [point, "encoder"] and taps.shapes.maps == [(8, 4, 4)] * 2
    assert torch.equal(given.maps[0][:, :, 2, 1], kept[0][:, 1 + 2 * 4 + 1])
    assert torch.equal(net.heads(given.pooled), given.logits)


def test_channels_last_becomes_maps():
    net = torchvision_models.SwinTransformer(
        patch_size=[2, 2],
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=[4, 4],
        num_classes=10,
    ).eval()
    taps = TapSet(view_of(net, 16), ("maps",), points=["features.1", "features.3"])
    given = taps(images(16)).maps
    assert taps.shapes.maps == [(8, 8, 8), (16, 4, 4)] and given[1].shape == (4, 16, 4, 4)
    inside = net.features[:4]((images(16) - 0.5) / 0.5)
    assert torch.equal(given[1], inside.permute(0, 3, 1, 2))


def test_convolution_as_classifier():
    net = torchvision_models.squeezenet1_1(num_classes=10)
    maps = TapSet(view_of(net, 64), ("maps",))
    assert maps.names[-1] == "features.12" and maps.shapes.maps[-1][0] == 512  # not the ten maps of the classes
    with pytest.raises(ModelError, match="no linear classifier.*no pooled features"):
        TapSet(view_of(net, 64), ("pooled",))


def test_last_linear_layer_that_is_no_classifier():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Conv2d(8, 10, 1)

        def forward(self, x):
            x = self.conv(x)
            return self.head(x * self.gate(x.mean((2, 3)))[:, :, None, None]).mean((2, 3))

    with pytest.raises(ModelError, match="gate is not its classifier; got '8 outputs for 10 classes"):
        TapSet(view_of(Gated()), ("pooled",))


# --- named points -----------------------------------------------------------------------------------------------------


def test_points_by_name():
    net, view = house("resnet14")
    taps = TapSet(view, ("maps",), points=["stem", "stage2", "layer1.0", "last@pre", "layer2.1.conv1"])
    assert taps.names == ["relu", "layer2", "layer1.0", "layer3@pre", "layer2.1.conv1"]
    assert taps.shapes.maps == [(16, 32, 32), (32, 16, 16), (16, 32, 32), (64, 8, 8), (32, 16, 16)]
    conventional, own = TapSet(view, EVERYTHING)(images()), taps(images()).maps
    assert torch.equal(own[1], conventional.maps[1]) and torch.equal(own[3], conventional.preact[2])
    assert torch.equal(own[0], net.relu(net.bn1(net.conv1(view.normalize(images())))))


def test_wide_resnet_point_before_relu_is_the_convention():
    _, view = house("wrn16_1")
    own = TapSet(view, ("maps",), points=["stage2@pre"])(images()).maps[0]
    assert torch.equal(own, TapSet(view, ("preact",))(images()).preact[1])


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("layer2.9", r"no such point.*got 'layer2.9'.*candidates: layer2.0 \(32x16x16\), layer2 \("),
        ("stage4", "no such point.*stages: stage1 to stage3, last"),
        ("", "no such point"),
        ("fc", r"fc gives \(10,\), no map"),
        ("layer1.0.conv1@pre", "does not end in a ReLU module"),
    ],
)
def test_points_that_cannot_be_read(point, message):
    _, view = house("resnet8")
    with pytest.raises(ConfigError, match=message):
        TapSet(view, ("maps",), points=[point])


def test_points_of_modules_called_twice_or_never():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.spare = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1)
            self.head = nn.Linear(3, 10)

        def forward(self, x):
            return self.head(self.act(self.conv(self.act(self.conv(x)))).mean((2, 3)))

    for point, message in (("act", "act is called 2 times"), ("spare", "spare is not called")):
        with pytest.raises(ConfigError, match=message):
            TapSet(view_of(Odd()), ("maps",), points=[point])


def test_wrong_wishes():
    _, view = house("resnet8")
    with pytest.raises(ConfigError, match="no such feature; got 'map'; did you mean 'maps'"):
        TapSet(view, ("map",))
    with pytest.raises(ConfigError, match="no point to read"):
        TapSet(view, ("maps",), points=[])
    mlp = view_of(build_model("mlp", num_classes=10, seed=0))
    assert TapSet(mlp, ("pooled",)).shapes.pooled == 128
    with pytest.raises(ModelError, match="no feature maps"):
        TapSet(mlp, ("maps",))
