"""ImageFolder: one folder per class, optionally below train/, test/ or val/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from synthkit.data.classes import standard_index
from synthkit.data.decode import decode_images
from synthkit.data.real import RealData
from synthkit.data.splits import Split, choose, refuse_other_split, split_of_folder
from synthkit.errors import DataError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


def visible_dirs(folder: Path) -> list[Path]:
    """The folders in `folder` that are not hidden, sorted by name."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def split_folders(root: Path) -> dict[str, Path]:
    """The folders train, test, val directly below `root`, by what they are; empty when there are none."""
    found: dict[str, Path] = {}
    for folder in visible_dirs(root):
        kind = split_of_folder(folder.name)
        # a class may be called "train" (CIFAR-100 has one): a split folder holds folders
        if kind and visible_dirs(folder):
            found.setdefault(kind, folder)
    return found


def is_image_folder(root: Path) -> bool:
    """True when `root`, or a split folder in it, has at least one class folder with an image."""
    places = list(split_folders(root).values()) or [root]
    return any(_images_below(folder) for place in places for folder in visible_dirs(place))


def load_folder(
    root: Path, split: Split, size: tuple[int, int, int] | None, name: str, standard: Sequence[str] | None = None
) -> RealData:
    """Read an ImageFolder.

    Without `standard`, classes are the sorted folder names (over all splits, so train and test agree). With it, folders
    are matched to the standard classes by name, whatever their alphabetical order is.

    Raises:
        DataError: no class folders, an unreadable image, or a folder that is not a standard class.
    """
    parts = split_folders(root)
    notes: list[str] = []
    if parts:
        chosen, taken = choose(parts, split, name)
    else:
        chosen, taken = [root], split_of_folder(root.name) or "all"
        refuse_other_split(name, root, taken, split)
        if split != "all" and taken == "all":
            notes.append(f"{root} is not divided into train and test; all of it is used as {split!r}")
    folders = [folder for part in chosen for folder in visible_dirs(part)]
    everywhere = {folder.name for part in (parts.values() or [root]) for folder in visible_dirs(part)}
    names = sorted(everywhere)
    index = {n: i for i, n in enumerate(names)}
    class_names = names
    if standard is not None:
        index = dict(zip(names, standard_index(names, standard, name), strict=True))
        class_names = list(standard)
        absent = sorted(set(range(len(standard))) - set(index.values()))
        if absent:
            notes.append("no folder for " + ", ".join(standard[i] for i in absent[:12]))
    files: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        inside = _images_below(folder)
        if not inside:
            notes.append(f"{folder} holds no image")
        files += inside
        labels += [index[folder.name]] * len(inside)
    if not files:
        raise DataError(f"{name}: no images in the class folders of {root}", hint="expected ROOT[/train]/CLASS/*.png")
    images, stored = decode_images(files, lambda i: str(files[i]), size, name)
    return RealData(
        images=images,
        labels=torch.tensor(labels, dtype=torch.int64),
        class_names=class_names,
        name=name,
        root=str(root),
        split=taken,
        notes=tuple(notes),
        stored_shape=stored,
    )
