"""The JSON records of a bank and the names in its folders, from an attacker's hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bank.banks import make_spec

from synthkit.bank import Bank, BankWriter
from synthkit.bank.checking.repair import repair
from synthkit.bank.checking.verify import verify
from synthkit.bank.disk.storage import parse_json
from synthkit.bank.errors import BankNotFoundError
from synthkit.bank.spec import MAX_SHARDS, record_of
from synthkit.cli.main import main
from synthkit.errors import BankError, SynthkitError

from .forge import (
    SECRET,
    assert_damaged,
    edit_json,
    memory_bounded,
    nothing_written,
    read_all,
    small_bank,
    unread,
    unseal,
)

HUGE = 10**4000


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    writer = small_bank(tmp_path_factory.mktemp("whole") / "bank")
    writer.save_state(0, {"w": np.arange(6.0)}, {"note": "x"})
    writer.write_generator(0, {"w": np.ones(4, "f4")}, {"arch": "g"})
    return writer.path


@pytest.fixture
def bank(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bank"))


def refused_everywhere(bank: Path, said: str) -> None:
    """bank.json is bad: whatever opens the bank says so, with exit code 3, and changes nothing."""
    with nothing_written(bank), memory_bounded():
        for act in (Bank, verify, repair, BankWriter.open, lambda p: verify(p, untrusted=True)):
            with pytest.raises(BankError, match=said) as caught:
                act(bank)
            assert len(str(caught.value)) < 2000
        for words in (["info"], ["ls"], ["verify"], ["verify", "--untrusted"], ["repair"], ["seal"]):
            assert main(["bank", *words, str(bank)]) == 3, words


# ---- JSON as such ------------------------------------------------------------------------------------------------

DEEP = b'{"a":' * 40_000 + b"1" + b"}" * 40_000
BAD_JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not readable JSON"),
    "list": (b"[]", "must be a JSON object"),
    "number": (b"1", "must be a JSON object"),
    "binary": (bytes(range(256)), "not readable JSON"),
    "latin-1": ('{"a": "\xe9"}'.encode("latin-1"), "not readable JSON"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "not readable JSON"),
    "cut": (b'{"a": [1, 2', "not readable JSON"),
    "after the end": (b'{"a": 1} {"b": 2}', "not readable JSON"),
    "deep objects": (DEEP, "nested|not readable"),
    "deep lists": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested|not readable"),
    "65 levels": (b'{"a":' * 65 + b"1" + b"}" * 65, "nested too deeply"),
    "a million lists": (b'{"a": [' + b"[]," * 1_000_000 + b"[]]}", "too many objects"),
    "a million objects": (b'{"a": [' + b"{}," * 1_000_000 + b"{}]}", "too many objects"),
    "17 MiB": (b'{"a": "' + b"x" * (17 << 20) + b'"}', "too large"),
    "nan": (b'{"a": NaN}', "not allowed"),
    "infinity": (b'{"a": [-Infinity]}', "not allowed"),
    "1e400": (b'{"a": 1e400}', "not finite"),
    "-1e400": (b'{"a": {"b": -1e400}}', "not finite"),
    "10,000 digits": (b'{"a": ' + b"9" * 10_000 + b"}", "10000 digits"),
    "101 digits": (b'{"a": -' + b"9" * 101 + b"}", "digits"),
    "duplicate key": (b'{"a": 1, "a": 2}', "stands twice"),
    "duplicate key inside": (b'{"x": [{"a": 1, "b": 2, "a": 1}]}', "stands twice"),
    "lone surrogate": (b'{"a": "\\ud800"}', "surrogate"),
    "lone surrogate key": (b'{"\\uDFFF": 1}', "surrogate"),
    "encoded surrogate": (b'{"a": "\xed\xa0\x80"}', "not readable JSON"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json(whole, bank, name):
    data, said = BAD_JSON[name]
    (bank / "bank.json").write_bytes(data)
    with nothing_written(bank), memory_bounded(), pytest.raises(BankError, match=said):
        Bank(bank)
    for part in ("manifest.json", "shards/00000.json", "state/00000.json", "generators/00000.json"):
        where = shutil.copytree(whole, bank.parent / part.replace("/", "-"))
        (where / part).write_bytes(data)
        with nothing_written(where), memory_bounded():
            report = verify(where)
        assert any(said_in(said, text) for what in report.problems.values() for text in what), report.problems


def said_in(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


def test_good_json_passes():
    text = '{"a": [1, -2.5e300, true, null, "\\ud83d\\ude00", "é"], "state": ' + str(2**128) + "}"
    assert parse_json(text.encode(), "x")["a"][4] == "😀"


def test_memory_of_the_largest_record():
    """16 MiB of the costliest JSON that is accepted."""
    for unit in (b"0.1,", b'"ab",', b"12345,", b'"\xc3\xa9\xc3\xa9",'):
        data = b'{"a": [' + unit * ((16 << 20) // len(unit) - 4) + b"1]}"
        with memory_bounded(400 << 20):
            parse_json(data, "x")


# ---- bank.json ---------------------------------------------------------------------------------------------------

BAD_BANKS: list[tuple[dict[str, Any], str]] = [
    ({"format": "other"}, "not the record"), ({"format": ...}, "not the record"), ({"format": ["x"]}, "not the record"),
    ({"schema": 99, "min_reader": 99}, "newer"), ({"schema": True}, "schema"), ({"schema": -1}, "schema"),
    ({"schema": "2"}, "schema"), ({"min_reader": None}, "min_reader"), ({"min_reader": 1.0}, "min_reader"),
    ({"shape": [3, 10**9, 10**9]}, "shape"), ({"shape": [3, 6]}, "shape"), ({"shape": [True, 6, 5]}, "shape"),
    ({"shape": [3, -6, 5]}, "shape"), ({"shape": [0, 6, 5]}, "shape"), ({"shape": "365"}, "shape"),
    ({"shape": {"0": 3, "1": 6, "2": 5}}, "shape"), ({"shape": [3.0, 6, 5]}, "shape"),
    ({"num_classes": 10**9}, "num_classes"), ({"num_classes": True}, "num_classes"), ({"num_classes": 0}, "num_class"),
    ({"num_classes": 4.0}, "num_classes"), ({"class_names": ["a"] * 10_000}, "class_names"),
    ({"class_names": ["a" * 501, "b", "c", "d"]}, "500"), ({"class_names": [1, 2, 3, 4]}, "class_names"),
    ({"class_names": "abcd"}, "class_names"), ({"mean": [0.5, 0.5]}, "mean"),
    ({"mean": ["0", "0", "0"]}, "mean"), ({"std": [0, 1, 1]}, "std"), ({"std": [-1, 1, 1]}, "std"),
    ({"std": [True, 1, 1]}, "std"), ({"label_kind": "x"}, "label_kind"), ({"label_kind": ["argmax"]}, "label_kind"),
    ({"label_kind": {}}, "label_kind"), ({"plan": []}, "plan"), ({"plan": {}}, "lacks"), ({"recipe": []}, "recipe"),
    ({"recipe": "x" * 1000}, "recipe"), ({"teacher": None}, "teacher"), ({"parents": {}}, "parents"),
    ({"extra": 1}, "extra"), ({"contains_real": 0}, "contains_real"), ({"real_data_used": "no"}, "real_data_used"),
    ({"uuid": "../../etc"}, "uuid"), ({"uuid": 5}, "uuid"), ({"uuid": "a" * 65}, "uuid"), ({"uuid": "\n"}, "uuid"),
    ({"versions": []}, "versions"), ({"hardware": "x"}, "hardware"), ({"top_k": -1}, "top_k"),
    ({"top_k": 10**6}, "top_k"), ({"top_k": True}, "top_k"), ({"transform": []}, "transform"),
    ({"transform": {"kind": "code"}}, "transform"),
]  # fmt: skip


@pytest.mark.parametrize("changes, said", BAD_BANKS)
def test_bank_record(bank, changes, said):
    edit_json(bank / "bank.json", **changes)
    with nothing_written(bank), memory_bounded():
        for act in (Bank, verify):
            with pytest.raises(BankError, match=said) as caught:
                act(bank)
            assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("plan", [
    {"images": 0}, {"images": -5}, {"images": 10**30}, {"images": True}, {"images": 20.0}, {"images": None},
    {"images_per_shard": 0}, {"images_per_shard": None}, {"images_per_shard": 10**30}, {"shards": 10**9},
    {"shards": 3}, {"shards": True}, {"seed": -1}, {"seed": 2**64}, {"seed": 1.5},
    {"images": 2**40, "images_per_shard": 1},
])  # fmt: skip
def test_plan(bank, plan):
    raw = json.loads((bank / "bank.json").read_text())
    edit_json(bank / "bank.json", plan={**raw["plan"], **plan})
    with nothing_written(bank), memory_bounded(), pytest.raises(BankError):
        Bank(bank)


def test_everything_refuses_a_bad_bank_record(bank):
    edit_json(bank / "bank.json", num_classes=True)
    refused_everywhere(bank, "num_classes")


def test_a_plan_of_very_many_shards_costs_nothing(tmp_path):
    """A bank.json of 2 kB that plans 50 billion images: nothing is allocated for what is not there."""
    raw = record_of(make_spec())
    raw["plan"] = {"images": MAX_SHARDS * 10**6, "images_per_shard": 10**6, "shards": MAX_SHARDS, "seed": 0}
    (tmp_path / "bank.json").write_text(json.dumps(raw))
    with memory_bounded():
        assert len(Bank(tmp_path)) == 0
        report = verify(tmp_path, untrusted=True)
    assert report.ok and report.planned == MAX_SHARDS and not report.committed


# ---- sidecars ----------------------------------------------------------------------------------------------------

BAD_SIDECARS: list[tuple[dict[str, Any], str]] = [
    ({"schema": 99}, "newer"), ({"schema": True}, "schema"), ({"schema": ...}, "schema"), ({"shard": 1}, "shard 0"),
    ({"shard": False}, "shard 0"), ({"shard": 0.0}, "shard 0"), ({"shard": "0"}, "shard 0"), ({"shard": -1}, "shard 0"),
    ({"n": 9}, "n must be"), ({"n": 10.0}, "n must be"), ({"n": True}, "n must be"), ({"n": 10**30}, "n must be"),
    ({"n": -10}, "n must be"), ({"n": None}, "n must be"), ({"bytes": -1}, "bytes"), ({"bytes": 10**30}, "bytes"),
    ({"bytes": True}, "bytes"), ({"bytes": "1"}, "bytes"), ({"bytes": 5}, "outside the file"),
    ({"bytes": 2**61}, "its record says"), ({"sha256": "x"}, "sha256"), ({"sha256": ["a" * 64]}, "sha256"),
    ({"sha256": "A" * 64}, "sha256"), ({"sha256": "a" * 64 + "\n"}, "sha256"), ({"sha256": 64}, "sha256"),
    ({"sha256": "../" * 21 + "a"}, "sha256"), ({"datasets": []}, "datasets"), ({"datasets": ...}, "datasets"),
    ({"datasets": {}}, "images"), ({"datasets": {"images": 5}}, "images"),
    ({"datasets": {"images": {}, "../../etc/passwd": {}}}, "column|stored"),
    ({"label_histogram": [5, 5]}, "label_histogram"), ({"label_histogram": [10, 0, 0, True]}, "label_histogram"),
    ({"label_histogram": [20, -10, 0, 0]}, "label_histogram"), ({"label_histogram": [2.5] * 4}, "label_histogram"),
    ({"label_histogram": {"0": 10}}, "label_histogram"), ({"step_range": [0]}, "step_range"),
    ({"step_range": [0, 10**90]}, "step_range"), ({"step_range": ["a", "b"]}, "step_range"),
    ({"seconds": "fast"}, "seconds"), ({"seconds": 10**90}, "seconds"), ({"seconds": [1]}, "seconds"),
    ({"mean_difficulty": None}, "mean_difficulty"), ({"teacher_agreement": True}, "teacher_agreement"),
    ({"difficulty_range": [1, None]}, "difficulty_range"), ({"argmax_matches": {}}, "argmax_matches"),
]  # fmt: skip


@pytest.mark.parametrize("changes, said", BAD_SIDECARS)
def test_sidecar(bank, changes, said):
    edit_json(bank / "shards" / "00000.json", **changes)
    unseal(bank)
    assert_damaged(bank, "shard 0", "", sandbox=False)
    problem = verify(bank).problems["shard 0"][0]
    assert said_in(said, problem), problem
    with memory_bounded(), pytest.raises(BankError):
        read_all(bank)


def test_sidecar_paths_lead_nowhere(bank):
    """No field of a record is ever used as a path."""
    secret = bank.parent / "secret"
    secret.write_bytes(SECRET)
    edit_json(bank / "shards" / "00000.json", file=str(secret), folder="../..", host="../x", meta={"path": "/etc/x"})
    unseal(bank)
    with unread(secret), nothing_written(bank):
        assert read_all(bank) == 20
        assert verify(bank, deep=True).ok


@pytest.mark.parametrize("name", [
    "00000.JSON", "0.json", "000000.json", "-0001.json", "٠٠٠٠٢.json", "00002.json.bak", "99999.json",
    "9" * 200 + ".json", "00002 .json", "..json", "00002.json\n", "1_000.json",
])  # fmt: skip
def test_odd_names_are_no_shards(bank, name):
    shutil.copyfile(bank / "shards" / "00000.json", bank / "shards" / name)
    report = verify(bank)
    assert report.ok and report.committed == [0, 1] and any("no planned shard" in n for n in report.notes)
    assert all(n.isprintable() for n in report.notes) and read_all(bank) == 20


# ---- the manifest ------------------------------------------------------------------------------------------------

BAD_MANIFESTS: list[dict[str, Any]] = [
    {"schema": 99}, {"schema": True}, {"schema": 1}, {"shards": []}, {"shards": {}}, {"shards": [None, None]},
    {"root": 5}, {"root": "0" * 64}, {"uuid": "x"}, {"uuid": {}}, {"bank_sha256": "0" * 64}, {"bank_sha256": None},
    {"generators": []}, {"generators": None}, {"generators": [{"index": 10**30}]}, {"transform": {}},
    {"seal": "0" * 64}, {"seal": None},
    {"extra": "unsealed"},
]  # fmt: skip


@pytest.mark.parametrize("resigned", [False, True])
@pytest.mark.parametrize("changes", BAD_MANIFESTS)
def test_manifest(bank, changes, resigned):
    """Also when its own hash was made anew, which anyone can do."""
    from synthkit.bank.seal import signed

    raw = {**json.loads((bank / "manifest.json").read_text()), **changes}
    if resigned and "seal" not in changes:
        raw = signed(raw)
    (bank / "manifest.json").write_text(json.dumps(raw))
    with nothing_written(bank), memory_bounded():
        report = verify(bank)
    harmless = (resigned and changes == {"extra": "unsealed"}) or changes == {"schema": 1}
    assert report.ok == harmless or (harmless and report.problems), changes
    with memory_bounded():
        try:
            Bank(bank).info()
        except SynthkitError:
            assert not report.ok


@pytest.mark.parametrize("row", [
    {"shard": True}, {"shard": 0.0}, {"shard": -1}, {"shard": "../0"}, {"shard": 10**30}, {"sha256": 5},
    {"sha256": "x"}, {"sha256": "0" * 64}, {"sidecar_sha256": "0" * 64}, {"sidecar_sha256": None},
    {"sidecar_sha256": ["a"]},
])  # fmt: skip
def test_manifest_row(bank, row):
    from synthkit.bank.seal import signed

    raw = json.loads((bank / "manifest.json").read_text())
    raw["shards"][1].update(row)
    (bank / "manifest.json").write_text(json.dumps(signed(raw)))
    with nothing_written(bank):
        assert not verify(bank).ok


# ---- what is no plain file ---------------------------------------------------------------------------------------


def _fifo(place: Path, secret: Path) -> None:
    os.mkfifo(place)


def _link(place: Path, secret: Path) -> None:
    place.symlink_to(secret)


def _loop(place: Path, secret: Path) -> None:
    place.symlink_to(place.name)


def _device(place: Path, secret: Path) -> None:
    place.symlink_to("/dev/zero")


def _folder(place: Path, secret: Path) -> None:
    place.mkdir()


def _dangling(place: Path, secret: Path) -> None:
    place.symlink_to("nowhere")


PARTS = {
    "shards/00000.h5": "shard 0", "shards/00000.json": "shard 0", "state/00000.json": "state 0",
    "state/00000.safetensors": "state 0", "generators/00000.json": "generators 0", "manifest.json": "manifest",
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [_fifo, _link, _loop, _device, _folder, _dangling])
@pytest.mark.parametrize("name", [*PARTS, "bank.json"])
def test_special_files(bank, kind, name):
    """A pipe would wait for ever, /dev/zero would never end, a link leads to another user's file."""
    secret = bank.parent / "secret"
    shutil.copyfile(bank / name, secret)  # even when the content is right
    (bank / name).unlink()
    kind(bank / name, secret)
    with unread(secret), memory_bounded():
        if name == "bank.json":
            for act in (Bank, verify, BankWriter.open, repair):
                with pytest.raises(BankError):
                    act(bank)
            return
        report = verify(bank, deep=True)
    if name == "manifest.json" and kind in (_loop, _dangling):
        return  # a link to nothing: an unsealed bank, and noted
    assert PARTS[name] in report.problems, report.problems


