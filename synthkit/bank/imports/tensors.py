"""`.safetensors`: images, labels and further bank columns as tensors; read in slices from a memory map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank.imports.arrays import source_from_arrays
from synthkit.bank.imports.columns import Column, SlicedColumn
from synthkit.bank.imports.own import record_of
from synthkit.bank.imports.source import ImportOptions, Source, one_file, refuse_link
from synthkit.errors import DataError

_DTYPES = {"F16": "f2", "F32": "f4", "F64": "f8", "U8": "u1", "I8": "i1", "I16": "i2", "U16": "u2", "I32": "i4",
           "U32": "u4", "I64": "i8", "U64": "u8", "BOOL": "?"}  # fmt: skip


def open_source(path: Path, options: ImportOptions) -> Source:
    """The tensors of the file.

    Raises:
        DataError: not a whole safetensors file, or tensors that mean nothing clear.
    """
    from safetensors import SafetensorError, safe_open

    own = record_of(path, "safetensors")
    path = one_file(refuse_link(path), ".safetensors")
    try:
        file = safe_open(str(path), framework="numpy")
        file.__enter__()  # kept open by the slices below: rows() reads them later
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a whole safetensors file ({error})", hint="fetch the file again") from error
    arrays: dict[str, Column] = {}
    for key in file.keys():  # noqa: SIM118  # not a mapping
        piece = file.get_slice(key)
        if piece.get_dtype() in _DTYPES:
            arrays[key] = _column(file, key, piece)
    names = _names((file.metadata() or {}).get("class_names"), str(path))
    return source_from_arrays(
        arrays, options, kind="safetensors", what=str(path), name=path.name, own=own, class_names=names
    )


def _column(file: Any, key: str, piece: Any) -> Column:
    def read(rows: slice | None) -> np.ndarray:
        return file.get_tensor(key) if rows is None else piece[rows]

    return SlicedColumn(tuple(piece.get_shape()), np.dtype(_DTYPES[piece.get_dtype()]), read)


def _names(text: str | None, what: str) -> list[str] | None:
    """Class names from the metadata: a JSON list. Raises `DataError`."""
    if text is None:
        return None
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what}: class_names in the metadata is not JSON ({str(error)[:80]})") from error
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise DataError(f"{what}: class_names in the metadata must be a list of text")
    return names
