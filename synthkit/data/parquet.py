"""Image parquet in the Hugging Face layout: a struct column with `bytes`, and a label column. Needs pyarrow."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from synthkit.data.decode import decode_images
from synthkit.data.real import RealData, require_bytes
from synthkit.data.splits import Split, by_split, choose, looked_for, missing_root, refuse_other_split
from synthkit.errors import DataError, RequirementError

MAX_CLASSES = 1 << 20
_IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png", "picture")
_LABEL_COLUMNS = ("fine_label", "label", "labels", "class", "target", "cls")
_BATCH_BYTES = 256 << 20
_PATTERNS = ("*.parquet", "data/*.parquet", "*/*.parquet", "*/*/*.parquet")


def pyarrow_parquet() -> Any:
    """The module pyarrow.parquet. Raises `RequirementError` where pyarrow is missing."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RequirementError("parquet: pyarrow is not installed", hint="pip install 'synthkit[parquet]'") from error
    return pyarrow.parquet


def find_parquet(root: Path) -> list[Path]:
    """Parquet files at or below a folder (own level, data/, then two levels)."""
    for pattern in _PATTERNS:
        found = sorted(root.glob(pattern))
        if found:
            return found
    return []


def load_parquet(
    pattern: str, split: Split, size: tuple[int, int, int] | None, name: str, standard: Sequence[str] | None = None
) -> RealData:
    """Read parquet files: a file, a glob, or a folder of them.

    The split is in the file name (`train-00000-of-00002.parquet`) or the folder's (`train/0000.parquet`); a single
    named file is taken whole. Class names come from `standard`, the Hugging Face schema, the key `class_names` of the
    schema, or a `classes.txt` beside the files.

    Raises:
        DataError: nothing found, no image or label column, an unlabelled split, an unreadable image.
        RequirementError: pyarrow is missing.
    """
    files, taken, notes = select_files(pattern, split, name)
    reader = pyarrow_parquet()
    require_bytes(f"{name}: the compressed images", sum(path.stat().st_size for path in files))
    sources: list[bytes] = []
    raw: list[Any] = []
    names: list[str] | None = list(standard) if standard is not None else None
    for path in files:
        images, labels, found = _read(reader, path)
        sources += images
        raw += labels
        names = names or found
    if not sources:
        raise DataError(f"{name}: no rows in {', '.join(str(path) for path in files)}")
    labels, names = _labels(raw, names or names_beside(files[0]), name)
    images, stored = decode_images(sources, lambda i: f"{name} row {i}", size, name)
    root = str(files[0].parent if len(files) > 1 else files[0])
    return RealData(
        images=images,
        labels=labels,
        class_names=names,
        name=name,
        root=root,
        split=taken,
        notes=notes,
        stored_shape=stored,
    )


def select_files(pattern: str, split: Split, name: str) -> tuple[list[Path], str, tuple[str, ...]]:
    """(files, what part they are, notes) of a file, a folder or a glob. Raises `DataError` when nothing fits."""
    path = Path(pattern).expanduser()
    if path.is_file():
        taken = next(iter(by_split([path]))) or "all"
        refuse_other_split(name, path, taken, split)
        note = f"the file name tells no split; all of {path} is used as {split!r}"
        return [path], taken, (note,) if taken == "all" and split != "all" else ()
    if path.is_dir():
        files = find_parquet(path)
        if not files:
            raise looked_for(name, path, _PATTERNS)
    else:
        files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise missing_root(name, path)
    groups = by_split(files)
    if set(groups) == {""}:
        note = f"the file names tell no split; all {len(files)} files are used as {split!r}"
        return groups[""], "all", (note,) if split != "all" else ()
    notes = (f"{len(groups.pop(''))} files of no split were left out",) if "" in groups else ()
    if len(groups) == 1 and not path.is_dir():  # the glob itself names the split
        taken = next(iter(groups))
        refuse_other_split(name, path, taken, split)
        return groups[taken], taken, notes
    chosen, taken = choose(groups, split, name)
    return [file for group in chosen for file in group], taken, notes


def _read(reader: Any, path: Path) -> tuple[list[bytes], list[Any], list[str] | None]:
    """Image bytes and raw labels of one file, and its class names if it tells them."""
    import pyarrow

    try:
        with reader.ParquetFile(path) as file:
            schema = file.schema_arrow
            image, label = image_and_label_columns(schema, path)
            groups = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
            require_bytes(f"{path}: the unpacked rows", sum(groups))
            rows = rows_at_once(max(groups, default=0))
            is_struct = pyarrow.types.is_struct(schema.field(image).type)
            images: list[Any] = []
            labels: list[Any] = []
            shared: dict[Any, Any] = {}  # a dictionary may name one huge value in every row: it is kept once
            for batch in file.iter_batches(columns=[image, label], batch_size=rows):
                column = batch.column(image)
                values = binary_values(column.field("bytes") if is_struct else column)
                images += [shared.setdefault(value, value) for value in values]
                labels += batch.column(label).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})", hint="get the file again") from error
    if any(content is None for content in images):
        row = images.index(None)
        raise DataError(f"{path}: row {row} holds no image bytes (only a path?)", hint="store the bytes in the file")
    return images, labels, schema_names(schema.metadata, label)


