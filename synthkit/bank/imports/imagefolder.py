"""ImageFolder: one folder per class, or our own export of it (labels.csv names every image, its label and the rest)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from synthkit.bank.imports.encoded import Survey, decode, decode_rows
from synthkit.bank.imports.source import ImportOptions, Rows, Source, refuse_inner_links, refuse_link, settle_classes
from synthkit.bank.imports.table import NAME, open_table
from synthkit.data.classes import canonical
from synthkit.errors import DataError


def open_source(path: Path, options: ImportOptions) -> Source:
    """The images below the class folders of `path`, in the order of class and file name.

    Raises:
        DataError: a link, no images, images of several sizes without --size, or an unreadable one.
    """
    refuse_link(path)
    refuse_inner_links(path)
    if (path / NAME).is_file():
        return open_table(path, options)
    files, labels, names, notes = _class_files(path, options)
    if options.class_names is not None and names:
        labels, more = _by_name(labels, names, options.class_names, str(path))
        notes += more
    largest = max(labels) if options.class_names is not None else len(names) - 1
    num_classes, class_names = settle_classes(str(path), 0 if options.unlabelled else largest, names, options)
    survey = Survey(str(path), options)
    for file in files:
        survey.add(file, str(file))
    shape = survey.shape
    given = np.asarray(labels, np.int64)

    def rows() -> Iterator[Rows]:
        step = decode_rows(shape)
        for start in range(0, len(files), step):
            part = files[start : start + step]
            chunk: Rows = {"images": decode(part, [str(p) for p in part], shape, str(path))}
            if not options.unlabelled:
                chunk["labels"] = given[start : start + step]
            yield chunk

    return Source(
        kind="imagefolder", name=path.resolve().name, count=len(files), shape=shape, num_classes=num_classes,
        class_names=class_names, label_kind="none" if options.unlabelled else "real", rows=rows,
        notes=notes,
    )  # fmt: skip


def _class_files(path: Path, options: ImportOptions) -> tuple[list[Path], list[int], list[str], list[str]]:
    """(files, labels, class names, notes)."""
    from synthkit.data.folder import split_folders, visible_dirs
    from synthkit.data.splits import choose

    parts = split_folders(path)
    places = choose(parts, options.split, str(path))[0] if parts else [path]
    notes = [] if not parts else [f"parts read: {', '.join(p.name for p in places)}"]
    everywhere = {folder.name for place in (parts.values() or [path]) for folder in visible_dirs(place)}
    names = sorted(everywhere)
    files: list[Path] = []
    labels: list[int] = []
    for place in places:
        loose = [p for p in place.iterdir() if _is_image(p)]
        if loose and not options.unlabelled:
            raise DataError(f"{path}: {loose[0].name} lies in no class folder, so it has no label",
                            hint="expected CLASS/*.png; --unlabelled takes images without labels")  # fmt: skip
        if options.unlabelled:
            files += sorted(loose)
        for folder in visible_dirs(place):
            inside = _images_below(folder)
            if not inside:
                notes.append(f"{folder.name} holds no image")
            files += inside
            labels += [names.index(folder.name)] * len(inside)
    if not files:
        raise DataError(f"{path}: no images in class folders", hint="expected DIR[/train]/CLASS/*.png")
    return files, labels, names if not options.unlabelled else [], notes


def _is_image(path: Path) -> bool:
    from synthkit.data.folder import EXTENSIONS

    return path.suffix.lower() in EXTENSIONS and path.is_file() and not path.name.startswith(".")


def _images_below(folder: Path) -> list[Path]:
    found = [Path(place) / name for place, _, files in os.walk(folder) for name in files]
    return sorted(p for p in found if _is_image(p))


def _by_name(labels: list[int], folders: list[str], names: list[str], what: str) -> tuple[list[int], list[str]]:
    """Labels in the order of `names`: folders are matched by name where they can be, else by their order."""
    table = {canonical(name): i for i, name in enumerate(names)}
    if all(canonical(folder) in table for folder in folders):
        order = [table[canonical(folder)] for folder in folders]
        return [order[label] for label in labels], []
    if len(folders) != len(names):
        unknown = next(f for f in folders if canonical(f) not in table)
        raise DataError(f"{what}: a folder is not among --class-names", got=unknown, allowed=names)
    return labels, ["--class-names rename the folders in their alphabetical order"]
