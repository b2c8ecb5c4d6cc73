"""The augmentation policies by name, for lists and messages. No torch."""

from __future__ import annotations

POLICIES: dict[str, str] = {
    "none": "the image as it is",
    "flip": "horizontal flip with probability 1/2",
    "crop": "zero padding of 1/8 of the side, then a random crop of the old size",
    "crop_flip": "crop and flip: the usual training augmentation of CIFAR",
    "shift": "random shift of up to 2 pixels in each direction, zero filled (MNIST)",
    "affine": "random rotation of +-15 degrees, scale 0.9-1.1, translation of +-10 % (kornia), zero filled",
    "crop_flip_cutout": "crop, flip, and a square of half the side set to the batch mean (cutout)",
    "rrc_flip": "random resized crop (area 0.08-1, ratio 3/4-4/3, antialiased) and flip: the usual one of ImageNet",
    "rrc_flip_large": "the same with areas of 0.6-1 (GenDD on ImageNet)",
    "rrc_flip_cutmix": "rrc_flip, then CutMix (alpha 1): a box of every image from another one of the batch",
    "rrc_flip_mixup": "rrc_flip, then mixup (alpha 0.8): every image blended with another one of the batch",
    "crop_flip_cutmix": "crop_flip, then CutMix (alpha 1)",
    "crop_flip_mixup": "crop_flip, then mixup (alpha 0.8)",
    "flip_cutmix": "flip, then CutMix (alpha 1)",
    "patches_rrc_flip_cutmix": "2 x 2 patches in random order, crop of area 0.5-1, flip, CutMix (RDED, EDC)",
}


def mixes(policy: str) -> bool:
    """Whether images of a batch are mixed: the teacher has to see the mixed image, and a hard label is half true."""
    return policy.endswith(("_cutmix", "_mixup"))


def mixing_note(policy: str, labels: str) -> str | None:
    """What to say of hard labels (none, argmax, stored) beside mixed images; None: nothing."""
    if not mixes(policy) or labels != "stored":
        return None
    return f"augment {policy}: a mixed image has the label of the image that was there first"
