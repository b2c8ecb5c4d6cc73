"""Students that are used with modules of their loss: what is measured, saved, loaded and priced."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from synthkit.cli.distill import summary_lines
from synthkit.cli.main import main
from synthkit.config.schema import DistillConfig, RuntimeConfig, TeachConfig
from synthkit.data.specs import load_data
from synthkit.distillation.deployed import Deployed
from synthkit.distillation.distill import RunResult, distill
from synthkit.distillation.heads.simkd import SimKDNetwork
from synthkit.distillation.losses.lelp import LELP
from synthkit.distillation.teach import teach
from synthkit.errors import ConfigError, ModelError
from synthkit.evaluation.metrics import evaluate_classifier
from synthkit.models.build import build_model, load_model
from synthkit.models.view import TeacherView

CPU = RuntimeConfig(device="cpu")


@pytest.fixture(scope="module")
def resnet(workshop, tmp_path_factory) -> Path:
    """A teacher whose classifier reads its pooled last map."""
    out = tmp_path_factory.mktemp("resnet") / "teacher"
    teach(
        TeachConfig(
            arch="resnet8", data=workshop.data, epochs=2, batch_size=16, lr=0.05, augment="none", out=str(out),
            runtime=CPU,
        )
    )  # fmt: skip
    return out


def config(workshop, resnet: Path, out: Path, **changes) -> DistillConfig:
    values = {
        "bank": str(workshop.bank), "teacher": str(resnet), "student": "lenet5_half_bn", "loss_name": "simkd",
        "epochs": 3, "batch_size": 16, "optimizer": "adamw", "lr": 1e-2, "augment": "none", "out": str(out),
        "eval_data": workshop.data, "runtime": CPU,
    }  # fmt: skip
    return DistillConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def result(workshop, resnet, tmp_path_factory) -> RunResult:
    return distill(config(workshop, resnet, tmp_path_factory.mktemp("simkd") / "run"))


def top1(spec: Path, data: str) -> float:
    view = TeacherView.from_loaded(load_model(str(spec)))
    return evaluate_classifier(view, load_data(data, "test", size=(1, 32, 32)))["top1"]


def test_both_figures_and_both_costs_are_reported(result):
    found = json.loads((result.path / "result.json").read_text())
    assert found["deployed_params"] > found["plain_params"] > 0
    assert found["deployed_flops"] > found["plain_flops"] > 0
    assert found["top1"] > found["plain_top1"] and found["holdout_agreement"] > found["plain_holdout_agreement"]
    logged = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert not any("agreement" in record for record in logged)  # of the student's own classifier, which is not used
    assert logged[-1]["plain_top1"] == found["plain_top1"] and "plain_top1" not in logged[0]
    text = "\n".join(summary_lines(result))
    assert f"{100 * found['plain_top1']:.2f} % top-1" in text
    assert f"{found['deployed_params']:,} parameters and {found['deployed_flops']:,} FLOPs as deployed" in text
    assert f"{found['plain_params']:,} parameters and {found['plain_flops']:,} FLOPs alone" in text


def test_the_run_directory_is_the_whole_network(result, workshop):
    loaded = load_model(str(result.path))
    assert isinstance(loaded.module, SimKDNetwork) and not loaded.module.training
    assert loaded.card.extra["head"]["loss"] == "simkd" and loaded.card.extra["head"]["settings"]["factor"] == 2
    assert sum(p.numel() for p in loaded.module.parameters()) == result.metrics["deployed_params"]
    assert top1(result.path, workshop.data) == result.metrics["top1"] == top1(result.student, workshop.data)
    assert isinstance(loaded.card.accuracy, dict)
    assert list(loaded.card.accuracy.values()) == pytest.approx([result.metrics["top1"]], abs=1e-6)


def test_the_student_alone_lies_beside_it(result, workshop):
    plain = load_model(str(result.path / "plain"))
    assert not isinstance(plain.module, SimKDNetwork) and "head" not in plain.card.extra
    assert plain.card.extra["note"] == "the student alone, without the modules that its loss deploys"
    assert sum(p.numel() for p in plain.module.parameters()) == result.metrics["plain_params"]
    assert top1(result.path / "plain", workshop.data) == result.metrics["plain_top1"]
    whole = load_file(str(result.path / "student.safetensors"))
    for name, value in plain.module.state_dict().items():
        assert torch.equal(value, whole[f"student.{name}"])


@pytest.mark.parametrize("part, figure", [("", "top1"), ("plain", "plain_top1")])
def test_evaluate_takes_both(result, workshop, capsys, part, figure):
    words = ["evaluate", "--model", str(result.path / part), "--data", workshop.data, "--device", "cpu", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["top1"] == result.metrics[figure]


def test_a_term_of_a_sum_and_a_control_deploy_too(workshop, resnet, tmp_path):
    found = distill(
        config(workshop, resnet, tmp_path / "run", loss_name="kd+0.5*simkd", epochs=None, steps=3, control="noise")
    )
    for folder, figures in ((found.path, found.metrics), (found.path / "control", found.control)):
        loaded = load_model(str(folder))
        assert isinstance(loaded.module, SimKDNetwork) and loaded.card.extra["head"]["loss"] == "simkd"
        assert figures is not None and top1(folder, workshop.data) == figures["top1"]
        assert top1(folder / "plain", workshop.data) == figures["plain_top1"]


def test_a_student_that_stands_alone_has_no_head(workshop, resnet, tmp_path):
    found = distill(config(workshop, resnet, tmp_path / "run", loss_name="kd", epochs=None, steps=2, ema=0.5))
    card = load_model(str(found.path)).card
    assert "head" not in card.extra and not (found.path / "plain").exists()
    assert not [key for key in found.metrics if key.startswith(("plain_", "deployed_"))]
    average = load_model(str(found.path / "ema"))
    assert average.card.extra["note"] == "moving average of the weights, decay 0.5 per step"
    assert top1(found.path / "ema", workshop.data) == found.metrics["ema_top1"]
    assert "average" in "\n".join(summary_lines(found)) and "alone" not in "\n".join(summary_lines(found))


def test_the_deployed_view_is_a_copy(workshop, resnet, tmp_path, monkeypatch):
    """Measuring it freezes nothing that is still trained."""
    seen = []
    view = Deployed.view

    def watched(self):
        found = view(self)
        assert found is not None and self.module is not None
        own = [p.requires_grad for p in self.trainer.network.parameters()]
        seen.append((all(own), any(p.requires_grad for p in found.module.parameters())))
        shared = {p.data_ptr() for p in found.module.parameters()} & {p.data_ptr() for p in self.module.parameters()}
        assert not shared
        return found

    monkeypatch.setattr(Deployed, "view", watched)
    distill(config(workshop, resnet, tmp_path / "run", epochs=2, eval_every=1))
    assert seen == [(True, False)] * 2


# --- cards from elsewhere ---------------------------------------------------------------------------------------------

CORRUPTED: list[tuple[dict[str, Any] | str, type[Exception], str]] = [
    ("nonsense", ModelError, "the card's head must hold loss and settings; got 'nonsense'"),
    ({"loss": "simkd"}, ModelError, "must hold loss and settings"),
    ({"loss": "simkd", "settings": ["a"]}, ModelError, "must hold loss and settings"),
    ({"loss": "simkdd"}, ConfigError, "did you mean 'simkd'"),
    ({"loss": "kd"}, ModelError, "names a loss that deploys nothing; got 'kd'"),
    ({"loss": "kd+simkd"}, ModelError, "deploys nothing"),
    ({"loss": "lelp"}, ModelError, r"head lelp: settings are missing; got \['subclasses'\]"),
    ({"loss": "gendd"}, ModelError, "head gendd: settings are missing"),
    ({"factor": None}, ModelError, "head simkd: whole numbers from 1 to 65536 are needed"),
    ({"factor": 0}, ModelError, "head simkd: whole numbers"),
    ({"factor": 1000}, ConfigError, "loss.factor must not be above"),
    ({"channels": "many"}, ModelError, "head simkd: whole numbers"),
    ({"channels": 10**12}, ModelError, "head simkd: whole numbers"),
    ({"channels": 3}, ModelError, "simkd"),
    ({"num_classes": 7}, ModelError, "simkd"),
    ({"size": 4}, ModelError, r"head simkd: a module's name, \[height, width\] and true or false are needed"),
    ({"size": [4, 0]}, ModelError, "head simkd: a module's name"),
    ({"point": 3}, ModelError, "head simkd: a module's name"),
    ({"bias": "yes"}, ModelError, "head simkd: a module's name"),
    ({"bias": False}, ModelError, "simkd"),
    ({"point": "stage9"}, ModelError, "head simkd: the student has no such module; got 'stage9'"),
]


@pytest.mark.parametrize("changes, error, message", CORRUPTED, ids=lambda x: str(x)[:40] if not callable(x) else "")
def test_corrupted_heads_are_typed_errors(result, tmp_path, changes, error, message):
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copy(result.path / "student.safetensors", folder)
    card = yaml.safe_load((result.path / "card.yaml").read_text())
    place = card if "head" in card else card["extra"]
    head = copy.deepcopy(place["head"])
    if isinstance(changes, str) or "settings" in changes or changes == {"loss": "simkd"}:
        head = changes
    elif "loss" in changes:
        head["loss"] = changes["loss"]
    else:
        head["settings"] |= changes
    place["head"] = head
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(error, match=message):
        load_model(str(folder))


def test_a_missing_setting_is_named(result):
    loaded = load_model(str(result.path))
    settings = loaded.card.extra["head"]["settings"]
    fresh = build_model("lenet5_half_bn", num_classes=4, in_channels=1, image_size=32, seed=0)
    from synthkit.distillation.losses.simkd import SimKD

    for name in settings:
        with pytest.raises(ModelError, match=rf"settings are missing; got \['{name}'\]"):
            SimKD.rebuild(fresh, {k: v for k, v in settings.items() if k != name})
    for settings in ({"num_classes": 4}, {"num_classes": 4, "subclasses": 0}, {"num_classes": "4", "subclasses": 2}):
        with pytest.raises(ModelError, match="head lelp"):
            LELP.rebuild(fresh, settings)
