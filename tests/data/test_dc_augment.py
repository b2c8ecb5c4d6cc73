"""DC's augmentation, IDC's mixture and CutMix against what the method card says of them."""

from __future__ import annotations

import torch

from synthkit.data import dsa
from synthkit.data.dc_augment import cutmix, dc_augment, idc_augment


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 200, channels: int = 3, side: int = 16) -> torch.Tensor:
    return torch.randn(n, channels, side, side, generator=seeded(9))


def test_crop_is_a_shift_filled_with_the_channel_mean():
    images = pictures()
    mean = images.mean((0, 2, 3))
    found = dc_augment(images, ("crop",), seeded())
    shifts = set()
    for image, out in zip(images, found, strict=True):
        # which shift is it? the one whose overlap agrees everywhere, with the mean in the vacated pixels
        matches = []
        for dy in range(-4, 5):
            for dx in range(-4, 5):
                wanted = mean.view(3, 1, 1).expand_as(image).clone()
                rows = [y for y in range(16) if 0 <= y + dy < 16]
                columns = [x for x in range(16) if 0 <= x + dx < 16]
                wanted[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = image[
                    :, rows[0] + dy : rows[-1] + dy + 1, columns[0] + dx : columns[-1] + dx + 1
                ]
                if torch.allclose(out, wanted, atol=1e-5):
                    matches.append((dy, dx))
        assert len(matches) == 1
        shifts.add(matches[0])
    assert len(shifts) > 60


def test_every_image_gets_one_of_the_operations():
    images = pictures(600, 1)
    found = dc_augment(images, ("crop", "noise"), seeded(1))
    noisy = ((found - images).abs().amax((1, 2, 3)) < 0.01) & ((found - images).abs().amax((1, 2, 3)) > 0)
    assert 230 < int(noisy.sum()) < 370
    spread = float((found - images)[noisy].std())
    assert 0.0009 < spread < 0.0011


def test_scale_takes_the_nearest_pixels_and_leaves_zero_around():
    images = torch.ones(400, 1, 20, 20)
    found = dc_augment(images, ("scale",), seeded(2))
    assert set(found.unique().tolist()) == {0.0, 1.0}
    height = found[:, 0].amax(2).sum(1)
    width = found[:, 0].amax(1).sum(1)
    assert 15.5 <= float(height.min()) <= 17.5 and float(height.max()) == 20 == float(width.max())
    assert not torch.equal(height, width)
    assert 0.35 < float((height == 20).float().mean()) < 0.65  # factors above 1 fill the image


def test_rotation_keeps_the_middle_and_fills_with_the_mean():
    images = torch.full((50, 1, 15, 15), 2.0)
    images[:, :, :, :5] = 0.0
    found = dc_augment(images, ("rotate",), seeded(3))
    mean = float(images.mean())
    turned = (found - images).abs().amax((1, 2, 3)) > 0.5
    assert int(turned.sum()) > 40
    assert float(found.min()) >= -1e-5 and float(found.max()) <= 2 + 1e-5
    corners = found[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert bool(((corners - mean).abs() < 0.3).any(1)[turned].float().mean() > 0.8)


def test_repeatable_and_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    ops = ("crop", "scale", "rotate")
    assert torch.equal(dc_augment(pictures(), ops, seeded(4)), dc_augment(pictures(), ops, seeded(4)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_idc_takes_flip_and_colour_and_one_more(monkeypatch):
    names: list[str] = []
    apply = dsa.apply
    monkeypatch.setattr(
        dsa, "apply", lambda images, record: (names.extend(n for n, _ in record.ops), apply(images, record))[1]
    )
    seen = set()
    for seed in range(40):
        names.clear()
        idc_augment(pictures(4), dsa.STRATEGY, seeded(seed), cutout=seed % 2 == 0)
        assert names[:4] == ["flip", "brightness", "saturation", "contrast"]
        assert names[5:] == (["cutout"] if seed % 2 == 0 else [])
        seen.add(names[4])
    assert seen == {"crop", "scale", "rotate"}


def test_cutmix_pastes_one_box_and_mixes_by_its_area():
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 20, 20).clone()
    targets = torch.eye(8)
    areas = []
    for seed in range(60):
        mixed, soft = cutmix(images, targets, seeded(seed))
        other = mixed != images
        areas.append(float(other.float().mean(dtype=torch.float64)))
        for i in range(8):
            pasted = other[i, 0]
            if not bool(pasted.any()):
                continue
            rows, columns = pasted.any(1).nonzero()[:, 0], pasted.any(0).nonzero()[:, 0]
            box = (int(rows[-1] - rows[0]) + 1) * (int(columns[-1] - columns[0]) + 1)
            assert box == int(pasted.sum())  # a full rectangle
            source = int(mixed[i, 0][pasted][0])
            assert float(soft[i, source]) == box / 400 or abs(float(soft[i, source]) - box / 400) < 1e-6
            assert abs(float(soft[i, i]) - (1 - box / 400)) < 1e-6
        torch.testing.assert_close(soft.sum(1), torch.ones(8))
    assert min(areas) < 0.1 and max(areas) > 0.5
