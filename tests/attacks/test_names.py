"""Class names that become names of folders, files and columns."""

from __future__ import annotations

import contextlib
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from synthkit.bank import Bank
from synthkit.bank.checking.verify import verify
from synthkit.bank.export import export, formats
from synthkit.bank.export.names import folder_names
from synthkit.bank.imports import import_bank
from synthkit.errors import SynthkitError

from .forge import nothing_written, small_bank

NAMES = [
    "../x", "../../../../tmp/synthkit-escaped", "/etc/passwd", "..", ".", "", " ", "a/b", "a\\b", "C:\\x", "C:", "CON",
    "nul", "COM1.txt", "LPT1", "aux.", "x" * 500, "é" * 250, "cafe\u0301", "caf\u00e9", "cat", "CAT", "Cat",
    "a\0b", "a\nb",
    "~", "~root", "$HOME", "`id`", "-rf", "--out", "*", "?", "x.", "x ", ".hidden", "a:b", "file::$DATA",
    "\u202egpj.exe",
    "\u200b", "ﬁ", "fi", "🎉", "ｃｏｎ", "train", "test",
    "val", "unlabelled", "labels.csv", "synthkit.json", "README.md",
]  # fmt: skip


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("names") / "bank"
    small_bank(path, num_classes=len(NAMES), class_names=NAMES, images=150, images_per_shard=75)
    return path


def test_folder_names():
    made = folder_names(NAMES)
    folded = {unicodedata.normalize("NFKC", name).casefold() for name in made}
    assert len(folded) == len(NAMES), "also where case and composition are ignored"
    assert sorted(made) == made, "sorted like the class numbers"
    for name in made:
        assert 0 < len(name.encode()) < 200 and name not in (".", "..") and not set('/\\:*?"<>|\0\n') & set(name)
        assert not name.startswith((".", "-", "~", "$")) and not name.endswith((".", " ")) and name[:3].isdigit()


@pytest.mark.parametrize("name", sorted(formats()))
def test_exports_stay_inside_and_come_back(bank, tmp_path, name):
    if name == "parquet":
        pytest.importorskip("pyarrow")
    if name in ("pt", "imagefolder", "parquet", "webdataset"):
        pytest.importorskip("torch")
    (tmp_path / "inside").mkdir()
    with nothing_written(bank):
        export(str(bank), name, tmp_path / "inside" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["inside"]
    assert [p.name for p in (tmp_path / "inside").iterdir()] == ["out"]
    assert not Path("/tmp/synthkit-escaped").exists()
    back = import_bank(tmp_path / "inside" / "out", tmp_path / "back")
    assert back.class_names == NAMES and np.array_equal(back.column("labels"), Bank(bank).column("labels"))
    assert (
        np.array_equal(back.column("images"), Bank(bank).column("images")) and verify(tmp_path / "back", deep=True).ok
    )


@pytest.mark.parametrize("target", ["bank", "bank/shards", "bank/inside", "bank/../bank/x"])
def test_an_export_into_the_bank_itself(bank, tmp_path, target):
    """Whatever is decided, the bank stays whole."""
    mine = Path(shutil.copytree(bank, tmp_path / "bank"))
    with contextlib.suppress(SynthkitError):
        export(str(mine), "npz", tmp_path / target)
    assert verify(mine, deep=True).ok


def test_names_of_a_foreign_folder(tmp_path):
    """Folder names of an ImageFolder become class names as they are, and are cleaned where they are shown."""
    pytest.importorskip("torch")
    from .test_images import encoded

    for name in ("a\x1b[31m", "=1+1", "<b>", "x" * 200, "CON", "-rf", "a\nb", "é"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "0.png").write_bytes(encoded("PNG"))
    made = import_bank(tmp_path / "in", tmp_path / "out")
    assert len(made) == 8 and verify(tmp_path / "out", deep=True).ok
    assert "\x1b" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["\udcff", "a\udc80b"])
def test_names_that_are_no_unicode(tmp_path, name):
    """A folder whose name is no UTF-8 (any bytes may be one on Linux): imported under another name or refused."""
    pytest.importorskip("torch")
    from .test_images import encoded

    for folder in (name, "ok"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "0.png").write_bytes(encoded("PNG"))
    try:
        made = import_bank(tmp_path / "in", tmp_path / "out")
    except SynthkitError:
        assert not (tmp_path / "out").exists()
        return
    assert verify(made.path).ok


def test_too_many_and_too_long_names(tmp_path):
    for names in (["a" * 501, "b"], ["a"], [1, 2], ["a", None]):
        with pytest.raises(SynthkitError):
            small_bank(tmp_path / "b", num_classes=2, class_names=names)
    assert not (tmp_path / "b").exists()
