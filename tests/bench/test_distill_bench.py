"""`synthkit bench distill`: its JSON is whole and its ratios are what they say."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest
from PIL import Image

from synthkit.bench.distill import WARM, Clocked, Data, summary
from synthkit.cli.main import main

TINY = [
    "bench", "distill", "--pairs", "lenet", "--images", "64", "--batch", "8", "--steps", "2", "--repeats", "2",
    "--threads", "1",
]  # fmt: skip


def test_rows(capsys, tmp_path):
    out = tmp_path / "distill.json"
    assert main([*TINY, "--precisions", "fp32", "--losses", "kd,at", "--loader-workers", "0,1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    rows = found["rows"]
    assert [(r["precision"], r["loss"], r["student"]) for r in rows] == [
        ("fp32", loss, "lenet5_half_bn") for loss in ("kd", "at")
    ]
    for row in rows:
        assert set(row["all"]) == {"trainer", "bare_channels_last", "bare_contiguous", "loader0", "loader1"}
        assert all(len(values) == 2 and min(values) > 0 for values in row["all"].values())
        assert set(row["ratio"]) == {"of_bare", "over_loader0", "over_loader1"}
    assert found["worst"]["of_bare"] == min(row["ratio"]["of_bare"] for row in rows)
    assert found["hardware"]["threads"] == 1 and found["augment"] == "crop_flip"


def test_ratios_are_medians_of_the_repeats():
    """By hand: the faster layout of each repeat, and the median of the ratios, not the ratio of the medians."""
    rates = {
        "trainer": [90.0, 50.0, 200.0],
        "bare_channels_last": [100.0, 40.0, 150.0],
        "bare_contiguous": [80.0, 60.0, 250.0],
        "loader0": [30.0, 50.0, 50.0],
    }
    found = summary(rates)
    assert found["ratio"]["of_bare"] == round(statistics.median([0.9, 50 / 60, 0.8]), 3)
    assert found["ratio"]["over_loader0"] == 3.0 and found["ratio_range"]["over_loader0"] == [1.0, 4.0]
    assert found["images_per_second"]["trainer"] == 90.0


def test_the_clock_leaves_the_start_out(monkeypatch):
    """Only what lies between the two marked steps counts."""
    now = iter([10.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))

    class Source:
        batch_size, steps_per_epoch = 5, 3

        def batch(self, step):
            return step

    clocked = Clocked(Source(), 8, lambda: None)  # type: ignore[arg-type]  # as much of a source as it needs
    assert [clocked.batch(step) for step in range(WARM + 9)] == list(range(WARM + 9))
    assert clocked.rate == 8 * 5 / 4.0


def test_both_readers_get_the_same_images(tmp_path):
    """The PNG files are the bank's images."""
    from synthkit.bank import Bank

    data = Data(tmp_path / "lenet", "lenet", 20)
    bank = Bank(data.bank)
    files = sorted(data.files.glob("*/*.png"))
    assert len(files) == len(bank) == 20
    pictures = {np.asarray(Image.open(file)).tobytes() for file in files}
    assert pictures == {np.asarray(image).tobytes() for image in bank.column("images")}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pairs", "resnett"], "did you mean 'resnet'"),
        (["--precisions", "fp16"], "fp16"),
        (["--loader-workers", "two"], "whole numbers or none"),
        (["--batch", "100", "--images", "64"], "a batch fit into the images"),
        (["--losses", "kdd"], "kdd"),
    ],
)
def test_wrong_use(capsys, words, said):
    assert main([*TINY, *words]) == 2
    assert said in capsys.readouterr().err
