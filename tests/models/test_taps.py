"""Features beside the logits: the conventions of the distillation tables, and what is left behind."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torchvision import models as torchvision_models

from synthkit.errors import ModelError
from synthkit.models.build import build_model, count_parameters
from synthkit.models.shufflenet import UnitV2
from synthkit.models.taps import TapSet
from synthkit.models.view import ModelView

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "models.json").read_text())["taps"]
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


# --- the conventions of the house's networks --------------------------------------------------------------------------


# the deepest are the same classes with more blocks
ROWS = [
    row for row in REFERENCE if row["arch"] not in ("resnet110", "resnet110x2", "resnet116", "resnet101", "resnet152")
]


@pytest.mark.parametrize("row", ROWS, ids=[row["arch"] for row in ROWS])
def test_shapes_of_the_distillation_tables(row):
    """Maps are the published feature lists without stem and pooled vector, before and after the last ReLU."""
    with torch.device("meta"):
        net = build_model(row["arch"], num_classes=row["classes"])
        view = view_of(net, classes=row["classes"]).to("meta")
    found = TapSet(view, EVERYTHING).shapes
    assert [list(s) for s in found.maps] == [list(s) for s in found.preact] == row["feats"][1:-1]
    assert [found.pooled] == row["feats"][-1]


@pytest.mark.parametrize("name", ["resnet8", "resnet8_a", "vgg8", "shufflenetv1"])
def test_rectified_stages(name):
    net, view = house(name)
    taps = TapSet(view, EVERYTHING)(images())
    for before, after in zip(taps.preact, taps.maps, strict=True):
        assert (before < 0).any() and (after >= 0).all()
        assert torch.equal(before.relu(), after)
    assert torch.equal(view.classifier(taps.pooled), taps.logits)
    assert torch.equal(view(images()), taps.logits)


def test_resnet_by_hand():
    net, view = house("resnet8")
    x = net.relu(net.bn1(net.conv1(view.normalize(images()))))
    expected = []
    for stage in (net.layer1, net.layer2, net.layer3):
        x = stage(x)
        expected.append(x)
    taps = TapSet(view, ("maps", "pooled"))(images())
    assert all(torch.equal(a, b) for a, b in zip(taps.maps, expected, strict=True))
    assert torch.allclose(taps.pooled, x.mean((2, 3)), atol=1e-6)
    assert taps.preact is None


def test_wide_resnet_by_hand():
    """Maps are raw sums; before the ReLU means through the BatchNorm that follows; pooled is rectified."""
    net, view = house("wrn16_1")
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 2.0)
    x = net.conv1(view.normalize(images()))
    raw = []
    for block in (net.block1, net.block2, net.block3):
        x = block(x)
        raw.append(x)
    normed = [bn(m) for bn, m in zip((net.block2.layer[0].bn1, net.block3.layer[0].bn1, net.bn1), raw, strict=True)]
    taps = TapSet(view, EVERYTHING)(images())
    assert all(torch.equal(a, b) and (a < 0).any() for a, b in zip(taps.maps, raw, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(taps.preact, normed, strict=True))
    assert torch.allclose(taps.pooled, normed[-1].relu().mean((2, 3)), atol=1e-6)


def test_mobilenet_bottlenecks_are_linear():
    _, view = house("mobilenetv2_half")
    taps = TapSet(view, EVERYTHING)(images())
    assert all(a is b and (a < 0).any() for a, b in zip(taps.preact, taps.maps, strict=True))


@pytest.mark.parametrize("name", ["shufflenetv2", "shufflenetv2_1_5"])
def test_shufflenet_v2(name):
    net, view = house(name)
    taps = TapSet(view, EVERYTHING)(images())
    for stage, before, after in zip((net.layer1, net.layer2, net.layer3), taps.preact, taps.maps, strict=True):
        assert (before < 0).any()
        assert torch.equal(stage[-1].shuffle(before.relu()), after)
    assert taps.pooled.shape[1] == 1024 != taps.maps[-1].shape[1]  # conv2 lies between them


def test_shufflenet_v2_unit_rectifies_one_half():
    """The released unit has its last ReLU before the concatenation; the kept half is never negative."""
    unit = UnitV2(8).train()
    x = torch.randn(3, 8, 5, 5, generator=torch.Generator().manual_seed(1)).relu()
    kept, out = x.chunk(2, dim=1)
    out = unit.bn2(unit.conv2(unit.relu1(unit.bn1(unit.conv1(out)))))
    released = unit.shuffle(torch.cat([kept, F.relu(unit.bn3(unit.conv3(out)))], 1))
    assert torch.equal(unit(x), released)


def test_networks_without_a_stem():
    convnet = view_of(build_model("convnet", num_classes=10, seed=0))
    assert TapSet(convnet, ("maps",)).names == ["features.0.relu", "features.1.relu", "features.2.relu"]
    lenet = view_of(build_model("lenet5", num_classes=10, in_channels=1, seed=0), channels=1)
    shapes = TapSet(lenet, ("maps", "pooled")).shapes
    assert shapes.maps == [(6, 28, 28), (16, 10, 10)] and shapes.pooled == 84  # input of the last linear layer


def test_mobilenet_v1():
    """Method card `kd` 3.1 and mdistiller's feature list, which has no stem."""
    with torch.device("meta"):
        net = build_model("mobilenetv1", num_classes=1000, image_size=224)
        found = TapSet(view_of(net, 224, 1000).to("meta"), EVERYTHING)
    assert count_parameters(net) == 4_231_976 and len(list(net.parameters())) == 83
    assert sum(b.numel() for b in net.buffers()) == 21_915
    shapes = sorted(list(p.shape) for p in net.parameters())
    assert hashlib.sha1(str(shapes).encode()).hexdigest() == "aea29386b89939540af43d6455b51bc2acf59de6"
    assert found.shapes.maps == [(128, 56, 56), (256, 28, 28), (512, 14, 14), (1024, 7, 7)] == found.shapes.preact
    assert found.shapes.pooled == 1024
    with pytest.raises(ModelError, match="at least 32x32"):
        build_model("mobilenetv1", num_classes=10, image_size=16)


