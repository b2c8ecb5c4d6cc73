"""list, recipes and doctor."""

from __future__ import annotations

import json
import re

import pytest

from synthkit import tables
from synthkit.cli.list import KINDS
from synthkit.cli.main import main
from synthkit.config import recipes
from synthkit.config.parse import load_recipe

RECIPES = 272
"""Shipped recipes; a new recipe is a new row here and in the docs."""


def output(capsys, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_every_table_is_listed_with_a_description(capsys, kind):
    entries = json.loads(output(capsys, "list", kind, "--json"))
    assert entries and all(text.strip() for text in entries.values())
    plain = output(capsys, "list", kind)
    assert all(name in plain for name in entries)


def test_tables_hold_what_can_be_named(capsys):
    listed = json.loads(output(capsys, "list", "--json"))
    assert listed["methods"] == sorted(tables.methods())
    assert listed["curricula"] == sorted(tables.CURRICULA)
    assert {"resnet34", "wrn40_2", "lenet5_bn"} <= set(listed["models"])
    assert output(capsys, "list", "method") == output(capsys, "list", "methods")


def test_losses_are_listed_with_what_they_need(capsys):
    lines = {line.split()[0]: line for line in output(capsys, "list", "losses").splitlines() if line}
    assert lines["kd"].endswith("(the default loss)")
    assert lines["crd"].endswith("[labels, features, index, batch, beside]")
    assert lines["simkd"].endswith("[features, deploys]")
    assert lines["ofa"].endswith("[labels, student features]")
    assert lines["distill_weighted"].endswith("[labels, teacher, teachers]")
    words = {word for line in lines.values() if line.endswith("]") for word in line.rpartition("[")[2][:-1].split(", ")}
    assert all(any(key.startswith(f"[{word.split()[0]}") for key in lines) for word in words)


def test_the_expected_number_of_recipes_is_shipped():
    assert len(recipes.names()) == RECIPES


@pytest.mark.parametrize("name", recipes.names())
def test_recipe(capsys, name):
    header = recipes.header(recipes.find(name))
    text = " ".join(header)
    # What it is for, what to expect, on what hardware, and the command that runs it.
    for part in ("Expected:", "Hardware:"):
        assert part in text
    command = re.search(rf"synthkit (\w+) --config {re.escape(name)}( |$)", text)
    assert command, header
    assert output(capsys, "recipes", "check", name) == f"{name}: ok\n"
    config = load_recipe(name)
    assert type(config).__name__.lower().startswith(command.group(1))


def test_published_rows_are_the_recipes():
    """Values of the published scripts (methods/dfkd.md 2.1), typed here by hand."""
    rows = {
        # B, E, loss, T, lambda_0, alpha, adv, grad_adv, begin, end, depth, nz, seed
        "cifar10/cudfkd-r34-r18": (512, 250, "l1", 20, 2.0, 1e-4, 0, 0.5, 0.25, 0.75, 2, 512, 30),
        "cifar10/cudfkd-wrn40_2-wrn16_1": (1024, 250, "kl", 20, 2.0, 1e-4, 0.5, 0.05, 0.25, 0.75, 2, 512, 0),
        "cifar100/cudfkd-r34-r18": (768, 400, "l1", 5, 1, 2e-5, 0, 0.35, 0.2, 0.8, 2, 512, 0),
        "cifar100/cudfkd-wrn40_2-wrn40_1": (1024, 500, "kl", 2, 1, 2e-5, 0, 0.12, 0.2, 0.75, 2, 512, 0),
        "tiny-imagenet/cudfkd-r34-r18": (512, 400, "l1", 5, 1, 2e-5, 1, 0.15, 0.2, 0.75, 3, 1024, 0),
    }
    for name, row in rows.items():
        config = load_recipe(name)
        m = config.method
        found = (
            m.batch_size, m.epochs, m.loss, m.T, m.lambda_0, m.alpha, m.adv, m.grad_adv, m.begin, m.end, m.depth, m.nz,
            config.seed,
        )  # fmt: skip
        assert found == row, name
        assert (m.lr, m.momentum, m.weight_decay, m.lr_g, m.kd_steps, m.ep_steps) == (0.1, 0.9, 1e-4, 1e-3, 10, 400)
        assert (m.lambda_ent, m.oh, m.bn, m.act, m.betas_g, m.adv_type) == (-20, 1, 1, 0, (0.9, 0.99), "kl")
    assert load_recipe("cifar10/cudfkd-r34-r18-agg").curriculum == "none"
    memory = load_recipe("cifar10/cudfkd-r34-r18-mem").method
    assert (memory.adv, memory.grad_adv, memory.batch_size) == (1, 0, 768)


def test_copy_never_overwrites(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "cifar10/cudfkd-r34-r18"
    output(capsys, "recipes", "copy", name)
    copied = tmp_path / "cudfkd-r34-r18.yaml"
    assert copied.read_text() == output(capsys, "recipes", "show", name)
    assert main(["recipes", "copy", name]) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "sub").mkdir()
    output(capsys, "recipes", "copy", name, "sub")
    assert (tmp_path / "sub" / "cudfkd-r34-r18.yaml").is_file()
    assert main(["recipes", "copy", name, "nowhere/x.yaml"]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_check_finds_what_is_wrong(capsys, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("teacher: resnet43\ncurriculum: easy2hrd\n")
    assert main(["recipes", "check", str(bad)]) == 2
    assert "did you mean 'easy2hard'?" in capsys.readouterr().out
    bad.write_text("teacher: lenet55\n")
    assert main(["recipes", "check", str(bad), "--json"]) == 2
    assert "did you mean 'lenet5'?" in json.loads(capsys.readouterr().out)[str(bad)]


def test_recipes_are_found_by_path_and_by_name(tmp_path):
    by_name = recipes.find("cifar10/cudfkd-r34-r18")
    assert recipes.find("recipes/cifar10/cudfkd-r34-r18.yaml") == by_name or by_name.is_file()
    assert recipes.find(by_name) == by_name


def test_doctor(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SYNTHKIT_HOME", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    findings = json.loads(output(capsys, "doctor", "--json"))
    assert findings["problems"] == []
    assert findings["packages"]["torch"] and findings["devices"]["cpu"]["cores"] >= 1
    assert findings["paths"]["store"] == {
        "path": str(tmp_path / "store"),
        "exists": False,
        "writable": True,
        "free": findings["paths"]["store"]["free"],
    }
    assert "no problems found" in output(capsys, "doctor")


def test_doctor_says_what_is_missing(capsys, monkeypatch):
    from synthkit.cli import doctor

    monkeypatch.setattr(doctor, "NEEDED", (*doctor.NEEDED, "surely-not-installed"))
    monkeypatch.setattr(doctor, "_writable", lambda path: False)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "problem: surely-not-installed is missing: pip install surely-not-installed" in text
    assert "cannot be written" in text
