"""FKD views: records from seeds alone, and one function that makes them, bit for bit the same in any batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

from synthkit.bank.labels.views import (
    ViewDraw,
    ViewPolicy,
    Views,
    apply_views,
    beta_quantile,
    crop_views,
    cutmix_boxes,
    join_views,
    random_crops,
)
from synthkit.errors import ConfigError

SOURCE, SIZE = (20, 28), (16, 16)


def draw_of(images: int = 30, seed: int = 4, size: tuple[int, int] = SIZE, **policy) -> ViewDraw:
    options = {"epochs": 3, "mix": "cutmix", **policy}
    return ViewDraw(ViewPolicy(**options), images=images, source=SOURCE, size=size, seed=seed)


def pixels(count: int = 30) -> torch.Tensor:
    values = np.random.default_rng(8).integers(0, 256, (count, 3, *SOURCE), dtype=np.uint8)
    return torch.from_numpy(values)


def views_of(columns: dict[str, np.ndarray], rows: np.ndarray) -> Views:
    own = {k: v[rows] for k, v in columns.items()}
    partners = own["partner"][own["partner"] != rows]
    return join_views(rows, own, {k: v[partners] for k, v in columns.items()})


def made(columns: dict[str, np.ndarray], rows: np.ndarray, size: tuple[int, int] = SIZE) -> torch.Tensor:
    views, images = views_of(columns, rows), pixels()
    return apply_views(images[views.sample], views, size, images[views.partner_sample])


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix"])
def test_records_are_a_pure_function_of_seed_epoch_and_row(mix):
    every = draw_of(mix=mix).rows(0, 90)
    for start, stop in ((0, 1), (17, 44), (29, 31), (59, 90)):
        part = draw_of(mix=mix).rows(start, stop)  # a fresh object, other rows before it
        assert all(np.array_equal(part[k], every[k][start:stop]) for k in every)
    other = draw_of(mix=mix, seed=5).rows(0, 90)
    assert not np.array_equal(other["crop"], every["crop"]) and not np.array_equal(other["sample"], every["sample"])
    for epoch in range(3):
        rows = slice(30 * epoch, 30 * epoch + 30)
        assert sorted(every["sample"][rows]) == list(range(30))  # each image once per epoch
        assert set(every["partner"][rows]) <= set(range(30 * epoch, 30 * epoch + 30))
    assert not np.array_equal(every["sample"][:30], every["sample"][30:60])
    if mix == "none":
        assert np.array_equal(every["partner"], np.arange(90)) and (every["mix_lambda"] == 1).all()
    else:
        assert (every["partner"] != np.arange(90)).mean() > 0.8


def test_scattered_rows_are_those_of_the_epoch(monkeypatch):
    monkeypatch.setattr("synthkit.bank.labels.views._PIECE", 7)
    every, rows = draw_of().rows(0, 90), np.array([3, 89, 31, 3, 60])
    found = draw_of().own_views(rows)
    assert all(np.array_equal(found[k], every[k][rows]) for k in ("sample", "crop", "flip"))
    assert len(draw_of().own_views(rows[:0])["sample"]) == 0


def test_more_epochs_do_not_change_the_first_ones():
    short, long = draw_of(epochs=1).rows(0, 30), draw_of(epochs=5).rows(0, 30)
    assert all(np.array_equal(short[k], long[k]) for k in short)


def test_crops_are_those_of_random_resized_crop():
    uniform = np.random.default_rng(0).random((300, 22))
    scale, ratio = (0.05, 1.0), (0.5, 3.0)
    found = random_crops(uniform, SOURCE, scale, ratio)
    for row, crop in zip(uniform, found, strict=True):  # torchvision's loop, with these numbers
        expected = None
        for t in range(10):
            area = SOURCE[0] * SOURCE[1] * (scale[0] + (scale[1] - scale[0]) * row[2 * t])
            aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * row[2 * t + 1])
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= SOURCE[1] and 0 < h <= SOURCE[0]:
                expected = (int(row[20] * (SOURCE[0] - h + 1)), int(row[21] * (SOURCE[1] - w + 1)), h, w)
                break
        assert expected is not None
        assert np.allclose(crop * np.array([*SOURCE, *SOURCE]), expected, atol=1e-3)


def test_where_no_crop_fits_the_central_one_is_taken():
    uniform = np.random.default_rng(0).random((5, 22))
    wide = random_crops(uniform, (10, 40), (1.0, 1.0), (0.75, 4 / 3))
    assert np.allclose(wide * np.array([10, 40, 10, 40]), [0, 14, 10, 13], atol=0.6)  # 10 x 4/3 = 13 of 40 columns


def test_the_drawn_shares_have_their_distribution():
    draw = ViewDraw(ViewPolicy(epochs=1, mix="mixup", mix_alpha=0.4, flip=0.3, crop_scale=(0.5, 0.5)),
                    images=4000, source=(64, 64), size=(64, 64), seed=1)  # fmt: skip
    columns = draw.rows(0, 4000)
    assert abs(columns["flip"].mean() - 0.3) < 0.03
    assert abs((columns["crop"][:, 2] * columns["crop"][:, 3]).mean() - 0.5) < 0.01
    share = columns["mix_lambda"].astype(np.float64)
    assert abs(share.mean() - 0.5) < 0.02 and abs(share.var() - 1 / (4 * 1.8)) < 0.01


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 20.0])
def test_beta_quantiles_have_the_moments_of_beta(alpha):
    x = beta_quantile((np.arange(100_000) + 0.5) / 100_000, alpha)
    assert (np.diff(x) >= 0).all() and x[0] >= 0 and x[-1] <= 1
    assert abs(x.mean() - 0.5) < 1e-6 and abs(x.var() - 1 / (4 * (2 * alpha + 1))) < 1e-5


def test_cutmix_boxes_by_hand():
    centres = np.array([[0.5, 0.5], [0.5, 0.5], [0.0, 0.99], [0.0, 0.99], [0.5, 0.5]])
    boxes = cutmix_boxes(np.array([0.0, 0.75, 0.75, 1.0, 0.5]), centres, (16, 20))
    assert boxes.tolist() == [
        [0, 0, 16, 20],  # everything
        [4, 5, 12, 15],  # half the sides, around (8, 10)
        [0, 14, 4, 20],  # around (0, 19), clipped
        [0, 19, 0, 19],  # nothing
        [3, 3, 13, 17],  # sides 11.3 and 14.1: centre +- 5 and +- 7
    ]


def test_a_box_without_area_is_a_view_without_partner():
    columns = draw_of(images=400, epochs=2, mix_alpha=0.05).rows(0, 800)  # lambda is often nearly 1
    box, mixed = columns["mix_box"].astype(int), columns["partner"] != np.arange(800)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    assert (area[mixed] > 0).all() and (~mixed).sum() > 50
    assert (box[~mixed] == 0).all()
    assert (columns["mix_lambda"][~mixed] < 1).any()  # lambda itself is kept as drawn


@pytest.mark.parametrize(
    ("change", "match"),
    [({"epochs": 0}, "view epoch"), ({"crop_scale": (0, 1)}, "crop_scale"), ({"crop_scale": (0.5, 1.2)}, "crop_scale"),
     ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"), ({"flip": 1.5}, "flip"), ({"mix": "cutmux"}, "did you mean 'cutmix'"),
     ({"mix_alpha": 0.0}, "mix_alpha")],
)  # fmt: skip
def test_a_policy_that_cannot_be_drawn_is_refused(change, match):
    with pytest.raises(ConfigError, match=match):
        ViewPolicy(**{"epochs": 1, **change})


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (20, 28), (33, 50), (7, 5), (1, 1)])
def test_crops_are_torchvisions(size):
    columns, images = draw_of(size=size).rows(0, 30), pixels()
    found = crop_views(images, columns["crop"], columns["flip"], size)
    assert found.dtype == torch.float32 and found.shape == (30, 3, *size)
    for i in range(30):
        top, left, height, width = np.rint(columns["crop"][i] * [*SOURCE, *SOURCE]).astype(int)
        expected = TF.resized_crop(images[i].float() / 255, top, left, height, width, list(size), antialias=True)
        expected = expected.flip(-1) if columns["flip"][i] else expected
        assert (expected - found[i]).abs().max() < 1e-6


def test_the_whole_image_is_left_as_it_is():
    images = pixels()
    crop = np.tile(np.array([0, 0, 1, 1], np.float32), (30, 1))
    assert torch.equal(crop_views(images, crop, np.zeros(30, np.uint8), SOURCE), images.float() / 255)
    assert torch.equal(crop_views(images, crop, np.ones(30, np.uint8), SOURCE), images.flip(3).float() / 255)


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix"])
@pytest.mark.parametrize("size", [SIZE, (6, 40)])
def test_a_view_is_the_same_in_any_batch(mix, size):
    """(6, 40) shrinks rows by different amounts: the strongest one decides the number of taps of the batch."""
    columns = draw_of(mix=mix, size=size).rows(0, 90)
    every = made(columns, np.arange(90), size)
    assert every.min() >= 0 and every.max() <= 1
    for rows in (np.arange(1), np.array([89, 3, 3]), np.arange(40, 57), np.arange(89, -1, -1)):
        assert torch.equal(made(columns, rows, size), every[rows])


def test_mixing_by_hand():
    for mix in ("mixup", "cutmix"):
        columns = draw_of(mix=mix).rows(0, 90)
        plain = crop_views(pixels()[columns["sample"]], columns["crop"], columns["flip"], SIZE)
        found = made(columns, np.arange(90))
        for row in range(90):
            expected, other = plain[row].clone(), plain[columns["partner"][row]]
            if columns["partner"][row] == row:
                pass
            elif mix == "mixup":
                share = float(columns["mix_lambda"][row])
                expected = share * expected + (1 - share) * other
            else:
                top, left, bottom, right = columns["mix_box"][row].astype(int)
                expected[:, top:bottom, left:right] = other[:, top:bottom, left:right]
            assert (expected - found[row]).abs().max() < 1e-6


def test_a_large_batch_is_made_in_pieces(monkeypatch):
    columns = draw_of().rows(0, 90)
    whole = made(columns, np.arange(90))
    monkeypatch.setattr("synthkit.bank.labels.views._CHUNK_BYTES", 4 * 3 * 16 * 16 * 7)  # seven views
    assert torch.equal(made(columns, np.arange(90)), whole)


def test_float_pixels_are_taken_as_they_are():
    columns = draw_of(mix="none").rows(0, 30)
    images = pixels()
    whole = crop_views(images, columns["crop"], columns["flip"], SIZE)
    assert (crop_views(images.float() / 255, columns["crop"], columns["flip"], SIZE) - whole).abs().max() < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_view_is_the_same_in_any_batch_on_a_gpu():
    columns = draw_of(mix="mixup").rows(0, 90)
    views, images = views_of(columns, np.arange(90)), pixels().cuda()
    every = apply_views(images[views.sample], views, SIZE, images[views.partner_sample])
    few = views_of(columns, np.array([7, 80]))
    part = apply_views(images[few.sample], few, SIZE, images[few.partner_sample])
    assert torch.equal(part, every[[7, 80]])
    assert (every.cpu() - made(columns, np.arange(90))).abs().max() < 1e-5
