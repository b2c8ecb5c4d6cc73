from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from synthkit.bank import Bank
from synthkit.bank.make import bank_from_arrays
from synthkit.errors import UsageError
from synthkit.report.grid import _cell, _short_number, grid_html, grid_image, grid_png, order_key, pick

from .banks import make_bank


def grey_bank(path, with_difficulty=True, classes=3, per_class=20, **options) -> Bank:
    """Class c, image k is a flat grey of 10 c + k; the difficulty falls with k."""
    values = np.array([[10 * c + k for k in range(per_class)] for c in range(classes)], dtype=np.uint8).reshape(-1)
    images = np.broadcast_to(values[:, None, None, None], (len(values), 1, 8, 8))
    labels = np.repeat(np.arange(classes), per_class)
    columns = {"difficulty": 100.0 - (values - 10.0 * labels)} if with_difficulty else None
    return bank_from_arrays(
        path, images, labels, num_classes=classes, mean=[0.5], std=[0.2], columns=columns, **options
    )


def test_pick_takes_the_middle_of_equal_parts():
    labels = np.array([0] * 8 + [1] * 3)
    key = np.array([8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0], float)
    assert pick(labels, key, 0, 4).tolist() == [6, 4, 2, 0]  # of ranks 0..7: ranks 1, 3, 5, 7
    assert pick(labels, key, 0, 100).tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert pick(labels, key, 1, 4).tolist() == [8, 9, 10] and pick(labels, key, 2, 4).tolist() == []


def test_rows_run_from_easy_to_hard(tmp_path):
    """Difficulty falls with the grey value, so every row must become darker from left to right."""
    image = np.asarray(grid_image(grey_bank(tmp_path / "b"), per_class=5))
    dark = [row for row in image[:, :, 0] if (row < 31).sum() >= 5 * 60]
    assert len(dark) > 100
    for line in (dark[5], dark[-5]):
        shades = [v for v, before in zip(line[1:], line[:-1], strict=True) if v != before and v < 60]
        assert shades == sorted(shades, reverse=True) and len(set(shades)) == 5
    assert {17, 13, 9, 5, 1} <= set(np.unique(dark[5]))  # ranks 2, 6, 10, 14, 18 of the greys 19, 18, ..., 0


def test_order_without_difficulty(tmp_path):
    bank = grey_bank(tmp_path / "b", with_difficulty=False)
    key, name = order_key(bank)
    assert name == "stored order" and key.tolist() == list(range(60))
    make_bank(tmp_path / "c")
    assert order_key(Bank(tmp_path / "c"))[1] == "difficulty"
    assert grid_png(bank)[:4] == b"\x89PNG"


def test_cells_keep_the_aspect_and_small_images_whole_pixels():
    assert _cell((3, 32, 32)) == (64, 64) and _cell((1, 28, 28)) == (56, 56) and _cell((1, 8, 4)) == (32, 64)
    assert _cell((3, 224, 224)) == (96, 96) and _cell((3, 224, 112)) == (48, 96) and _cell((3, 64, 64)) == (64, 64)


def test_many_classes_and_odd_banks(tmp_path):
    many = grey_bank(tmp_path / "many", classes=24, per_class=3)
    few = grid_image(many, per_class=4, max_classes=5)
    assert few.height < grid_image(many, per_class=4).height
    unlabelled = bank_from_arrays(
        tmp_path / "u", np.zeros((9, 3, 16, 16), np.uint8), num_classes=4, mean=[0.5] * 3, std=[0.2] * 3
    )
    assert grid_image(unlabelled, 4).height < 250
    odd = bank_from_arrays(
        tmp_path / "o",
        np.zeros((5, 5, 300, 20), np.uint8),
        np.zeros(5, int),
        num_classes=2,
        mean=[0.5] * 5,
        std=[0.2] * 5,
    )
    assert grid_image(odd, 4).size[0] > 100


