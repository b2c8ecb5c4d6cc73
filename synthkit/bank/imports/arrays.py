"""From named arrays (npz, pt, safetensors) to a `Source`: which array is what, and what its numbers mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from synthkit.bank import state
from synthkit.bank.imports.columns import Column, small, together
from synthkit.bank.imports.labels import Labels, read_labels
from synthkit.bank.imports.own import require_fit
from synthkit.bank.imports.pixels import Meaning, axes_of, meaning_of, to_nchw, to_uint8
from synthkit.bank.imports.source import (
    ImportOptions,
    Rows,
    Source,
    chunk_rows,
    settle_classes,
    unlabelled_error,
)  # fmt: skip
from synthkit.bank.shard import COLUMNS, TOPK
from synthkit.errors import DataError, UsageError

IMAGE_KEYS = ("images", "image", "x", "data", "imgs", "pixels")
LABEL_KEYS = ("labels", "label", "y", "targets", "target")
RATE_KEYS = ("lr", "learning_rate", "syn_lr")
_PARTS = ("train", "val", "test")
_EXTRA = tuple(name for name in COLUMNS if name not in ("images", "labels"))


class Joined:
    """Several columns one after the other."""

    def __init__(self, parts: list[Column]):
        self.parts = parts
        self.shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def chunks(self, rows: int) -> Iterator[np.ndarray]:
        """Pieces of exactly `rows` rows, also across the seams."""
        held: list[np.ndarray] = []
        for part in self.parts:
            for piece in part.chunks(rows):
                held.append(piece)
                joined = np.concatenate(held) if len(held) > 1 else held[0]
                held = [joined[len(joined) - len(joined) % rows :]] if len(joined) % rows else []
                for start in range(0, len(joined) - rows + 1, rows):
                    yield joined[start : start + rows]
        if held and len(held[0]):
            yield held[0]

    def whole(self) -> np.ndarray:
        """Everything at once."""
        return np.concatenate([p.whole() for p in self.parts])


def find_columns(arrays: Mapping[str, Column], options: ImportOptions, what: str) -> dict[str, Column]:
    """Bank column -> array: "images", perhaps "labels", and what bears the name of another bank column.

    Raises:
        DataError: no images, several candidates, or parts of different shapes.
    """
    spelled = {name.lower(): name for name in arrays}
    found: dict[str, Column] = {name: arrays[spelled[name]] for name in _EXTRA if name in spelled}
    for column, keys in (("images", IMAGE_KEYS), ("labels", LABEL_KEYS)):
        plain = [spelled[k] for k in keys if k in spelled]
        if plain:
            found[column] = arrays[plain[0]]
            continue
        parts: dict[str, Column] = {}
        for part in _PARTS:
            names = [spelled[form] for k in keys for form in (f"{k}_{part}", f"{part}_{k}") if form in spelled]
            if names:
                parts[part] = arrays[names[0]]
        chosen = [parts[p] for p in _PARTS if p in parts and options.split in ("all", p)]
        if options.split == "test" and not chosen and "val" in parts:
            chosen = [parts["val"]]
        if parts and not chosen:
            raise DataError(f"{what}: has no {options.split} part", got=sorted(parts))
        if len({c.shape[1:] for c in chosen}) > 1 or len({c.dtype for c in chosen}) > 1:
            raise DataError(f"{what}: the parts of {column} differ", got=[(c.shape, str(c.dtype)) for c in chosen])
        if chosen:
            found[column] = chosen[0] if len(chosen) == 1 else Joined(chosen)
    if "images" not in found:
        raise DataError(f"{what}: no images in it", got=sorted(arrays)[:20],
                        hint=f"name the array one of {', '.join(IMAGE_KEYS)}")  # fmt: skip
    return found


def text_list(arrays: Mapping[str, Column], key: str, what: str) -> list[str] | None:
    """The array of strings under `key`."""
    if key not in arrays:
        return None
    value = small(arrays[key], f"{what}: {key}").reshape(-1)
    if value.dtype.kind not in "US":
        raise DataError(f"{what}: {key} must be text", got=str(value.dtype))
    return [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in value.tolist()]


def number_list(arrays: Mapping[str, Column], key: str, what: str) -> list[float] | None:
    """The finite numbers under `key`."""
    if key not in arrays:
        return None
    value = small(arrays[key], f"{what}: {key}").reshape(-1)
    if value.dtype.kind not in "iuf" or not np.isfinite(value).all():
        raise DataError(f"{what}: {key} must be finite numbers", got=str(value.dtype))
    return [float(v) for v in value]


def source_from_arrays(
    arrays: Mapping[str, Column],
    options: ImportOptions,
    *,
    kind: str,
    what: str,
    name: str,
    own: dict[str, Any] | None = None,
    class_names: list[str] | None = None,
) -> Source:
    """A source of the images, labels and further bank columns among `arrays`.

    Args:
        what: the source in messages.
        own: the record of our own export, where it is one.
        class_names: names that came from elsewhere than an array.

    Raises:
        DataError: nothing that fits, arrays of different length, or numbers that mean nothing clear.
    """
    columns = find_columns(arrays, options, what)
    images = columns["images"]
    count = images.shape[0] if images.shape else 0
    if not count:
        raise DataError(f"{what}: holds no images", got=images.shape)
    for key, column in columns.items():
        if not column.shape or column.shape[0] != count:
            raise DataError(f"{what}: {count} images, but {key} has shape {column.shape}")
    axes = "nchw" if own else axes_of(images.shape, options, what)
    shape = _shape(images.shape, axes)
    require_fit(own, count, shape, what)
    size = options.size or shape
    mean, std = _normalisation(arrays, options, own, (shape[0], size[0]), what)
    theirs = mean is not None and std is not None and len(mean) == len(std) == shape[0]  # else of the resized images
    meaning = meaning_of(images, axes, options, what, mean if theirs else None, std if theirs else None)
    labels = _labels(columns, options, own, what)
    names = class_names or text_list(arrays, "class_names", what) or (labels.names if labels else None)
    num_classes, names = _classes(what, labels, columns, names, options, own)
    if labels is not None and labels.names is not None and names is not None:
        labels.rename(names, what)
    rates = [r for key in RATE_KEYS for r in number_list(arrays, key, what) or []]
    columns = _usable(columns, shape, num_classes, what)
    if size != shape and columns.pop("images_f16", None) is not None:
        resized = ["--size: the float pixels (images_f16) are left out"]
    else:
        resized = []
    extra = FloatColumn(columns, meaning, size == shape)
    transform, facts = extra.transform, {"kind": "affine"}
    if own is not None and (extra.column or "images_f16" in columns):
        transform, facts = _own_transform(arrays, own, what)
    notes = [*(labels.notes if labels else []), *resized, *extra.notes]

    def rows() -> Iterator[Rows]:
        step = chunk_rows(4 * math.prod(shape))
        for part in together(columns, step):
            yield _converted(part, axes, meaning, labels, size, extra.column)

    return Source(
        kind=kind, name=name, count=count, shape=size, num_classes=num_classes, class_names=names,
        label_kind="none" if labels is None else labels.kind, rows=rows,
        top_k=columns["topk_index"].shape[1] if "topk_index" in columns else None,
        transform=transform, transform_facts=facts, own=own, notes=notes,
        mean=mean if mean and len(mean) == size[0] else None, std=std if std and len(std) == size[0] else None,
        learning_rate=rates[0] if rates else None,
    )  # fmt: skip


def _normalisation(
    arrays: Mapping[str, Column],
    options: ImportOptions,
    own: dict[str, Any] | None,
    channels: tuple[int, int],
    what: str,
) -> tuple[list[float] | None, list[float] | None]:
    """(mean, std) as the user, the file or our own record says; of the stored images or of the resized ones."""
    found = []
    for key, said in (("mean", options.mean), ("std", options.std)):
        value = said or number_list(arrays, key, what) or (own or {}).get(key)
        if value is not None and len(value) not in channels:
            raise DataError(f"{what}: images have {channels[0]} channels, {key} has {len(value)} numbers")
        found.append(value)
    return found[0], found[1]


def _labels(columns: dict[str, Column], options: ImportOptions, own: dict[str, Any] | None, what: str) -> Labels | None:
    """What the labels are; with --unlabelled they are dropped unread. Raises `DataError` where there are none."""
    if options.unlabelled:
        columns.pop("labels", None)
        return None
    if "labels" not in columns:
        if (own or {}).get("label_kind") == "none":
            return None
        raise unlabelled_error(what)
    labels = read_labels(columns["labels"], columns["images"].shape[0], what)
    if own is not None and own["files"].get("labels") == "logits":
        labels.form = "logits"  # whatever their numbers look like
    return labels


def _shape(shape: tuple[int, ...], axes: str) -> tuple[int, int, int]:
    if axes == "nhw":
        return 1, shape[1], shape[2]
    return (shape[3], shape[1], shape[2]) if axes == "nhwc" else (shape[1], shape[2], shape[3])


def _classes(
    what: str, labels: Labels | None, columns: Mapping[str, Column], names: list[str] | None,
    options: ImportOptions, own: dict[str, Any] | None,
) -> tuple[int, list[str] | None]:  # fmt: skip
    largest = labels.largest if labels else 0
    if "logits" in columns and len(columns["logits"].shape) == 2:
        largest = max(largest, columns["logits"].shape[1] - 1)
    if own is not None and options.class_names is None:
        largest = max(largest, own["num_classes"] - 1)
        names = own["class_names"]
    return settle_classes(what, largest, names, options)


def _usable(
    columns: Mapping[str, Column], shape: tuple[int, int, int], num_classes: int, what: str
) -> dict[str, Column]:
    """The columns whose shapes fit a bank. Raises `DataError` for one that does not."""
    inner = {"logits": (num_classes,), "images_f16": shape}
    topk = [name for name in TOPK if name in columns]
    if topk and len(topk) < len(TOPK):
        raise DataError(f"{what}: has {' and '.join(topk)} only", hint=f"{', '.join(TOPK)} go together")
    if topk:
        k = columns["topk_index"].shape[1:]
        if len(k) != 1 or columns["topk_logit"].shape[1:] != k or not 1 <= k[0] < num_classes:
            raise DataError(f"{what}: topk_index and topk_logit must be (N, k), k below {num_classes}", got=k)
    for name, column in columns.items():
        wanted = inner.get(name, ())
        if name not in ("images", "labels", *TOPK[:2]) and column.shape[1:] != wanted:
            raise DataError(f"{what}: {name} must have rows of shape {wanted}", got=column.shape[1:])
    return dict(columns)


class FloatColumn:
    """Whether images_f16 is written, and what its transform is.

    Floats in [0,1] that uint8 cannot hold are pixels, and need no transform. Normalised ones are kept as they are, with
    the affine transform that made them.
    """

    def __init__(self, columns: Mapping[str, Column], meaning: Meaning, own_size: bool):
        self.column: bool = False
        self.transform: tuple[dict[str, np.ndarray], dict[str, Any]] | None = None
        self.notes: list[str] = []
        if meaning.exact or "images_f16" in columns:
            return
        if not own_size:
            self.notes.append("--size: the images are rounded to uint8 and then scaled; the float pixels are not kept")
            return
        self.column = True
        self.notes.append("float pixels are kept as fp16 (images_f16); images is their viewable uint8 version")
        if meaning.values == "normalised":
            arrays = {"mean": np.asarray(meaning.mean, np.float32), "std": np.asarray(meaning.std, np.float32)}
            self.transform = (arrays, {"formula": "images_f16 = (pixel - mean) / std"})


def _own_transform(
    arrays: Mapping[str, Column], own: dict[str, Any], what: str
) -> tuple[tuple[dict[str, np.ndarray], dict[str, Any]] | None, dict[str, Any]]:
    """((arrays, meta), facts) of the transform that our own export carries as `transform.NAME`.

    Raises:
        DataError: the arrays are not those that its record names.
    """
    facts = {k: v for k, v in own["transform"].items() if k != "sha256"}
    if not facts:
        return None, {}
    found = {k.removeprefix("transform."): small(v, what) for k, v in arrays.items() if k.startswith("transform.")}
    if not found:
        return None, {}
    try:
        digest = state.transform_entry(arrays=found, **facts)["sha256"]
    except (UsageError, TypeError) as error:
        raise DataError(f"{what}: the transform is malformed ({error})") from error
    if digest != own["transform"].get("sha256"):
        raise DataError(f"{what}: its transform is not the one that its record names", got=digest[:16] + "...")
    return (found, {}), facts


def _converted(
    part: dict[str, np.ndarray], axes: str, meaning: Meaning, labels: Labels | None, size: tuple[int, int, int],
    keep_float: bool,
) -> Rows:  # fmt: skip
    stored = to_nchw(part["images"], axes)
    images = to_uint8(stored, meaning)
    if images.shape[1:] != size:
        import torch

        from synthkit.data.real import resize_images

        images = resize_images(torch.from_numpy(np.ascontiguousarray(images)), size).numpy()
    rows: Rows = {k: v for k, v in part.items() if k not in ("images", "labels")}
    rows["images"] = np.ascontiguousarray(images)
    if labels is not None:
        rows.update({k: v for k, v in labels.rows(part["labels"]).items() if k == "labels" or k not in rows})
    if keep_float:
        rows["images_f16"] = np.ascontiguousarray(stored, dtype=np.float16)
    return rows
