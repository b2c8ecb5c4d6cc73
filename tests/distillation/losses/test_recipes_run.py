"""Every shipped recipe of a distillation loss, cut to two steps of tiny networks: its loss, terms and options run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from synthkit.bank.make import bank_from_arrays
from synthkit.config import recipes
from synthkit.config.parse import load_recipe
from synthkit.config.schema import RuntimeConfig, TeachConfig
from synthkit.distillation.distill import distill
from synthkit.distillation.protocols import beside_note
from synthkit.distillation.teach import teach
from synthkit.distillation.weighted import parse_terms
from synthkit.models.build import build_model

RECIPES = {name: recipes.load(name) for name in recipes.names() if "/kd/" in name}
DISTILL = {name: values for name, values in RECIPES.items() if values["command"] == "distill"}
SIDE, BATCH, CLASSES = 16, 16, 5
SMALL = {  # what costs time and not the loss: negatives, passes before the first step, the width of a head, sampling
    "crd": {"negatives": 24},
    "ft": {"epochs": 1},
    "gendd": {"repeats": 2, "width": 16, "steps": 2, "samples": 1},
}


def kind(values: dict) -> tuple:
    """What makes two recipes one run here: terms and schedules without their weights, options without their values."""
    loss = values["loss"]
    options = tuple((key, tuple(v) if isinstance(v, dict) else ()) for key, v in loss.items() if key != "name")
    return re.sub(r"[0-9.]+\*", "", loss["name"]), options, values.get("optimizer"), values["labels"] == "none"


DISTINCT = {kind({"labels": "none", **values}): name for name, values in reversed(DISTILL.items())}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(bank, teacher): two batches of noise with labels, and a network that was taught for a step."""
    root: Path = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2 * BATCH, 3, SIDE, SIDE), dtype=np.uint8)
    labels = np.arange(2 * BATCH) % CLASSES
    np.savez(root / "data.npz", images_train=images, labels_train=labels, images_test=images, labels_test=labels)
    cpu = RuntimeConfig(device="cpu")
    teach(
        TeachConfig(
            arch="resnet14x2", data=f"npz:{root}/data.npz", steps=1, batch_size=BATCH, augment="none",
            out=str(root / "teacher"), runtime=cpu,
        )
    )  # fmt: skip
    bank_from_arrays(
        root / "bank", images, labels, label_kind="real", num_classes=CLASSES, mean=[0.5] * 3, std=[0.25] * 3,
        class_names=list("abcde"), images_per_shard=64,
    )  # fmt: skip
    return str(root / "bank"), str(root / "teacher")


def overrides(values: dict, tiny: tuple[str, str], out: Path) -> dict:
    """Flags that cut the recipe down."""
    bank, teacher = tiny
    terms = [term.name for term in parse_terms(values["loss"]["name"])]
    small = {
        f"loss.{name}.{key}" if len(terms) > 1 else f"loss.{key}": value
        for name in terms
        for key, value in SMALL.get(name, {}).items()
    }
    length = {"steps": 2} if "steps" in values else {"epochs": 1}
    here = {"bank": bank, "teacher": teacher, "student": "resnet8", "batch_size": BATCH, "out": str(out)}
    return {**here, **length, **small, "runtime.device": "cpu"}


@pytest.mark.parametrize("name", sorted(DISTINCT.values()))
def test_two_steps(name, tiny, tmp_path):
    config = load_recipe(name, overrides(DISTILL[name], tiny, tmp_path / "run"))
    result = distill(config)
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == result.metrics["steps"] == 2
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in lines)
    assert result.metrics["loss_name"] == config.loss_name == DISTILL[name]["loss"]["name"]
    weights = load_file(str(result.path / "student.safetensors"))
    inside = "" if "conv1.weight" in weights else "student."  # of a deployed head
    first = build_model("resnet8", num_classes=CLASSES, image_size=SIDE, seed=config.seed).state_dict()["conv1.weight"]
    assert not torch.equal(first, weights[f"{inside}conv1.weight"])  # the loss reaches the student


@pytest.mark.parametrize("protocol", sorted({values["protocol"] for values in DISTILL.values()}))
def test_the_protocol_misses_nothing(protocol):
    """The losses stand beside what their protocol says, or alone where they were published alone (SSLD, GenDD)."""
    for name, values in DISTILL.items():
        loss = values["loss"]["name"]
        if values["protocol"] == protocol:
            options = {key: value for key, value in values["loss"].items() if key != "name"}
            assert beside_note(protocol, loss, options) is None, name


def test_headers_say_what_is_expected_and_where_it_is_from():
    for name in DISTILL:
        text = " ".join(recipes.header(recipes.find(name)))
        assert " Expected: " in text and " Source: " in text and "not measured here" in text, name
        assert re.search(rf"synthkit distill --config {re.escape(name)}( |$)", text), name
