"""Model specs from the user's side: every form, every wrong form."""

from __future__ import annotations

import builtins
import logging
import types

import numpy as np
import pytest
import torch
from torch import nn

from synthkit import paths
from synthkit.errors import ModelError, WeightsError
from synthkit.models.build import build_model, load_model
from synthkit.models.card import ModelCard
from synthkit.models.weights import save_weights


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty store and an empty assets folder, and a working directory of its own."""
    monkeypatch.setenv("SYNTHKIT_HOME", str(tmp_path / "store"))
    monkeypatch.setattr(paths, "assets_dir", lambda: tmp_path / "assets")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def _card(folder, *, arch="resnet8", classes=5, name="card.yaml", weights="w.safetensors", save_as=None, **more):
    """A card and its weights in `folder`; returns the network that was saved."""
    net = build_model(arch, num_classes=classes, seed=9)
    digest = save_weights(net, folder / (save_as or weights))
    fields = {"arch": arch, "num_classes": classes, "input_size": (3, 32, 32), "mean": [0.1] * 3, "std": [0.3] * 3}
    ModelCard(**{**fields, "weights": weights, "sha256": digest, **more}).save(folder / name)
    return net


def _equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_name_at_file_infers_classes_and_channels_and_says_what_it_assumes(home, caplog):
    net = build_model("resnet8", num_classes=7, in_channels=1, seed=1)
    save_weights(net, home / "work" / "w.safetensors")
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        loaded = load_model("resnet8@w.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    assert _equal(loaded.module, net)
    assert (loaded.card.num_classes, loaded.card.input_size, loaded.card.mean) == (7, (1, 32, 32), [0.5])
    assert "mean 0.5" in loaded.card.extra["assumed"] and "no card" in caplog.text
    assert loaded.path is not None and loaded.path.name == "w.safetensors"


@pytest.mark.parametrize(
    ("arch", "classes", "channels", "size", "mean"),
    [
        ("resnet8", 10, 3, 32, 0.4914),
        ("resnet8", 100, 3, 32, 0.5071),
        ("resnet18_tiny", 200, 3, 64, 0.4802),
        ("lenet5", 10, 1, 32, 0.1307),
        ("convnet", 10, 1, 28, 0.1307),
    ],
)
def test_assumed_normalisation(home, arch, classes, channels, size, mean):
    save_weights(build_model(arch, num_classes=classes, in_channels=channels, image_size=size), home / "w.safetensors")
    card = load_model(f"{arch}@{home}/w.safetensors").card
    assert card.mean[0] == mean and card.input_size == (channels, size, size)


def test_card_decides_and_contradictions_are_errors(home):
    net = _card(home / "t")
    loaded = load_model(f"{home}/t/card.yaml", num_classes=5, image_size=64)
    assert _equal(loaded.module, net) and loaded.card.mean == [0.1] * 3
    assert loaded.card.input_size == (3, 32, 32) and not loaded.module.training
    with pytest.raises(ModelError, match="card says 5 classes, the task has 10"):
        load_model(f"{home}/t/card.yaml", num_classes=10)
    with pytest.raises(ModelError, match="card says 3 channels, the task has 1"):
        load_model(f"{home}/t/card.yaml", in_channels=1)


def test_card_whose_weights_changed(home):
    _card(home / "t")
    save_weights(build_model("resnet8", num_classes=5, seed=10), home / "t" / "w.safetensors")
    with pytest.raises(WeightsError, match="not the file that the card describes"):
        load_model(f"{home}/t/card.yaml")


def test_card_without_its_weights(home):
    _card(home / "t", source="https://example.org/w")
    (home / "t" / "w.safetensors").unlink()
    with pytest.raises(WeightsError, match="not there.*w.safetensors.*example.org"):
        load_model(f"{home}/t/card.yaml")


def test_card_that_names_no_weights(home):
    card = ModelCard(arch="resnet8", num_classes=4, input_size=(3, 32, 32), mean=[0.5] * 3, std=[0.5] * 3)
    card.save(home / "work" / "plain.yaml")
    with pytest.raises(WeightsError, match="names no weights file"):
        load_model("plain.yaml")
    fresh = load_model("plain.yaml", weights="optional", seed=2)
    assert fresh.path is None and fresh.module.training
    assert _equal(fresh.module, build_model("resnet8", num_classes=4, seed=2))


def test_card_by_file_name_from_the_store(home):
    _card(home / "store" / "teachers", name="mine.yaml")
    assert load_model("mine.yaml").card.num_classes == 5
    with pytest.raises(ModelError, match="no such file"):
        load_model("other.yaml")


@pytest.mark.parametrize("file", ["student.safetensors", "model.safetensors"])
def test_run_directory(home, file):
    net = _card(home / "runs" / "s1", weights=None, save_as=file, sha256=None)
    loaded = load_model(str(home / "runs" / "s1"))
    assert _equal(loaded.module, net) and loaded.path == home / "runs" / "s1" / file


def test_run_directory_of_a_run_that_did_not_finish(home):
    _card(home / "runs" / "s1", weights=None, save_as="model.safetensors", sha256=None)
    (home / "runs" / "s1" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="unfinished"):
        load_model(str(home / "runs" / "s1"))
    (home / "empty").mkdir()
    with pytest.raises(ModelError, match="no card.yaml in it"):
        load_model(str(home / "empty"))


@pytest.mark.parametrize(
    "place", ["store/teachers/r18/card.yaml", "store/teachers/resnet18.yaml", "assets/teachers/r18.yaml"]
)
def test_bare_name_finds_stored_weights(home, place):
    target = home / place
    net = _card(target.parent, arch="resnet18", name=target.name)
    assert _equal(load_model("r18").module, net)


def test_bare_name_prefers_the_embedded_teacher(home):
    _card(home / "store" / "teachers" / "resnet8", classes=5)
    _card(home / "assets" / "teachers" / "resnet8", classes=6)
    assert load_model("resnet8").card.num_classes == 6


def test_bare_name_without_weights_says_how_to_get_them(home):
    with pytest.raises(WeightsError) as error:
        load_model("resnet8")
    for remedy in ("synthkit teach --arch resnet8", "resnet8@weights.pth", "hf:REPO"):
        assert remedy in str(error.value)


def test_bare_name_for_a_student_is_fresh_and_ignores_stored_weights(home):
    _card(home / "store" / "teachers" / "resnet8", classes=5)
    fresh = load_model("resnet8", num_classes=3, in_channels=1, image_size=28, weights="optional", seed=4)
    assert _equal(fresh.module, build_model("resnet8", num_classes=3, in_channels=1, seed=4))
    assert fresh.card.input_size == (1, 28, 28) and fresh.module.training and fresh.sha256 is None


def test_a_name_wins_over_a_folder_of_the_same_name(home):
    (home / "work" / "resnet8").mkdir()
    assert load_model("resnet8", weights="optional").path is None
    with pytest.raises(ModelError, match="no run directory"):
        load_model("./resnet8", weights="optional")


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("resnet8@w.safetensors", {"num_classes": 10}, "classifier has 6 classes, the architecture was asked for 10"),
        ("resnet8@w.safetensors", {"in_channels": 1}, "takes 3-channel images, the architecture was asked for 1"),
        ("resnet14@w.safetensors", {}, "missing.*layer1.1.conv1.weight"),
        ("resnet14@w.safetensors", {}, "the file fits 'resnet8'"),
        ("r18@w.safetensors", {}, "the file fits 'resnet8'"),
        ("resnet8_a@w.safetensors", {}, "the file fits 'resnet8'"),
        ("lenet5@w.safetensors", {}, "do not fit"),
        ("w.safetensors", {}, "write NAME@w.safetensors"),
        ("resnet8@nowhere.pth", {}, "no such file"),
        ("resnet8@", {}, "needs both"),
        ("@w.safetensors", {}, "needs both"),
        ("resnt8@w.safetensors", {}, "did you mean 'resnet8'"),
        ("no/such/run", {}, "no such card, run directory or name"),
        ("nowhere.yaml", {}, "no such file"),
        ("", {}, "spec is empty"),
        ("hf:", {}, "repository is missing"),
    ],
)
def test_wrong_specs(home, spec, arguments, message):
    save_weights(build_model("resnet8", num_classes=6, seed=0), home / "work" / "w.safetensors")
    with pytest.raises(ModelError, match=f"(?s){message}"):
        load_model(spec, **arguments)


def test_option_a_and_b_are_told_apart(home):
    save_weights(build_model("resnet20_a", num_classes=10, seed=0), home / "a.safetensors")
    with pytest.raises(WeightsError, match="(?s)downsample.*the file fits 'resnet20_a'"):
        load_model(f"resnet20@{home}/a.safetensors")


def test_card_with_the_wrong_number_of_classes(home):
    _card(home / "t")
    card = ModelCard.load(home / "t" / "card.yaml")
    card.num_classes = 8
    card.save(home / "t" / "card.yaml")
    with pytest.raises(WeightsError, match="classifier has 5 classes, the architecture was asked for 8"):
        load_model(f"{home}/t/card.yaml")


def test_hub(home, monkeypatch):
    net = _card(home / "snapshot")
    calls = []

    def fake(repo, *, revision, allow_patterns):
        calls.append((repo, revision, allow_patterns))
        return str(home / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    assert _equal(load_model("hf:someone/net@v1").module, net)
    load_model("hf:someone/net")
    assert [c[:2] for c in calls] == [("someone/net", "v1"), ("someone/net", None)]
    assert not any(p.endswith((".bin", ".pt", ".pth", ".ckpt")) for p in calls[0][2])


@pytest.mark.parametrize("outside", ["../w.safetensors", "/tmp/w.safetensors"])
def test_hub_card_must_stay_in_its_folder(home, monkeypatch, outside):
    _card(home / "snapshot", weights=outside, save_as="w.safetensors")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: str(home / "snapshot"))
    with pytest.raises(WeightsError, match="outside its own folder"):
        load_model("hf:someone/net")


def test_hub_failure(monkeypatch):
    def fail(repo, **_):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match="no route.*check the name and the network"):
        load_model("hf:someone/net")


def _without(monkeypatch, library):
    real = builtins.__import__

    def gone(name, *args, **kwargs):
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", gone)


def test_optional_libraries_that_are_missing(monkeypatch):
    _without(monkeypatch, "timm")
    with pytest.raises(ModelError, match=r"pip install synthkit\[timm\]"):
        build_model("timm:resnet18", num_classes=10)
    _without(monkeypatch, "huggingface_hub")
    with pytest.raises(ModelError, match=r"pip install synthkit\[hub\]"):
        load_model("hf:someone/net")


@pytest.fixture
def fake_timm(monkeypatch):
    """A stand-in with the five things of timm that are used, so that no installation is needed."""
    config = {
        "input_size": (3, 24, 24),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "license": "mit",
        "hf_hub_id": "x/y",
    }

    class Net(nn.Module):
        def __init__(self, num_classes=6, in_chans=3, pretrained=False):
            super().__init__()
            self.stem, self.head = nn.Conv2d(in_chans, 4, 3), nn.Linear(4, num_classes)
            self.num_classes, self.pretrained_cfg = num_classes, config

        def forward(self, x):
            return self.head(self.stem(x).mean((2, 3)))

    timm = types.ModuleType("timm")
    timm.is_model = lambda name: name == "tinynet"
    timm.list_models = lambda: ["tinynet"]
    timm.create_model = lambda name, **arguments: Net(**arguments)
    timm.get_pretrained_cfg = lambda name: types.SimpleNamespace(input_size=config["input_size"])
    monkeypatch.setitem(__import__("sys").modules, "timm", timm)
    return Net


def test_timm(home, fake_timm):
    assert load_model("timm:tinynet").card.licence == "mit"  # the library's own weights
    net = fake_timm(num_classes=9)
    save_weights(net, home / "w.safetensors")
    loaded = load_model(f"timm:tinynet@{home}/w.safetensors")
    assert _equal(loaded.module, net)
    assert (loaded.card.num_classes, loaded.card.input_size) == (9, (3, 24, 24))
    assert (loaded.card.mean, loaded.card.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    fresh = load_model("timm:tinynet", weights="optional", num_classes=4, in_channels=1)
    assert fresh.module.head.out_features == 4 and fresh.card.input_size == (1, 24, 24)
    with pytest.raises(ModelError, match="did you mean timm:tinynet"):
        load_model("timm:tinynt")
    with pytest.raises(ModelError, match="weights have 6 classes, the task has 10"):
        load_model("timm:tinynet", num_classes=10)


def test_torchvision_from_a_file(home):
    net = build_model("torchvision:squeezenet1_1", num_classes=1000, image_size=224, seed=0)
    save_weights(net, home / "w.safetensors")
    loaded = load_model(f"torchvision:squeezenet1_1@{home}/w.safetensors")
    assert _equal(loaded.module, net)
    assert loaded.card.mean == [0.485, 0.456, 0.406] and loaded.card.input_size == (3, 224, 224)


def test_torchvision_own_weights(home, monkeypatch):
    from torchvision.models import ResNet18_Weights

    net = build_model("torchvision:resnet18", num_classes=1000, seed=0)
    seen = {}

    def fake(self, **arguments):
        seen.update(arguments)
        return net.state_dict()

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", fake)
    loaded = load_model("torchvision:resnet18", num_classes=1000)
    assert _equal(loaded.module, net) and seen["weights_only"] is True
    assert loaded.card.class_names[0] == "tench" and loaded.card.input_size == (3, 224, 224)

    def offline(self, **_):
        raise OSError("no network")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(WeightsError, match="torchvision:resnet18@FILE"):
        load_model("torchvision:resnet18")


@pytest.mark.slow
def test_real_timm(home):
    net = build_model("timm:resnet10t", num_classes=12, seed=0)
    save_weights(net, home / "w.safetensors")
    loaded = load_model(f"timm:resnet10t@{home}/w.safetensors")
    assert _equal(loaded.module, net) and loaded.card.num_classes == 12
    assert loaded.card.mean == [0.485, 0.456, 0.406]


SHARED = paths.recipes_dir().parent.parent / "shared"
GOLDEN = paths.recipes_dir().parent / "tests" / "reference" / "third_party_resnet20.npz"
EIGHT = [
    "airplane/00003",
    "automobile/00006",
    "bird/00025",
    "cat/00000",
    "deer/00022",
    "dog/00012",
    "frog/00004",
    "horse/00013",
]


def _eight(card: ModelCard) -> torch.Tensor:
    from PIL import Image

    images = [np.asarray(Image.open(SHARED / "data" / "cifar10-subset" / "test" / f"{name}.png")) for name in EIGHT]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(card.mean).view(1, 3, 1, 1)) / torch.tensor(card.std).view(1, 3, 1, 1)


@pytest.mark.slow
def test_third_party_resnet20_gives_the_original_logits():
    """Golden case third_party_resnet20: logits of akamaster/pytorch_resnet_cifar10@d5489e8 on eight images."""
    golden = np.load(GOLDEN)
    loaded = load_model("resnet20.yaml")
    x = _eight(loaded.card)
    np.testing.assert_allclose(x.double().sum((1, 2, 3)), golden["input_sum"], rtol=1e-4, atol=1e-2)
    with torch.no_grad():
        logits = loaded.module(x)
    np.testing.assert_allclose(logits.numpy(), golden["logits"], atol=1e-4, rtol=0)
    assert logits.argmax(1).tolist() == golden["argmax"].tolist()
    assert sum(p.numel() for p in loaded.module.parameters()) == int(golden["n_params"])


@pytest.mark.slow
def test_third_party_resnet56_recognises_the_eight_images():
    loaded = load_model("resnet56.yaml")
    with torch.no_grad():
        predicted = loaded.module(_eight(loaded.card)).argmax(1).tolist()
    assert sum(p == i for i, p in enumerate(predicted)) >= 7