def binary_values(column: Any) -> list[Any]:
    """The values of a binary column; rows that share a dictionary entry share the bytes object."""
    import pyarrow.types as types

    if not types.is_dictionary(column.type):
        return column.to_pylist()
    values = column.dictionary.to_pylist()
    return [None if at is None else values[at] for at in column.indices.to_pylist()]


def rows_at_once(group_bytes: int) -> int:
    """Rows per batch, 1 to 256: at most 256 MiB (or one row) even when every row names the whole row group.

    Parquet may store a value once and name it in every row: unpacked, 2 MB on disk can become terabytes in memory.
    """
    return max(1, min(256, _BATCH_BYTES // max(group_bytes, 1)))


def image_columns(schema: Any) -> list[str]:
    """Columns of an arrow schema that hold the bytes of image files, the likeliest first."""
    import pyarrow.types as types

    def binary(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_binary(kind) or types.is_large_binary(kind)

    images = []
    for field in schema:
        if types.is_struct(field.type):
            inner = {field.type.field(i).name: field.type.field(i).type for i in range(field.type.num_fields)}
            if "bytes" in inner and binary(inner["bytes"]):
                images.append(field.name)
        elif binary(field.type):
            images.append(field.name)
    return sorted(
        images,
        key=lambda n: _IMAGE_COLUMNS.index(n.lower()) if n.lower() in _IMAGE_COLUMNS else len(_IMAGE_COLUMNS),
    )


def label_columns(schema: Any) -> list[str]:
    """Columns of an arrow schema that by their name hold labels, the likeliest first."""
    return [name for name in _LABEL_COLUMNS if name in schema.names]


def image_and_label_columns(schema: Any, path: Path) -> tuple[str, str]:
    """(image column, label column) of an arrow schema. Raises `DataError` where one is missing."""
    images, labels = image_columns(schema), label_columns(schema)
    shown = ", ".join(f"{field.name}: {field.type}" for field in schema)
    if not images:
        raise DataError(f"{path}: no image column ({shown})", hint="expected a struct with `bytes`, or binary")
    if not labels:
        raise DataError(f"{path}: no label column ({shown})", hint=f"expected one of {', '.join(_LABEL_COLUMNS)}")
    return images[0], labels[0]


def schema_names(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    """Class names in the metadata of an arrow schema, as Hugging Face writes them; None where there are none."""
    metadata = metadata or {}
    if b"huggingface" in metadata:
        try:
            feature = json.loads(metadata[b"huggingface"])["info"]["features"][label]
            names = feature.get("names")
        except (ValueError, KeyError, TypeError, AttributeError):
            names = None  # other tools write this key too; without names the labels stay numbers
        if isinstance(names, list) and names:
            return [str(name) for name in names]
    if b"class_names" in metadata:
        return metadata[b"class_names"].decode("utf-8", "replace").split(",")
    return None


def names_beside(path: Path) -> list[str] | None:
    """Class names from classes.txt: one line per class, the last tab-separated part is the name."""
    listing = path.parent / "classes.txt"
    if not listing.is_file() or listing.stat().st_size > 1 << 20:
        return None
    return [line.split("\t")[-1].strip() for line in listing.read_text("utf-8").splitlines() if line.strip()]


def _labels(raw: list[Any], names: list[str] | None, what: str) -> tuple[torch.Tensor, list[str]]:
    if any(value is None for value in raw):
        raise DataError(f"{what}: row {raw.index(None)} has no label")
    if all(isinstance(value, str) for value in raw):
        order = names if names and set(raw) <= set(names) else sorted(set(raw))
        table = {name: i for i, name in enumerate(order)}
        return torch.tensor([table[value] for value in raw], dtype=torch.int64), list(order)
    if not all(isinstance(value, int) for value in raw):
        raise DataError(f"{what}: labels are neither whole numbers nor text", got=raw[0])
    if min(raw) < 0:
        raise DataError(f"{what}: labels of {min(raw)}: this split is not labelled", hint="take another split")
    if max(raw) >= MAX_CLASSES:  # one name per class is made below: a label of 2**40 would fill the memory
        raise DataError(f"{what}: a label of {max(raw)}: that is no class number", hint=f"cap: {MAX_CLASSES} classes")
    return torch.tensor(raw, dtype=torch.int64), names or [str(i) for i in range(max(raw) + 1)]
