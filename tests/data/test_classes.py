"""Class names: spelling, standard order, and a model's order against the data's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from synthkit.data.classes import canonical, check_classes, is_generic, standard_index
from synthkit.data.stats import CLASS_NAMES
from synthkit.errors import DataError

TEN = CLASS_NAMES["cifar10"]


def test_spelling():
    assert canonical("Maple_Tree") == canonical("maple tree") == canonical("maple-tree")
    assert canonical("car") == canonical("Automobile") and canonical("plane") == canonical("airplane")
    assert is_generic(["0", "class_1", "Class 2"]) and not is_generic(["0", "cat"])


def test_standard_index():
    assert standard_index(["bird", "AIRPLANE", "car"], TEN, "x") == [2, 0, 1]
    assert standard_index(["10", "2", "0"], [str(i) for i in range(11)], "x") == [10, 2, 0]
    assert standard_index(["3 - three"], CLASS_NAMES["mnist"], "x") == [3]
    with pytest.raises(DataError, match="did you mean 'ship'"):
        standard_index(["shp"], TEN, "x")


def test_equal_names_are_silent():
    found = check_classes(TEN, TEN, 10)
    assert found.identity and found.warning is None
    assert check_classes([n.upper() for n in TEN], TEN, 10).warning is None
    assert check_classes(CLASS_NAMES["mnist"], CLASS_NAMES["mnist"], 10).warning is None


def test_another_order_is_mapped_and_said():
    swapped = ["automobile", "airplane", *TEN[2:]]
    found = check_classes(TEN, swapped, 10)
    assert found.mapping == [1, 0, *range(2, 10)] and not found.identity
    assert "mapped by name" in (found.warning or "") and "automobile 0->1" in (found.warning or "")


def test_fewer_classes_than_the_model():
    found = check_classes(TEN, ["dog", "cat"], 10)
    assert found.mapping == [5, 3] and "2 of the model's 10" in (found.warning or "")


@pytest.mark.parametrize(
    ("card", "data", "who"),
    [(None, TEN, "model card"), (["0", "1"], ["a", "b"], "model card"), (TEN, list("0123456789"), "data")],
)
def test_nothing_to_check(card, data, who):
    found = check_classes(card, data, len(data))
    assert found.identity and "cannot be checked" in (found.warning or "") and who in (found.warning or "")


def test_other_spellings_in_place_are_a_warning():
    found = check_classes(["n01", "dog"], ["goldfish", "dog"], 2)
    assert found.identity and "goldfish" in (found.warning or "")


@pytest.mark.parametrize(
    ("card", "data", "classes", "words"),
    [
        (TEN, ["a", "b"], 10, "10 classes, the data have 2"),
        (None, ["a", "b"], 10, "10 classes, the data have 2"),
        (["a", "b"], ["a", "b", "c"], 2, "2 classes, the data have 3"),
        (["a", "b", "c"], ["b", "a", "x"], 3, "unknown to the model .x. and others stand elsewhere"),
        (["a"], ["a", "b"], 2, "1 class names for 2 outputs"),
    ],
)
def test_contradictions(card, data, classes, words):
    with pytest.raises(DataError, match=words):
        check_classes(card, data, classes)


def test_no_torch_for_names_and_policies():
    code = (
        "import sys, synthkit.data.classes, synthkit.data.stats, synthkit.data.policies, synthkit.data.splits\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
