"""Charts: places of points by hand, ticks, thinning, what is left out."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from synthkit.report.bank_part import binned
from synthkit.report.markup import Markup, clean, el, flat
from synthkit.report.numbers import Figure, number, short
from synthkit.report.svg import (
    BOTTOM,
    HEIGHT,
    RIGHT,
    TOP,
    WIDTH,
    Axes,
    Level,
    Line,
    bars,
    heat_map,
    line_chart,
    thin,
    ticks,
)


def test_axes_put_corners_where_they_belong():
    axes = Axes(10, 30, 0.0, 4.0, left=40)
    assert (axes.px(10), axes.px(30), axes.px(20)) == (40, WIDTH - RIGHT, (40 + WIDTH - RIGHT) / 2)
    assert (axes.py(4.0), axes.py(0.0)) == (TOP, HEIGHT - BOTTOM)
    log = Axes(0, 1, 0.01, 100.0, log=True)
    assert log.py(1.0) == pytest.approx((TOP + HEIGHT - BOTTOM) / 2)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0, 1.02, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3, 3, [-3, -2, -1, 0, 1, 2, 3]),
     (0.31, 0.34, [0.31, 0.315, 0.32, 0.325, 0.33, 0.335, 0.34]), (5, 5, [5])],
)  # fmt: skip
def test_ticks_are_round_numbers_inside_the_range(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0 + 3e-16), (-1e30, 1e30), (0.0, 1e-30), (1e15, 1e15 + 0.25)])
def test_ticks_survive_extreme_ranges(low, high):
    assert 0 <= len(ticks(low, high)) < 20


def path_of(figure: Markup) -> list[tuple[float, float]]:
    path = next(e for e in ET.fromstring(figure).iter("path") if "line" in str(e.get("class")))
    return [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", str(path.get("d")))]


def test_line_runs_from_the_left_edge_to_the_right_and_larger_is_higher():
    figure = line_chart("t", [Line("a", [0, 5, 10], [0.0, 1.0, 4.0])], x_label="step")
    assert figure is not None
    (x0, y0), (x1, y1), (x2, y2) = path_of(figure)
    assert x0 < x1 < x2 == WIDTH - RIGHT
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert (y0 - y1) * 3 == pytest.approx(y1 - y2, abs=0.4)  # 0 -> 1 -> 4
    assert y0 == HEIGHT - BOTTOM  # the axis begins at 0


def test_log_axis_only_for_wide_positive_values():
    def note(values):
        figure = line_chart("t", [Line("a", [0, 1, 2], values)], x_label="step", wide=True)
        assert figure is not None
        return "Logarithmic axis" in figure, path_of(figure)

    said, places = note([0.1, 1.0, 10.0])
    assert said and places[0][1] - places[1][1] == pytest.approx(places[1][1] - places[2][1], abs=0.2)
    assert not note([1.0, 5.0, 10.0])[0]
    assert not note([0.0, 5.0, 1000.0])[0]


def test_a_single_value_makes_no_chart():
    assert line_chart("t", [Line("a", [1], [2.0]), Line("b", [], [])], x_label="step") is None
    assert line_chart("t", [], x_label="step") is None


def test_legend_names_the_last_value_and_levels():
    figure = line_chart(
        "t", [Line("seed 0", [0, 1], [0.25, 0.5])], x_label="step", percent=True, levels=[Level("teacher", 0.75)]
    )
    assert figure is not None
    text = " ".join(ET.fromstring(figure).itertext())
    assert "seed 0 50 %" in text.replace("seed 050", "seed 0 50") and "75 %" in text


def test_equal_values_and_equal_places_are_drawn():
    assert line_chart("t", [Line("a", [3, 3], [0.0, 0.0])], x_label="step") is not None
    assert line_chart("t", [Line("a", [1, 2], [-7.0, -7.0])], x_label="step") is not None


def test_thin_keeps_short_lines_and_averages_long_ones():
    line = Line("a", list(range(1000)), [float(i % 2) for i in range(1000)])
    found = thin(line)
    assert len(found.x) == 240 and found.x == sorted(found.x)
    assert np.mean(found.y) == pytest.approx(0.5, abs=0.01)
    short_line = Line("a", [1, 2], [3.0, 4.0])
    assert thin(short_line) is short_line


def test_heat_map_shades_by_distance_from_an_even_share():
    figure = heat_map("t", ["a", "b"], np.array([[5, 5], [8, 2]]), x_label="shard")
    assert figure is not None
    cells = list(ET.fromstring(figure).iter("rect"))
    assert len(cells) == 4
    titles = {" ".join(c.itertext()): (c.get("class"), float(str(c.get("fill-opacity")))) for c in cells}
    even = titles["a, shard 0: 5 images, 1 times an even share"]
    more, less = (
        titles["a, shard 1: 8 images, 1.6 times an even share"],
        titles["b, shard 1: 2 images, 0.4 times an even share"],
    )
    assert even[1] < more[1] < less[1] and (more[0], less[0]) == ("more", "less")
    assert heat_map("t", ["a"], np.array([[5]]), x_label="shard") is None
    assert heat_map("t", ["a", "b"], np.array([[0, 0]]), x_label="shard") is None


def test_bars_have_the_length_of_their_share():
    figure = bars("t", [("a", 0.5), ("b", 1.5), ("c", 0.0)], marks={"a": 0.25}, mark_name="control")
    assert figure is not None
    drawn = [e for e in ET.fromstring(figure).iter("rect")]
    rails = [float(str(e.get("width"))) for e in drawn if e.get("class") == "rail"]
    lengths = [float(str(e.get("width"))) for e in drawn if e.get("class") == "f0"]
    assert lengths == pytest.approx([rails[0] / 2, rails[0], 0], abs=0.1)
    assert sum(e.get("class") == "f1" for e in drawn) == 1
    assert bars("t", []) is None


def test_binned_difficulty_by_hand():
    place = np.array([20, 10, 10, 20, 10], dtype=float)
    values = np.array([7, 1, 2, 9, 3], dtype=float)
    x, quantiles, mean = binned(place, values)
    assert x == [10, 20] and mean == [2, 8]
    assert quantiles[2] == [2, 8]  # medians
    assert quantiles[1] == [1.5, 7.5]  # lower quartiles of (1, 2, 3) and (7, 9)


def test_binned_takes_many_places_together_and_loses_no_image():
    place = np.arange(5000, dtype=float)
    x, quantiles, mean = binned(place, place)
    assert len(x) == len(mean) == 60 and all(len(q) == 60 for q in quantiles)
    assert np.average(
        mean, weights=np.diff([*np.linspace(0, 5000, 60, endpoint=False).astype(int), 5000])
    ) == pytest.approx(2499.5, abs=45)
    assert all(low <= high for low, high in zip(quantiles[0], quantiles[4], strict=True))


def test_binned_with_one_place_that_holds_almost_everything():
    place = np.r_[np.zeros(1000), np.arange(1, 100)]
    x, _, _ = binned(place, place)
    assert x[0] < 1 and 1 < len(x) <= 60 and x == sorted(set(x))


def test_figures():
    both = Figure.over([0.5, 0.7, None, "x"])
    assert both is not None and (both.mean, both.n) == (pytest.approx(0.6), 2)
    assert both.std == pytest.approx(0.1414213562)
    assert both.percent() == "60.00 ± 14.14 %" and Figure(0.25).percent() == "25.00 %"
    assert Figure(2.4301, 0.0572, 3).plain() == "2.430 ± 0.057"
    assert Figure.of({"mean": 0.5, "std": 0.1, "n": 1}) == Figure(0.5)
    assert Figure.of({"std": 1}) is None and Figure.of("0.5") is None and Figure.over([]) is None


@pytest.mark.parametrize("value", [True, "3", None, float("nan"), float("inf"), 10**400, 1e31, [1], {}])
def test_number_refuses(value):
    assert number(value) is None


def test_number_takes():
    assert (number(3), number(-0.5), number(1e-200)) == (3.0, -0.5, 0.0)
    assert [short(v) for v in (0, 0.00025, 1.63e-6, 123456, 0.12345)] == [
        "0",
        "0.00025",
        "1.63e-6",
        "123,456",
        "0.1235",
    ]


def test_elements_escape_everything_but_markup():
    assert el("p", "<b>", Markup("<i/>"), None, ["&", 3]) == "<p>&lt;b&gt;<i/>&amp;3</p>"
    assert el("p", title='"><script>') == '<p title="&quot;&gt;&lt;script&gt;"></p>'
    assert clean("a\u202eb\x00\n c\ud800") == "ab c"
    assert len(clean("x" * 5000)) == 400 and clean("x" * 5000).endswith("…")


def test_flat_rows():
    assert flat({"a": {"b": 1, "c": [1, 2]}, "d": None, "e": True, "f": {}}) == [
        ("a.b", "1"), ("a.c", "[1, 2]"), ("d", "none"), ("e", "true"), ("f", "{}")
    ]  # fmt: skip
