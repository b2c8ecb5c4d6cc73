"""Class names as folders, cells and unique labels."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthkit.bank.export.names import csv_text, folder_names, printable, unicode_text, unique_names

TEXT = st.text(st.characters(), max_size=40)
NAMES = st.lists(TEXT, min_size=1, max_size=20)


@settings(max_examples=300, deadline=None)
@given(NAMES)
def test_folders_are_safe_everywhere_and_sort_like_the_classes(names):
    folders = folder_names(names)
    assert folders == sorted(folders) and len({f.casefold() for f in folders}) == len(names)
    for folder in folders:
        assert not set(folder) & set("/\\:*?\"<>|\0 '`$;&!") and folder.isprintable()
        assert len(folder.encode()) <= 140 and not folder.endswith((".", " ")) and folder[0].isdigit()
        assert unicodedata.is_normalized("NFC", folder)


@pytest.mark.parametrize("count, first", [(1, "000"), (1000, "000"), (1001, "0000")])
def test_numbers_are_wide_enough_to_sort(count, first):
    folders = folder_names(["x"] * count)
    assert folders[0] == f"{first}_x" and folders == sorted(folders)


def test_letters_of_all_scripts_stay():
    assert folder_names(["Straße", "猫", "кот", "e\u0301"]) == ["000_Straße", "001_猫", "002_кот", "003_é"]


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_no_cell_is_a_formula(text):
    cell = csv_text(text)
    assert cell[:1] not in tuple("=+-@\t\r\n") + ("\uff1d", "\uff0b", "\uff0d", "\uff20")
    assert cell in (printable(text), "'" + printable(text)) and "\n" not in cell and "\r" not in cell


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "\u200b=1", "＝1"])
def test_formulas_are_disarmed(text):
    assert csv_text(text).startswith("'")


@settings(max_examples=300, deadline=None)
@given(NAMES)
def test_unique_names_differ_and_change_as_little_as_possible(names):
    found = unique_names(names)
    assert len(set(found)) == len(names) == len(found) and all(found)
    for number, (old, new) in enumerate(zip(names, found, strict=True)):
        if old and names.index(old) == number:
            assert new == old


def test_unique_names_by_example():
    assert unique_names(["a", "a", "", "a (1)", "2"]) == ["a", "a (1)'", "2 (2)", "a (1)", "2"]


def test_half_a_surrogate_becomes_the_replacement_character():
    assert unicode_text("a\ud800b") == "a\ufffdb" and unicode_text("猫\U0001f600") == "猫\U0001f600"
