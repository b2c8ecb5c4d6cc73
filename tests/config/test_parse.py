"""The two-stage parse: one validated config from words, files and keyword arguments."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from synthkit.config import parse, schema
from synthkit.config.parse import (
    config_hash,
    config_to_dict,
    dump_config,
    load_recipe,
    parse_command_line,
    parse_config,
)
from synthkit.errors import ConfigError, UsageError
from synthkit.synthesis.generator.cudfkd import CuDFKD

TEACHER = ["--teacher", "r34"]


def refused(command: str, source, *parts: str) -> str:
    """Assert a ConfigError whose message holds all `parts`."""
    with pytest.raises(ConfigError) as caught:
        parse_config(command, source)
    message = str(caught.value)
    for part in parts:
        assert part in message
    return message


def test_defaults_are_those_of_the_dataclasses():
    config = parse_config("synthesize", TEACHER)
    assert config == schema.SynthesizeConfig(teacher="r34", method=CuDFKD.Config(), method_name="cudfkd")


def test_flags_of_every_level():
    words = [*TEACHER, "--images", "123", "--method.lr_g", "5e-4", "--method.lambda_ent=-3", "--runtime.threads", "2"]
    config = parse_config("synthesize", words)
    assert (config.images, config.method.lr_g, config.method.lambda_ent) == (123, 5e-4, -3.0)
    assert config.runtime.threads == 2


def test_dashes_short_forms_bare_booleans_and_none():
    words = [
        "--teacher=r34",
        "--eval-data",
        "cifar10:/d",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--resume",
        "--out",
        "none",
    ]
    config = parse_config("synthesize", words)
    assert config.eval_data == "cifar10:/d" and config.out is None and config.resume is True
    assert (config.runtime.threads, config.runtime.device) == (1, "cpu")
    assert parse_config("synthesize", [*words, "--resume", "false"]).resume is False


def test_a_word_none_stays_where_it_is_a_choice():
    config = parse_config("distill", ["--bank", "b", "--student", "r18", "--labels", "none", "--control", "none"])
    assert (config.labels, config.control) == ("none", "none")


def test_the_protocol_is_looked_up():
    refused("distill", ["--bank", "b", "--student", "r18", "--protocol", "crdd"], "did you mean 'crd'?")


@pytest.mark.parametrize("words", [["0.5", "0.999"], ["0.5,0.999"], ["[0.5,0.999]"]])
def test_pairs(words):
    assert parse_config("synthesize", [*TEACHER, "--method.betas_g", *words]).method.betas_g == (0.5, 0.999)


def test_text_that_looks_like_a_number_stays_text():
    config = parse_config("synthesize", ["--teacher", "3", "--eval_data", "1e3", "--out", "true"])
    assert (config.teacher, config.eval_data, config.out) == ("3", "1e3", "true")


def test_the_loss_is_looked_up():
    config = parse_config("distill", ["--bank", "b", "--student", "r18", "--loss", "kd", "--loss.temperature", "7"])
    assert config.loss_name == "kd" and config.loss.temperature == 7.0
    refused(
        "distill", ["--bank", "b", "--student", "r18", "--loss", "l1", "--loss.temperature", "7"], "--loss.temperature"
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--teacher is needed"]),
        ([*TEACHER, "--lr_g", "1"], ["--lr_g", "did you mean --method.lr_g?"]),
        ([*TEACHER, "--eval-dta", "x"], ["did you mean --eval_data?"]),
        ([*TEACHER, "--thread", "1"], ["did you mean --runtime.threads?"]),
        ([*TEACHER, "--method", "cudfdk"], ["'cudfdk'", "did you mean 'cudfkd'?"]),
        ([*TEACHER, "--method.adv_type", "k"], ["method.adv_type", "'k'", "did you mean 'kl'?"]),
        ([*TEACHER, "--precision", "int4"], ["runtime.precision", "auto, fp32, bf16"]),
        ([*TEACHER, "--images", "many"], ["images", "a whole number", "'many'"]),
        ([*TEACHER, "--images", "1.5"], ["images", "a whole number"]),
        ([*TEACHER, "--images"], ["--images needs a value"]),
        ([*TEACHER, "--images", "1", "2"], ["--images takes one value"]),
        ([*TEACHER, "--method.betas_g", "1"], ["method.betas_g"]),
        ([*TEACHER, "--method.begin", "0.9"], ["begin", "end"]),
        ([*TEACHER, "--print_config", "x"], ["--print_config takes no value"]),
        ([*TEACHER, "--curriculum", "easy2hrd"], ["'easy2hrd'", "did you mean 'easy2hard'?"]),
        (["r34"], ["unexpected word", "'r34'"]),
        ([*TEACHER, "--config", "nowhere.yaml"], ["no such file", "nowhere.yaml"]),
        ([*TEACHER, "--config"], ["--config needs a value"]),
    ],
)
def test_wrong_words(words, parts):
    refused("synthesize", words, *parts)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_file_and_command_line(tmp_path):
    recipe = write(
        tmp_path / "r.yaml",
        "command: synthesize\nteacher: r34\nimages: 100\nruntime: {threads: 1}\n"
        "method: {name: cudfkd, lr_g: 1e-4, epochs: 3}\n",
    )
    config = parse_config("synthesize", ["--config", recipe, "--images", "7", "--method.epochs", "4"])
    assert (config.teacher, config.images, config.runtime.threads) == ("r34", 7, 1)
    assert (config.method.lr_g, config.method.epochs) == (1e-4, 4)
    # The command line wins wherever --config stands.
    assert parse_config("synthesize", ["--images", "7", "--config", recipe]).images == 7


def test_a_later_file_wins(tmp_path):
    first = write(tmp_path / "1.yaml", "teacher: r34\nimages: 1\nseed: 5\n")
    second = write(tmp_path / "2.yaml", "images: 2\n")
    config = parse_config("synthesize", ["--config", first, "--config", second])
    assert (config.images, config.seed) == (2, 5)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("teacher: r34\nimagse: 3\n", ["imagse", "did you mean images?"]),
        ("teacher: r34\nmethod: {name: cudfkd, lr_gg: 3}\n", ["method.lr_gg", "did you mean method.lr_g?"]),
        ("teacher: r34\nmethod: cudfdk\n", ["cudfdk", "cudfkd"]),
        ("teacher: r34\nmethod: 3\n", ["method must be a name"]),
        ("teacher: r34\nimages: [1, 2]\n", ["images", "a whole number"]),
        ("teacher: r34\nimages: yes\n", ["images", "'yes'"]),
        ("command: distill\nbank: b\nstudent: r18\n", ["distill", "synthesize"]),
        ("arch: resnet20\nnum_classes: 10\n", ["is a model card", "--teacher"]),
        ("- teacher\n", ["name: value"]),
        ("3: r34\n", ["every key must be a name"]),
    ],
)
def test_wrong_files(tmp_path, text, parts):
    path = write(tmp_path / "r.yaml", text)
    refused("synthesize", ["--config", path], *parts)


def test_options_of_another_method_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(parse.tables.METHODS, "other", "synthkit.synthesis.generator.cudfkd:CuDFKD")
    path = write(tmp_path / "r.yaml", "teacher: r34\nmethod: {name: cudfkd, lr_g: 1e-4}\n")
    refused("synthesize", ["--config", path, "--method", "other"], "cudfkd", "other")
    path = write(tmp_path / "bare.yaml", "teacher: r34\nmethod: cudfkd\n")
    assert parse_config("synthesize", ["--config", path, "--method", "other"]).method_name == "other"


def test_printed_config_loads_again(tmp_path):
    words = [*TEACHER, "--method.lr_g", "1e-5", "--images", "77", "--threads", "1", "--method.betas_g", "0.5", "0.9"]
    text = parse_command_line("synthesize", [*words, "--print_config"]).text
    assert text is not None
    path = write(tmp_path / "effective.yaml", text)
    assert parse_config("synthesize", ["--config", path]) == parse_config("synthesize", words)


@pytest.mark.parametrize(
    ("command", "values"),
    [
        ("synthesize", {"teacher": "r34", "method": {"name": "cudfkd", "lr_g": 1e-5}}),
        ("distill", {"bank": "b", "student": "r18", "loss": "l1", "lr": 0.1}),
        ("teach", {"arch": "r18", "data": "cifar10:x", "nesterov": False}),
        ("evaluate", {"model": "m", "data": "cifar10:x", "limit": 10}),
    ],
)
def test_dict_round_trip(command, values):
    config = parse_config(command, values)
    plain = config_to_dict(config)
    json.dumps(plain)
    assert parse_config(command, plain) == config
    assert dump_config(command, config).startswith(f"command: {command}\n")


def test_mapping_takes_dotted_names_recipes_and_the_same_errors(tmp_path):
    path = write(tmp_path / "r.yaml", "teacher: r34\nimages: 5\n")
    config = parse_config("synthesize", {"config": path, "method": "cudfkd", "method.lr_g": 0.25, "images": 6})
    assert (config.teacher, config.images, config.method.lr_g) == ("r34", 6, 0.25)
    refused("synthesize", {"teacher": "r34", "imags": 3}, "imags", "images")
    refused("synthesize", {"teacher": "r34", "images": True}, "images", "a whole number")
    with pytest.raises(ConfigError, match="takes no config"):
        parse_config("bank", {})
    with pytest.raises(UsageError, match="only print"):
        parse_config("synthesize", ["--help"])


def test_load_recipe(tmp_path):
    path = tmp_path / "d.yaml"
    write(path, "command: distill\nbank: b\nstudent: r18\nepochs: 3\n")
    config = load_recipe(path, {"epochs": 4})
    assert isinstance(config, schema.DistillConfig) and config.epochs == 4
    with pytest.raises(ConfigError, match="no such command"):
        load_recipe(write(tmp_path / "x.yaml", "command: distil\n"))


def test_hash_depends_on_what_is_made_only():
    config = parse_config("synthesize", TEACHER)
    same = dataclasses.replace(
        config, out="x", resume=True, runtime=schema.RuntimeConfig(device="cpu"), eval_data="d:x"
    )
    other = dataclasses.replace(config, method=CuDFKD.Config(lr_g=2e-3))
    assert config_hash(config) == config_hash(same) != config_hash(other)
    assert len(config_hash(config)) == 12


def test_help_shows_every_option_with_its_docstring():
    text = parse_command_line("synthesize", ["--method", "cudfkd", "--help"]).text
    assert text is not None
    for name in [*config_to_dict(CuDFKD.Config())]:
        assert f"--method.{name} " in text
    flat = " ".join(text.split())
    assert "Generator learning rate (one persistent Adam)." in flat  # inherited field, inherited docstring
    assert "Growth of the age per student step" in flat
    assert "--method NAME" in flat and "--threads N" in flat
