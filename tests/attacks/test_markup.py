"""Text from a stranger's bank on its way into HTML, SVG, Markdown, YAML, CSV and the terminal."""

from __future__ import annotations

import csv
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from synthkit.bank import Bank
from synthkit.bank.export import export, formats
from synthkit.cli.main import main

from .forge import edit_json, small_bank

PAYLOADS = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)",
    "](javascript:alert(1))",
    "</td></table><iframe src=//evil>", "| a | b |\n|---|---|",
    "\x1b]0;owned\x07\x1b[31mred\x1b[2J", "=cmd|' /C calc'!A0",
    "+1+1", "-2+3", "@SUM(A1)", "\t=1+1", "\u202eexe.gpj", "---\nlicense: mit\ntags: [x]\n---", "${{ secrets.X }}",
    "`rm -rf`", "```\n# heading", "{{ 7*7 }}", "<!-- x -->", "&lt;b&gt;", "\r\nSet-Cookie: x", "<svg/onload=alert(1)>",
    "﻿=1+1", "＝1+1", "a\u2028b", "![x](http://evil/t.png)", "<style>*{display:none}</style>", "!!python/name:os.system",
    "é" * 100, "plain",
]  # fmt: skip
ALLOWED_CONTROLS = "\n"


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> Path:
    """Every text of it is a payload."""
    path = tmp_path_factory.mktemp("markup") / "bank"
    evil = PAYLOADS[0] + PAYLOADS[6] + PAYLOADS[3] + PAYLOADS[13]
    small_bank(
        path, num_classes=len(PAYLOADS), class_names=PAYLOADS, images=60, images_per_shard=30,
        recipe={"method": {"name": "cudfkd", "lr": evil, evil: 1}, evil: evil, "data": {"name": evil}},
        teacher={"arch": evil, "name": evil, "sha256": evil, "licence": evil, "accuracy": {evil: evil}, "spec": evil,
                 "source": evil},
        extra={"citation": evil, evil: [evil]}, parents=[{"uuid": evil, "path": evil, "name": evil}],
    )  # fmt: skip
    assert Bank(path).verify(deep=True).ok
    return path


class Tags(HTMLParser):
    """All tags, attributes and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def assert_clean_html(text: str) -> Tags:
    page = Tags(text)
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "base", "form", "input"}, page.tags
    for name, value in page.attributes:
        assert not name.startswith("on"), (name, value)
        if name in ("href", "src", "xlink:href", "action", "formaction"):
            assert re.match(r"(data:image/(png|svg\+xml|jpeg);|#|https://)", value or ""), (name, value)
    assert "display:none}" not in re.sub(r"&[a-z]+;", "", "".join(re.findall(r"<style[^>]*>(.*?)</style>", text, re.S)))
    assert_no_controls(text)
    return page


def assert_no_controls(text: str) -> None:
    bad = {c for c in text if c not in ALLOWED_CONTROLS and unicodedata.category(c) in ("Cc", "Cf", "Cs")}
    assert not bad, [hex(ord(c)) for c in bad]


def test_report(bank, tmp_path):
    assert main(["report", str(bank), "--out", str(tmp_path / "r.html")]) == 0
    page = assert_clean_html((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert any("<script>alert(1)</script>" in text for text in page.texts), "it is shown, as text"


def test_notebook(bank):
    assert_clean_html(Bank(bank)._repr_html_())
    assert_no_controls(repr(Bank(bank)))


def assert_clean_markdown(text: str) -> None:
    """No HTML, no links, images or fences from outside; the front matter holds what a card's should."""
    head, body = "", text
    if text.startswith("---\n"):
        _, head, body = text.split("---\n", 2)
        facts = yaml.safe_load(head)
        assert isinstance(facts, dict) and facts.get("license") != "mit"
        assert set(facts.get("tags") or []) & {"x"} == set()
    assert_no_controls(text)
    code = re.findall(r"^```[a-z]*\n.*?^```$", body, re.S | re.M)
    assert body.count("```") == 2 * len(code)
    for block in code:
        body = body.replace(block, "")
    assert not re.search(r"<(script|img|iframe|svg|style|td|table|!--)", body, re.I), body
    assert not re.search(r"(?<!\\)\]\(\s*javascript", body, re.I)
    assert not re.search(r"(?<!\\)!\[[^\]]*(?<!\\)\]\(http://evil", body)
    assert not re.search(r"^# heading", body, re.M)


def test_card(bank):
    assert_clean_markdown((bank / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("words", [["info"], ["ls"], ["verify", "--deep"], ["verify", "--untrusted"], ["stats"]])
def test_terminal(bank, words, capsys):
    main(["bank", *words, str(bank)])
    said = capsys.readouterr()
    assert_no_controls(said.out)
    assert_no_controls(said.err)
    assert said.out or said.err


def test_terminal_of_damage(bank, tmp_path, capsys, monkeypatch):
    """Names of files and values of records in messages."""
    import shutil

    other = Path(shutil.copytree(bank, tmp_path / "b\x1b[31m"))
    (other / "strange\x1b[2J\n").write_text("x")
    edit_json(other / "shards" / "00000.json", n="\x1b[31m", sha256="\x1b]0;x\x07")
    (other / "labels" / "\x1b[31m").mkdir(parents=True)
    for words in (["verify"], ["verify", "--untrusted"], ["info"], ["ls"], ["repair"]):
        main(["bank", *words, str(other)])
        said = capsys.readouterr()
        assert_no_controls(said.out)
        assert_no_controls(said.err)
    edit_json(other / "bank.json", label_kind="\x1b[31m", format="\x1b[31m")
    main(["bank", "info", str(other)])
    assert_no_controls(capsys.readouterr().err)


@pytest.mark.parametrize("name", sorted(formats()))
def test_exports(bank, tmp_path, name):
    if name in ("parquet",):
        pytest.importorskip("pyarrow")
    if name == "pt":
        pytest.importorskip("torch")
    out = tmp_path / "out"
    export(str(bank), name, out)
    for place in out.rglob("*"):
        assert place.resolve().is_relative_to(out.resolve()) and not place.is_symlink()
        assert_no_controls(str(place.relative_to(out)))
        assert not re.search(r'[<>:"|?*\\`$&;\'=]', place.name), place.name
    for card in out.rglob("README.md"):
        assert_clean_markdown(card.read_text(encoding="utf-8"))
    for table in out.rglob("*.csv"):
        with open(table, encoding="utf-8", newline="") as stream:
            for row in csv.reader(stream):
                for cell in row:
                    assert_no_controls(cell)
                    number = re.fullmatch(r"[+-]?(\d+\.?\d*([eE][+-]?\d+)?|inf|nan)", cell)
                    assert number or not cell.lstrip()[:1] or cell.lstrip()[0] not in "=+-@＝＋－＠", cell
    for text in [*out.rglob("*.json"), *out.rglob("*.txt")]:
        assert "\x1b" not in text.read_text(encoding="utf-8")