def test_bad_requests(tmp_path):
    bank = grey_bank(tmp_path / "b")
    for options in ({"per_class": 0}, {"per_class": 101}, {"max_classes": 0}, {"classes": [3]}, {"classes": []}):
        with pytest.raises(UsageError):
            grid_png(bank, **options)


def test_html_is_escaped(tmp_path):
    bank = grey_bank(tmp_path / "<img src=x onerror=alert(1)>", class_names=["<b>", "\x1b", "c" * 400])
    text = bank._repr_html_()
    assert "<img src=x" not in text and "&lt;img src=x" in text and "data:image/png;base64," in text
    assert grid_html(bank, 2).count("<img") == 1


def test_png_is_a_picture(tmp_path):
    data = grid_png(grey_bank(tmp_path / "b"), title="a title")
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"


@pytest.mark.parametrize("value, text", [
    (0.0, "0"), (0.1234, "0.123"), (12.345, "12.3"), (15_000, "15k"), (2.5e6, "2.5M"), (1e-5, "1e-5"),
])  # fmt: skip
def test_short_number(value, text):
    assert _short_number(value) == text


def test_large_banks_are_looked_at_in_part(tmp_path, monkeypatch):
    """Only blocks of the label column are read, unless a class hides between them; the counts stay exact."""
    from synthkit.report import grid

    monkeypatch.setattr(grid, "LOOKED_AT", 64)
    monkeypatch.setattr(grid, "BLOCKS", 8)
    labels = np.zeros(4000, np.int64)
    labels[1::2] = 1
    images = np.full((4000, 1, 8, 8), 50, np.uint8)
    plain = bank_from_arrays(tmp_path / "a", images, labels, num_classes=2, mean=[0.5], std=[0.2])
    asked: list[int] = []
    real = Bank.batch
    monkeypatch.setattr(Bank, "batch", lambda self, i, columns=None: asked.append(len(i)) or real(self, i, columns))
    monkeypatch.setattr(Bank, "column", lambda self, name: pytest.fail(f"the whole column {name} was read"))
    assert grid.class_counts(plain).tolist() == [2000, 2000]
    grid_image(plain, per_class=5)
    assert max(asked) == 64
    monkeypatch.undo()
    monkeypatch.setattr(grid, "LOOKED_AT", 64)
    labels[100:103] = 2
    images[100:103] = 200
    rare = bank_from_arrays(tmp_path / "b", images, labels, num_classes=3, mean=[0.5], std=[0.2])
    assert (np.asarray(grid_image(rare, per_class=5)) == 200).all(axis=2).sum() == 3 * 64 * 64


def test_show_returns_a_picture(tmp_path):
    bank = grey_bank(tmp_path / "b")
    picture = bank.show(4, classes=[2, 0], title="mine")
    assert isinstance(picture, Image.Image) and picture.size[1] < bank.show(4).size[1]


@pytest.mark.parametrize("images, shards", [(1, 1), (30, 3)])
def test_notebooks_show_banks_of_any_state(tmp_path, images, shards):
    from synthkit.bank import BankSpec, BankWriter

    spec = BankSpec(shape=(3, 8, 8), num_classes=2, mean=[0.5] * 3, std=[0.2] * 3, images=images,
                    images_per_shard=-(-images // shards))  # fmt: skip
    writer = BankWriter.create(tmp_path / "b", spec)
    assert "<pre>" in Bank(tmp_path / "b")._repr_html_()
    count = spec.shard_size(shards - 1)
    writer.write_shard(
        shards - 1, {"images": np.zeros((count, 3, 8, 8), np.uint8), "labels": np.zeros(count, np.int32)}
    )
    assert "data:image/png;base64," in Bank(tmp_path / "b")._repr_html_()


def test_in_ipython(tmp_path):
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(grey_bank(tmp_path / "b"))
    assert data["text/html"].startswith("<figure") and data["text/plain"].startswith("Bank(")
