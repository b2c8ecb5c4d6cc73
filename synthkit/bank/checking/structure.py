"""The HDF5 side of verification: is a shard file exactly the plain datasets that its record lists?

This is the only place where bytes of a bank meet the HDF5 parser (reading goes by the offsets of the record). Callers
compare the sha256 with the record and the manifest first. See `sandbox` for files from strangers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.bank.shard import Placement, Sidecar, summary, value_problem
from synthkit.bank.spec import BankSpec
from synthkit.errors import BankError

if TYPE_CHECKING:
    import h5py

_SHOWN = 10  # names listed in a message


def check_structure(file: Path, sidecar: Sidecar) -> None:
    """`check_datasets` of a shard."""
    check_datasets(file, sidecar.datasets)


def check_datasets(file: Path, datasets: Mapping[str, Placement]) -> None:
    """Refuse an HDF5 file that does not hold exactly `datasets`, each plain and in its place.

    Plain: a hard link in the root group to an object of its own, no attributes, contiguous, allocated, neither
    external nor virtual, no filters, of the recorded little-endian integer or IEEE float type and shape, and fixed in
    size. Nothing is read through the parser but object headers. The file has no user block and no other objects.

    Raises:
        BankError: anything else.
    """
    import h5py
    from h5py import h5o  # pyright: ignore[reportAttributeAccessIssue]  # a C extension without stubs

    try:
        with h5py.File(file, "r", locking=False) as opened:
            if opened.userblock_size:
                raise BankError(f"{file}: begins with a user block; a shard has none", got=opened.userblock_size)
            if opened.id.get_filesize() > file.stat().st_size:
                raise BankError(f"{file}: claims more bytes than it has", got=opened.id.get_filesize())
            _check_root(file, opened, datasets)
            seen: dict[int, str] = {}
            for name, place in datasets.items():
                node = _dataset(file, opened, name)
                wrong = _layout_problem(node, place)
                if wrong:
                    raise BankError(f"{file}: {name} {wrong}")
                address = h5o.get_info(node.id).addr
                if address in seen:
                    raise BankError(f"{file}: {name} and {seen[address]} are two links to one dataset")
                seen[address] = name
    except BankError:
        raise
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        # whatever h5py says of a broken file; it has no error type of its own
        raise BankError(f"{file}: is not readable HDF5 ({str(error)[:120]})") from error


def _check_root(file: Path, opened: h5py.File, datasets: Mapping[str, Placement]) -> None:
    if len(opened) != len(datasets):  # counted before it is listed: a group can claim millions of names
        raise BankError(f"{file}: holds other datasets than recorded", got=f"{len(opened)} objects")
    names = sorted(opened)
    if names != sorted(datasets):
        raise BankError(f"{file}: holds other datasets than recorded", got=[str(n)[:40] for n in names[:_SHOWN]])
    if len(opened.attrs):
        raise BankError(f"{file}: holds attributes; a shard has none")


def _dataset(file: Path, opened: h5py.File, name: str) -> h5py.Dataset:
    import h5py

    # The kind of link is asked before it is followed: a link can lead to any file of the machine.
    if type(opened.get(name, getlink=True)) is not h5py.HardLink:
        raise BankError(f"{file}: {name} is a link to elsewhere; a shard holds hard links only")
    node = opened[name]
    if not isinstance(node, h5py.Dataset):
        raise BankError(f"{file}: {name} is not a dataset")
    if len(node.attrs):
        raise BankError(f"{file}: {name} holds attributes; a shard has none")
    return node


def _layout_problem(node: h5py.Dataset, place: Placement) -> str | None:
    import h5py

    plist = node.id.get_create_plist()
    if node.is_virtual or plist.get_external_count():
        return "keeps its data in another file"
    if plist.get_layout() != h5py.h5d.CONTIGUOUS or plist.get_nfilters():
        return "is not contiguous and unfiltered"
    if not node.id.get_type().equal(h5py.h5t.py_create(place.dtype)):
        return f"is stored as {_type_name(node)}, recorded is {place.dtype}"
    if node.id.shape != place.shape or node.maxshape != place.shape:
        return f"has shape {node.id.shape} (at most {node.maxshape}), recorded is {place.shape}"
    if node.id.get_offset() != place.offset:
        return f"lies at byte {node.id.get_offset()}, recorded is {place.offset}"
    if node.id.get_storage_size() != math.prod(place.shape) * place.dtype.itemsize:
        return f"has {node.id.get_storage_size()} bytes in the file"
    return None


def _type_name(node: h5py.Dataset) -> str:
    """The stored type for a message; the HDF5 class alone where numpy has no such type."""
    try:
        return str(node.dtype)[:80]
    except (TypeError, ValueError, RuntimeError):
        return f"a type of HDF5 class {node.id.get_type().get_class()}"


def check_values(file: Path, sidecar: Sidecar, spec: BankSpec) -> None:
    """Refuse a shard whose values break the rules of the columns, or are not what its record counts.

    Read by offset, without the HDF5 parser. Images are not looked at: any byte is a valid pixel.
    """
    columns: dict[str, np.ndarray] = {}
    for name, place in sidecar.datasets.items():
        if name != "images":
            columns[name] = read_column(file, place)
    wrong = value_problem(columns, spec)
    if wrong:
        raise BankError(f"{file}: {wrong}")
    counted: dict[str, Any] = summary(columns, spec.num_classes)
    for key in ("label_histogram", "argmax_matches", "step_range", "difficulty_range"):
        if counted.get(key) != sidecar.raw.get(key):
            raise BankError(f"{file}: {key} is not what the record says", got=counted.get(key))


def read_column(file: Path, place: Placement) -> np.ndarray:
    """A column of a file by its offset. Raises `BankError` when the file ends before it."""
    count = math.prod(place.shape)
    flat = np.fromfile(file, dtype=place.dtype, count=count, offset=place.offset)
    if flat.size != count:
        raise BankError(f"{file}: ends before byte {place.offset + count * place.dtype.itemsize}")
    return flat.reshape(place.shape)
