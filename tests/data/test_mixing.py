"""Crops, patches and mixes of a batch against released values and loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import resized_crop

from synthkit.bank.labels.views import RATIO, cutmix_boxes, random_crops
from synthkit.data import mixing
from synthkit.data.augment import augment
from synthkit.data.policies import POLICIES, mixes, mixing_note

REFERENCE = Path(__file__).parents[1] / "reference"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 8, shape: tuple[int, int, int] = (3, 16, 16)) -> torch.Tensor:
    return torch.rand((n, *shape), generator=seeded(9))


def test_cutmix_and_mixup_are_sre2ls():
    golden = np.load(REFERENCE / "cutmix_bbox.npz")
    images, partner = torch.from_numpy(golden["images"]), torch.from_numpy(golden["perm"])
    centre = (np.stack([golden["cx"], golden["cy"]], axis=1) + 0.5) / 32
    boxes = cutmix_boxes(golden["lam"], centre, (32, 32))
    assert np.array_equal(boxes, golden["bbox"])
    top, left, bottom, right = boxes[5].tolist()
    mixed = mixing.paste_box(images, partner, (top, left, bottom, right))
    assert torch.equal(mixed, torch.from_numpy(golden["mixed"]))
    blended = mixing.blend(images, partner, float(golden["lam"][5]))  # in float32
    assert torch.allclose(blended, torch.from_numpy(golden["mixup"]), atol=1e-6)


def test_patches_are_rdeds():
    golden = np.load(REFERENCE / "rded_shuffle_patches.npz")
    image = torch.from_numpy(golden["img"])[None]
    columns, rows = (torch.from_numpy(golden[f"perm_{n}"])[None] for n in ("cols", "rows"))
    assert torch.equal(mixing.permute_strips(image, columns, rows)[0], torch.from_numpy(golden["out"]))
    odd = torch.rand(2, 1, 10, 11)  # the remainder is dropped, as there
    same = torch.arange(3).expand(2, 3)
    assert torch.equal(mixing.permute_strips(odd, same, same), odd[:, :, :9, :9])


def test_patches_are_shuffled_for_every_image_alone():
    images = torch.arange(64 * 64.0).view(1, 1, 64, 64).expand(200, 1, 64, 64)
    found = mixing.shuffled_patches(images, seeded())
    corners = [tuple(c) for c in found[:, 0, ::32, ::32].flatten(1).tolist()]
    assert len(set(corners)) == 4  # 2 orders of the columns times 2 of the rows
    assert all(sorted(c) == sorted(corners[0]) for c in corners)
    assert torch.equal(found.flatten(1).sort(1).values, images.flatten(1).sort(1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize(("policy", "smallest"), [("rrc_flip", 0.08), ("rrc_flip_large", 0.6)])
def test_crops_are_torchvisions(policy, smallest, dtype):
    images = batch() if dtype == torch.float32 else (batch() * 255).to(torch.uint8)
    found = augment(images, policy, seeded(4))
    drawn = torch.rand((8, 23), generator=seeded(4), dtype=torch.float64).numpy()
    boxes = np.rint(random_crops(drawn[:, :22], (16, 16), (smallest, 1.0), RATIO) * 16).astype(int)
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        wanted = resized_crop(images[i].float(), top, left, height, width, [16, 16], antialias=True)
        wanted = wanted.flip(-1) if drawn[i, 22] < 0.5 else wanted
        assert (found[i].float() - wanted).abs().max() < (1e-5 if dtype == torch.float32 else 0.51)
    areas = boxes[:, 2] * boxes[:, 3] / 256
    assert areas.min() < max(0.5, smallest + 0.15) < areas.max()


@pytest.mark.parametrize("policy", [name for name in POLICIES if mixes(name)])
def test_a_batch_is_mixed_with_itself(policy):
    """Images of one value each: a mixed one holds its own value and one other (CutMix), or lies between (mixup)."""
    values = torch.arange(8.0) / 7
    images = values.view(8, 1, 1, 1).expand(8, 3, 16, 16)
    changed = 0
    for seed in range(8):
        found = augment(images, policy, seeded(seed))
        assert found.shape == images.shape
        if policy.endswith("_mixup") and policy.startswith("rrc"):
            spread = found.flatten(1)
            assert torch.allclose(spread.min(1).values, spread.max(1).values, atol=1e-6)
            changed += int((spread[:, 0] - values).abs().max() > 1e-3)
        elif policy.startswith("crop"):  # zero padding is a value too
            changed += int((found - images).abs().max() > 1e-3)
        else:
            kinds = [set(x.flatten().mul(7).round(decimals=3).tolist()) for x in found]
            assert all(1 <= len(k) <= 2 for k in kinds)
            changed += int(any(len(k) == 2 for k in kinds))
    assert changed > 3


def test_shares_are_of_the_beta_distribution():
    images = torch.zeros(2, 1, 1, 1)
    images[1] = 1.0
    shares = []
    for seed in range(400):
        first, second = mixing.mixup(images, seeded(seed)).flatten().tolist()
        if (first, second) != (0.0, 1.0):  # the permutation may leave all where it is
            shares.append(1 - first)
    mean, var = float(np.mean(shares)), float(np.var(shares))
    assert 120 < len(shares) < 280 and abs(mean - 0.5) < 0.08
    assert abs(var - 1 / (4 * (2 * 0.8 + 1))) < 0.03  # of Beta(a, a): 1 / (4 (2 a + 1))


def test_what_is_said_of_labels():
    assert mixing_note("crop_flip", "stored") is None and mixing_note("crop_flip_mixup", "argmax") is None
    assert "there first" in (mixing_note("crop_flip_mixup", "stored") or "")
