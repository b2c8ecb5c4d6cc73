"""Recipes and model cards from strangers: bombs, code, and values that a reader forgets."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from synthkit.cli.main import main
from synthkit.config import safe_yaml
from synthkit.errors import ConfigError, SynthkitError
from synthkit.models.card import ModelCard

from .forge import SECRET, memory_bounded, nothing_written

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
ATTACKS: dict[str, tuple[str, str]] = {
    "billion laughs": (LAUGHS, "aliases"),
    "one alias": ("a: &x 1\nb: *x\n", "aliases"),
    "alias loop": ("a: &x [*x]\n", "aliases"),
    "merge of an alias": ("a: &x {b: 1}\nc:\n  <<: *x\n", "aliases"),
    "deep flow": ("a: " + "[" * 5000 + "]" * 5000, "nested"),
    "deep maps": ("".join(" " * i + "a:\n" for i in range(100)), "nested"),
    "17 levels": ("a: " + "[" * 17 + "]" * 17, "nested"),
    "python call": ("a: !!python/object/apply:os.system ['touch {mark}']", "tags"),
    "python name": ("a: !!python/name:os.system", "tags"),
    "python module": ("!!python/module:os {}", "tags"),
    "python new": ("a: !!python/object/new:os.mkdir ['{mark}']", "tags"),
    "own tag": ("a: !secret x", "tags"),
    "short tag": ("%TAG ! tag:yaml.org,2002:python/\n---\na: !object/apply:os.mkdir ['{mark}']", "tags"),
    "bare tag": ("a: ! x", "tags"),
    "empty int": ("a: !!int ''", "tags"),
    "no bool": ("a: !!bool x", "tags"),
    "no date": ("a: !!timestamp x", "tags"),
    "set": ("a: !!set {b, c}", "tags"),
    "binary": ("a: !!binary aGk=", "tags"),
    "duplicate key": ("a: 1\nb: 2\na: 3\n", "twice"),
    "list for a key": ("? [a, b]\n: 1\n", "key|hash"),
    "map for a key": ("? {a: b}\n: 1\n", "key|hash"),
    "number for a key": ("1: 2\n", "name"),
    "null key": ("~: 2\n", "name"),
    "a list": ("- a\n- b\n", "name: value"),
    "text": ("only text", "name: value"),
    "two documents": ("a: 1\n---\nb: 2\n", "document"),
    "10,000 digits": ("a: " + "9" * 10_000, "digits|read"),
    "tab": ("a:\n\tb: 1\n", "read"),
    "control character": ("a: \x07", "read"),
    "half surrogate": ('a: "\\ud800"', "read|Unicode|ok"),
    "unclosed": ("a: [1, 2", "read"),
    "large": ("a: " + "x" * 300_000, "larger"),
    "many keys": ("".join(f"k{i}: 0\n" for i in range(40_000)), "larger"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_recipe(tmp_path, name):
    text, said = ATTACKS[name]
    mark = tmp_path / "executed"
    file = tmp_path / "recipe.yaml"
    file.write_text(text.replace("{mark}", str(mark)), encoding="utf-8")
    if "ok" in said:  # either way, it must come out as text that can be written
        with contextlib.suppress(ConfigError):
            repr(safe_yaml.load(file)).encode()
        return
    with nothing_written(tmp_path), memory_bounded():
        with pytest.raises(ConfigError, match=said) as caught:
            safe_yaml.load(file)
        assert len(str(caught.value)) < 1000 and str(file) in str(caught.value)
        for words in (["synthesize", "--config", str(file)], ["recipes", "check", str(file)]):
            assert main(words) == 2
    assert not mark.exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_model_card(tmp_path, name):
    text, _ = ATTACKS[name]
    mark = tmp_path / "executed"
    card = tmp_path / "teacher.yaml"
    card.write_text(text.replace("{mark}", str(mark)), encoding="utf-8")
    with nothing_written(tmp_path):
        with memory_bounded(), pytest.raises(SynthkitError):
            ModelCard.load(card)
        assert main(["synthesize", "--teacher", str(card), "--out", str(tmp_path / "out")]) == 2
    assert not mark.exists()


@pytest.mark.parametrize("text", [
    "", "[]", "{", '{"arch": NaN}',
    '{"arch": ' + "9" * 10_000 + "}", "[" * 100_000, '{"arch": "resnet20", "num_classes": 1e9}',
    '{"arch": ["resnet20"], "num_classes": 10}', '{"arch": "os:system", "num_classes": 10, "input_size": [3,32,32]}',
    '{"arch": "resnet20", "num_classes": true, "input_size": [3,32,32], "mean": [0,0,0], "std": [1,1,1]}',
    '{"arch": "resnet20", "num_classes": 10, "input_size": [3,1e6,1e6], "mean": [0,0,0], "std": [1,1,1]}',
    '{"arch": "resnet20", "num_classes": 10, "input_size": [3,32,32], "mean": [0,0,1e400], "std": [1,1,1]}',
    '{"arch": "resnet20", "num_classes": 99999999999, "input_size": [3,32,32], "mean": [0,0,0], "std": [1,1,1]}',
])  # fmt: skip
def test_json_card(tmp_path, text):
    card = tmp_path / "teacher.json"
    card.write_text(text)
    with nothing_written(tmp_path), memory_bounded(), pytest.raises(SynthkitError):
        ModelCard.load(card)


@pytest.mark.timeout(60)
def test_what_is_no_plain_file(tmp_path):
    """A pipe would wait for ever, /dev/zero would never end."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    with memory_bounded():
        for name in ("pipe", "zero", "folder", "binary", "nothing"):
            with pytest.raises(ConfigError):
                safe_yaml.load(tmp_path / f"{name}.yaml")
            with pytest.raises(SynthkitError):
                ModelCard.load(tmp_path / f"{name}.yaml")


def test_a_card_cannot_name_weights_elsewhere_and_have_them_read_as_text(tmp_path):
    """`weights` may be any path of the user's; what is no weights file is refused without its content being shown."""
    secret = tmp_path / "secret.txt"
    secret.write_bytes(SECRET)
    card = tmp_path / "t.yaml"
    card.write_text("arch: resnet20\nnum_classes: 10\ninput_size: [3, 32, 32]\nmean: [0, 0, 0]\nstd: [1, 1, 1]\n"
                    f"weights: {secret}\n")  # fmt: skip
    from synthkit.models.build import load_model

    with pytest.raises(SynthkitError) as caught:
        load_model(str(card))
    assert "another user" not in str(caught.value)


def test_honest_yaml_is_read(tmp_path):
    value = {"a": 1, "b": [1.5, "x", None, True], "c": {"d": "no", "e": 1e-3, "f": "<<", "g": "2001-01-01", "h": "!x"}}
    assert safe_yaml.loads(safe_yaml.dumps(value)) == value
    assert safe_yaml.loads("a: {<<: {b: 1}}") == {"a": {"<<": {"b": 1}}}  # a name like any other
    (tmp_path / "x.yaml").write_bytes(b"a: 1\r\nb: |\r\n  x\r\n")
    assert safe_yaml.load(tmp_path / "x.yaml") == {"a": 1, "b": "x\n"}
    assert [p for p in Path(__file__).parents[2].glob("recipes/**/*.yaml")], (
        "the shipped recipes are read by their tests"
    )
