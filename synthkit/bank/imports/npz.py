"""`.npz`: images and labels (or x and y), plain or with `_train`/`_test`, and any further bank columns by name."""

from __future__ import annotations

import zipfile
from pathlib import Path

from synthkit.bank.imports.arrays import source_from_arrays
from synthkit.bank.imports.columns import Column, NpyMember, zip_errors
from synthkit.bank.imports.own import record_of
from synthkit.bank.imports.source import ImportOptions, Source, one_file, refuse_link
from synthkit.errors import DataError

MAX_MEMBERS = 1000


def open_source(path: Path, options: ImportOptions) -> Source:
    """The arrays of the file; they are decompressed as a stream, never as a whole.

    Raises:
        DataError: not an npz, pickled objects, shapes that the file does not hold, or arrays that mean nothing clear.
    """
    own = record_of(path, "npz")
    path = one_file(refuse_link(path), ".npz")
    with zip_errors(path), zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    if len(members) > MAX_MEMBERS or len(set(members)) < len(members):
        raise DataError(f"{path}: more than {MAX_MEMBERS} arrays, or two of one name", got=len(members))
    arrays: dict[str, Column] = {m.removesuffix(".npy"): NpyMember(path, m) for m in members if m.endswith(".npy")}
    if not arrays:
        raise DataError(f"{path}: holds no .npy arrays", got=members[:10])
    return source_from_arrays(arrays, options, kind="npz", what=str(path), name=path.name, own=own)