# --- what is left behind ----------------------------------------------------------------------------------------------


def test_the_probe_leaves_the_network_as_it_was():
    net = torchvision_models.resnet18(weights=None, num_classes=10).train()
    net.layer1.eval()
    modes = [m.training for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.get_rng_state()
    taps = TapSet(view_of(net), EVERYTHING)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert hooks_of(net) == 0 and all(p.grad is None for p in net.parameters())
    assert taps.shapes.maps[0] == (64, 8, 8)


def test_hooks_go_even_when_the_forward_fails():
    net, view = house("resnet8")
    taps = TapSet(view, EVERYTHING)
    with pytest.raises(ModelError):
        taps(images(16))
    net.layer3.forward = lambda x: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        taps(images())
    assert hooks_of(net) == 0 and not taps._kept


def test_nothing_wanted_is_a_plain_forward(monkeypatch):
    net, view = house("resnet8")
    monkeypatch.setattr(nn.Module, "register_forward_hook", None)
    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", None)
    taps = TapSet(view, ())
    given = taps(images())
    assert torch.equal(given.logits, view(images()))
    assert given.pooled is given.maps is given.preact is None and taps.names == []
    assert taps.shapes.pooled == 0 and taps.shapes.maps == taps.shapes.preact == []


def test_a_forward_that_depends_on_the_mode_is_an_error():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.down, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2), nn.Linear(4, 10)

        def forward(self, x):
            x = self.conv(x)
            x = self.down(x)
            if self.training:
                x = self.down(x)
            return self.head(x.mean((2, 3)))

    net = Moody()
    taps = TapSet(view_of(net), ("maps",))
    with pytest.raises(ModelError, match=r"down is not called as often.*got '2 call\(s\) instead of 1'"):
        taps(images())
    net.eval()
    assert taps(images()).maps[0].shape == (4, 4, 14, 14)


def test_gradients_reach_the_weights_through_every_tap():
    net, view = house("resnet8")
    taps = TapSet(view, EVERYTHING)
    given = taps(images())
    for tensor in (given.pooled, *given.maps, *given.preact):
        grad = torch.autograd.grad(tensor.square().mean(), net.conv1.weight, retain_graph=True)[0]
        assert grad.abs().sum() > 0
    with torch.no_grad():
        assert not taps(images()).maps[0].requires_grad


def test_logits_are_float32_under_autocast():
    _, view = house("resnet8")
    taps = TapSet(view, EVERYTHING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given, bare = taps(images()), TapSet(view, ())(images())
    assert given.logits.dtype == bare.logits.dtype == torch.float32 and torch.equal(given.logits, bare.logits)


def test_a_replaced_module_is_found_again():
    """SyncBatchNorm conversion and the like swap modules after the probe."""
    net, view = house("wrn16_1")
    taps = TapSet(view, ("preact",))
    net.bn1 = nn.Identity()
    assert torch.equal(taps(images()).preact[-1], TapSet(view, ("maps",))(images()).maps[-1])


def test_compiled_network(monkeypatch):
    """Taps of a compiled network are those of the plain one; one compilation serves every call of a mode."""
    plain, compiled = (build_model("convnet_d2_w8_bn", num_classes=10, seed=0).train() for _ in range(2))
    compiler = torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    compiled.compile(backend="eager")
    view = view_of(compiled)
    view(images())  # the bare forward is compiled first, without hooks
    view_of(plain)(images())
    ours, theirs = TapSet(view, EVERYTHING), TapSet(view_of(plain), EVERYTHING)
    for _ in range(3):
        a, b = ours(images()), theirs(images())
        pairs = zip((a.logits, a.pooled, *a.maps, *a.preact), (b.logits, b.pooled, *b.maps, *b.preact), strict=True)
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in pairs)
        weights = compiled.features[0].conv.weight, plain.features[0].conv.weight
        grads = [torch.autograd.grad(t.maps[1].square().mean(), w)[0] for t, w in zip((a, b), weights, strict=True)]
        assert torch.allclose(*grads, atol=1e-6) and hooks_of(compiled) == 0
        view(images())
        view_of(plain)(images())
    assert compiler.frame_count == 1
    for name, buffer in plain.named_buffers():
        assert torch.allclose(buffer, compiled.get_buffer(name), atol=1e-6)
