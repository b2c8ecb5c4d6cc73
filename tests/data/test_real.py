"""RealData and the resize rule, against hand calculation and a naive loop."""

from __future__ import annotations

import math

import pytest
import torch

from synthkit.data.real import RealData, resize_images
from synthkit.errors import DataError


def some(n: int = 10, classes: int = 3, shape: tuple[int, int, int] = (3, 4, 4)) -> RealData:
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, *shape).contiguous()
    names = [chr(97 + i) for i in range(classes)]
    return RealData(images=images, labels=torch.arange(n) % classes, class_names=names, name="some", root="-")


def test_halving_is_an_antialiased_triangle():
    row = torch.tensor([0, 0, 0, 80, 0, 0, 0, 0], dtype=torch.uint8)
    image = row.view(1, 1, 1, 8).expand(1, 1, 8, 8)
    # scale 2: a triangle of half-width 2 pixels, taps at distance 0.5 and 1.5, weights 3/8 and 1/8
    half = resize_images(image, (1, 4, 4))[0, 0, 1]
    assert half.tolist() == [0, 30, 10, 0]


def test_enlarging_matches_a_naive_bilinear_loop():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 1, 7, 7), generator=generator, dtype=torch.uint8)
    found = resize_images(image, (1, 8, 8))[0, 0]
    source = image[0, 0].double()
    for y in range(8):
        for x in range(8):
            fy, fx = (min(max((v + 0.5) * 7 / 8 - 0.5, 0), 6) for v in (y, x))
            y0, x0 = math.floor(fy), math.floor(fx)
            y1, x1 = min(y0 + 1, 6), min(x0 + 1, 6)
            top = source[y0, x0] * (1 - fx + x0) + source[y0, x1] * (fx - x0)
            low = source[y1, x0] * (1 - fx + x0) + source[y1, x1] * (fx - x0)
            assert abs(float(top * (1 - fy + y0) + low * (fy - y0)) - int(found[y, x])) <= 0.501


def test_aspect_ratio_stays_and_the_centre_is_kept():
    image = torch.zeros(1, 1, 4, 8, dtype=torch.uint8)
    image[..., 2:6] = 200  # the middle half
    assert resize_images(image, (1, 4, 4)).unique().tolist() == [200]
    tall = resize_images(image.transpose(2, 3), (1, 4, 4))
    assert tall.unique().tolist() == [200]


def test_channels():
    grey = torch.full((2, 1, 3, 3), 9, dtype=torch.uint8)
    assert resize_images(grey, (3, 3, 3)).tolist() == grey.expand(2, 3, 3, 3).tolist()
    colour = torch.tensor([10, 100, 250], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    luma = round(0.299 * 10 + 0.587 * 100 + 0.114 * 250)
    assert resize_images(colour, (1, 2, 2)).unique().tolist() == [luma]
    with pytest.raises(DataError, match="cannot turn 4 channels into 3"):
        resize_images(torch.zeros(1, 4, 2, 2, dtype=torch.uint8), (3, 2, 2))
    with pytest.raises(DataError, match="must be positive"):
        resize_images(grey, (1, 0, 3))


def test_chunks_do_not_change_the_result(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (33, 3, 9, 7), generator=generator, dtype=torch.uint8)
    whole = resize_images(images, (1, 5, 6))
    monkeypatch.setattr("synthkit.data.real._CHUNK_BYTES", 2000)
    assert torch.equal(resize_images(images, (1, 5, 6)), whole)
    assert resize_images(images[:0], (1, 5, 6)).shape == (0, 1, 5, 6)


def test_resized_keeps_what_it_was():
    data = some().resized((1, 2, 2))
    assert data.shape == (1, 2, 2) and data.stored_shape == (3, 4, 4) and data.labels.tolist() == some().labels.tolist()
    assert data.resized((1, 2, 2)) is data


def test_subset():
    data = some(50)
    once, again, other = data.subset(7, 1), data.subset(7, 1), data.subset(7, 2)
    assert torch.equal(once.images, again.images) and not torch.equal(once.images, other.images)
    assert len(set(once.images[:, 0, 0, 0].tolist())) == 7
    assert (once.images[:, 0, 0, 0] % 3).tolist() == once.labels.tolist()
    assert data.subset(99) is data
    with pytest.raises(DataError, match="at least 1"):
        data.subset(0)


def test_the_global_generator_is_untouched():
    before = torch.random.get_rng_state()
    some(50).subset(5, 3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_batches_cover_everything_once():
    sizes = [(len(images), labels.tolist()) for images, labels in some(10).batches(4)]
    assert [size for size, _ in sizes] == [4, 4, 2]
    assert sum((labels for _, labels in sizes), []) == some(10).labels.tolist()


def test_relabelled():
    data = some(6).relabelled([2, 0, 1], ["x", "y", "z"])
    assert data.labels.tolist() == [2, 0, 1, 2, 0, 1] and data.class_names == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2).long(), "must be uint8"),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(2).long(), "must be uint8"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(3).long(), "one label per image"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 2]), "labels run from 0 to 2"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([-1, 0]), "unlabelled split"),
    ],
)
def test_refused(images, labels, words):
    with pytest.raises(DataError, match=words):
        RealData(images=images, labels=labels, class_names=["a", "b"], name="x", root="-")