@pytest.mark.parametrize("folder", ["shards", "state", "generators"])
def test_folders_that_are_links(bank, folder):
    outside = bank.parent / "outside"
    (bank / folder).rename(outside)
    (bank / folder).symlink_to(outside)
    with nothing_written(bank.parent):
        report = verify(bank)
        assert any("links" in text for what in report.problems.values() for text in what), report.problems
        assert any("is a link" in note for note in report.notes)
    boxed = verify(bank, untrusted=True)
    assert boxed.problems == report.problems
    if folder == "shards":
        with pytest.raises(BankError, match="links"):
            Bank(bank)
    before = sorted(p.name for p in outside.iterdir())
    try:
        repair(bank)  # must neither move a file through the link nor write a lock there
    except BankError as error:
        assert folder == "state" and "links" in str(error)
    assert sorted(p.name for p in outside.iterdir()) == before


def test_quarantine_that_is_a_link(bank):
    outside = bank.parent / "outside"
    outside.mkdir()
    (bank / "quarantine").symlink_to(outside)
    (bank / "shards" / "00000.json").write_text("{}")
    with pytest.raises(BankError, match="links"):
        repair(bank)
    assert not list(outside.iterdir())


def test_the_bank_itself_may_be_reached_by_a_link(bank):
    """The user's own path is no part of what a stranger sent."""
    (bank.parent / "alias").symlink_to(bank)
    assert verify(bank.parent / "alias", untrusted=True).ok and read_all(bank.parent / "alias") == 20


