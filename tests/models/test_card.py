"""Model cards: round trip, validation, hostile files."""

from __future__ import annotations

import json

import pytest
import yaml

from synthkit import paths
from synthkit.errors import ConfigError, ModelError
from synthkit.models.card import ModelCard

GOOD = {"arch": "resnet8", "num_classes": 3, "input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_round_trip(tmp_path, suffix):
    card = ModelCard(
        arch="resnet8",
        num_classes=3,
        input_size=(1, 28, 28),
        mean=[0.13],
        std=[0.31],
        weights="w.safetensors",
        sha256="AB" * 32,
        class_names=["null", "été", "3"],
        accuracy={"mnist": 99.1},
        source="here",
        licence="CC0",
        extra={"note": [1, 2]},
    )
    assert card.sha256 == "ab" * 32
    path = card.save(tmp_path / "sub" / f"card{suffix}")
    assert ModelCard.load(path) == card


def test_unset_keys_are_not_written(tmp_path):
    path = ModelCard.from_dict(dict(GOOD)).save(tmp_path / "card.yaml")
    assert set(yaml.safe_load(path.read_text())) == set(GOOD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"license": "MIT"}, "unknown key 'license'.*did you mean 'licence'"),
        ({"zzz": 1}, "unknown key 'zzz'.*allowed: arch"),
        ({"num_classes": "ten"}, "num_classes"),
        ({"num_classes": True}, "num_classes"),
        ({"num_classes": 0}, "num_classes"),
        ({"input_size": [3, 32]}, "input_size"),
        ({"input_size": [3, 32, -1]}, "input_size"),
        ({"mean": [0.5]}, "mean needs 3"),
        ({"mean": "0.5"}, "mean must be a list"),
        ({"mean": [0.5, 0.5, float("nan")]}, "mean must be a list of numbers"),
        ({"std": [0.2, 0.2, 0]}, "std must be positive"),
        ({"sha256": "123"}, "64 hexadecimal"),
        ({"class_names": ["a", "b"]}, "2 names for 3 classes"),
        ({"class_names": "abc"}, "list of names"),
        ({"accuracy": "good"}, "accuracy"),
        ({"extra": [1]}, "extra"),
        ({"arch": 18}, "arch must be text"),
        ({"arch": ""}, "arch must be text"),
        ({"weights": 3}, "weights must be text"),
    ],
)
def test_wrong_values_name_the_key_and_the_file(tmp_path, change, message):
    (tmp_path / "card.json").write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ConfigError, match=message) as error:
        ModelCard.load(tmp_path / "card.json")
    assert "card.json" in str(error.value)


def test_missing_keys():
    with pytest.raises(ConfigError, match="lacks mean, std"):
        ModelCard.from_dict({k: v for k, v in GOOD.items() if k not in ("mean", "std")})


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.yaml", "a: &x [1, 2]\nb: *x\n", "aliases"),
        ("b.yaml", "!!python/object/apply:os.system ['echo hi']", "not readable"),
        ("c.yaml", "a: [1, 2", "not readable"),
        ("d.json", "{", "not readable"),
        ("e.yaml", "- 1\n- 2\n", "mapping"),
        ("f.yaml", "", "mapping"),
        ("g.yaml", "x: " + "a" * 2_100_000, "too many"),
        ("h.yaml", "[" * 5000, "not readable"),
    ],
)
def test_hostile_or_broken_files(tmp_path, name, text, error):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=error):
        ModelCard.load(tmp_path / name)


def test_not_text(tmp_path):
    (tmp_path / "card.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="not readable"):
        ModelCard.load(tmp_path / "card.yaml")


def test_missing_file_and_wrong_type(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        ModelCard.load(tmp_path / "card.yaml")
    with pytest.raises(ModelError, match="unknown file type"):
        ModelCard.load(tmp_path / "card.txt")
    with pytest.raises(ModelError, match="unknown file type"):
        ModelCard.from_dict(dict(GOOD)).save(tmp_path / "card")


def test_shipped_cards_are_valid():
    cards = sorted((paths.recipes_dir() / "teachers").glob("*.yaml"))
    assert {"resnet20.yaml", "resnet56.yaml"} <= {c.name for c in cards}
    for path in cards:
        card = ModelCard.load(path)
        assert card.weights and card.sha256 and card.licence and card.source and card.class_names
