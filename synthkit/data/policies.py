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
}
