"""YAML from untrusted files."""

from __future__ import annotations

import math

import pytest

from synthkit.config import safe_yaml
from synthkit.errors import ConfigError


def test_scalars_follow_yaml_1_2():
    text = "a: 1e-3\nb: no\nc: on\nd: 1.5\ne: -3\nf: true\ng: null\nh: ~\n"
    text += "i: 0x10\nj: 2020-01-01\nk: -.inf\nl: 5.\nm: '3'\n"
    assert safe_yaml.loads(text) == {
        "a": 1e-3, "b": "no", "c": "on", "d": 1.5, "e": -3, "f": True, "g": None, "h": None, "i": "0x10",
        "j": "2020-01-01", "k": -math.inf, "l": 5.0, "m": "3",
    }  # fmt: skip


def test_dump_loads_again():
    value = {
        "a": 1e-5,
        "b": 1e22,
        "c": 2.0,
        "d": [0.5, 1],
        "e": {"f": None, "g": True},
        "h": "no",
        "i": "1e-3",
        "j": math.inf,
    }
    assert safe_yaml.loads(safe_yaml.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: !!python/object/apply:os.system ['true']\n", "python/object"),
        ("a: 1\na: 2\n", "stands twice"),
        ("a: [1, 2\n", "line"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper"),
        ("a: " + "[" * 5000, "nested"),
        ("x" * (safe_yaml.MAX_BYTES + 1), "larger than"),
        ("just text", "name: value"),
    ],
)
def test_hostile_or_broken_text_is_refused(text, reason):
    with pytest.raises(ConfigError, match=reason):
        safe_yaml.loads(text)


def test_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        safe_yaml.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        safe_yaml.load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="not a text file"):
        safe_yaml.load(tmp_path / "binary.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * (safe_yaml.MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        safe_yaml.load(tmp_path / "big.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert safe_yaml.load(tmp_path / "empty.yaml") == {}