def test_unreadable_files(bank):
    """Wrong permissions: typed, and the other parts are still checked."""
    (bank / "shards" / "00000.h5").chmod(0)
    (bank / "state").chmod(0)
    code = (
        "import os, sys, json; os.geteuid() or (os.setgid(65534), os.setuid(65534));"
        "from synthkit.bank.checking.verify import verify; print(json.dumps(verify(sys.argv[1]).to_dict()))"
    )
    for place in [bank, *bank.parents]:
        if place.stat().st_uid == os.geteuid() and place != Path("/"):
            place.chmod(place.stat().st_mode | 0o055)
    (bank / "state").chmod(0)
    done = subprocess.run([sys.executable, "-c", code, str(bank)], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[2])  # fmt: skip
    (bank / "state").chmod(0o755)
    if "ModuleNotFoundError" in done.stderr or "PermissionError" in done.stderr.partition("synthkit/bank")[0]:
        pytest.skip("another user cannot run this Python")
    problems = json.loads(done.stdout)["problems"]
    assert "Permission denied" in problems["shard 0"][0] and "Permission denied" in problems["state"][0]
    assert "shard 1" not in problems


@pytest.mark.parametrize("path", ["", "\0", "a" * 5000, "no/such", "/dev/null", "/dev/null/x", "\ud800", "\x1b[31mred"])
def test_paths_of_the_user(path):
    for act in (Bank, verify, repair, BankWriter.open, lambda p: verify(p, untrusted=True)):
        with pytest.raises(SynthkitError):
            act(path)
    for words in (["info"], ["verify"], ["repair"], ["seal"], ["verify", "--untrusted"]):
        assert main(["bank", *words, path]) in (2, 3)


def test_no_bank_is_told_apart_from_a_bad_one(tmp_path):
    with pytest.raises(BankNotFoundError):
        verify(tmp_path)


# ---- label sets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "..", ".", "", "a/b", "A", "x" * 65, "-x", "a\0", "a\n", "con ", "é", "/etc"])
def test_label_set_names(bank, name):
    with nothing_written(bank), pytest.raises(SynthkitError):
        Bank(bank).labels(name)


@pytest.mark.parametrize("name", ["..x", "A B", "\x1b[31m", "x" * 200])
def test_folders_that_are_no_label_sets(bank, name):
    (bank / "labels" / name).mkdir(parents=True)
    (bank / "labels" / name / "labels.json").write_text("{}")
    report = verify(bank)
    assert report.ok and any("not a label set" in note for note in report.notes)
    assert not Bank(bank).label_sets()
