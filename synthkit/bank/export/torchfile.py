"""Files as `torch.save` makes them, written piece by piece and without torch: memory stays bounded at any size.

Such a file is a ZIP archive of stored entries: `NAME/data.pkl`, a pickle that builds tensors around numbered storages;
`NAME/data/0` and on, their bytes; `NAME/byteorder` and `NAME/version`. The pickle here names `_rebuild_tensor_v2`, the
storage class and OrderedDict, which `torch.load(weights_only=True)` allows, and nothing else.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from synthkit.bank.export.arrays import raw_bytes

ALIGNMENT = 64  # bytes, of every storage; what torch itself does, so that `torch.load(mmap=True)` finds it aligned
_STORAGES = {"<f4": "FloatStorage", "<f8": "DoubleStorage", "<i8": "LongStorage", "<i4": "IntStorage"}
_LIMIT = zipfile.ZIP64_LIMIT


@dataclass(frozen=True)
class TensorPlan:
    """One tensor: its numbers come as C-contiguous arrays one after the other."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Iterable[np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> TensorPlan:
        """An array that is in memory; float32, float64, int64 or int32 (others become the nearest larger)."""
        kinds = {"f": "<f8" if array.dtype.itemsize == 8 else "<f4", "i": "<i8", "u": "<i8", "b": "<i8"}
        ready = array.astype(kinds[array.dtype.kind])
        return cls(ready.dtype, ready.shape, [ready])

    @property
    def count(self) -> int:
        """Numbers in it."""
        return int(np.prod(self.shape, dtype=np.int64))


def write_torch(path: Path, value: TensorPlan | Mapping[str, TensorPlan]) -> None:
    """Write one tensor, or a dict of them, to the new file `path`.

    Raises:
        OSError: as the system said it. ValueError: the pieces do not add up to the shape.
    """
    tensors = list(value.values()) if isinstance(value, Mapping) else [value]
    with zipfile.ZipFile(path, "x", allowZip64=True) as archive:
        _entry(archive, f"{path.stem}/data.pkl", [_pickled(value)])
        _entry(archive, f"{path.stem}/byteorder", [b"little"])
        for number, tensor in enumerate(tensors):
            pieces = (raw_bytes(piece.astype(tensor.dtype, copy=False)) for piece in tensor.pieces)
            _entry(archive, f"{path.stem}/data/{number}", pieces, tensor.count * tensor.dtype.itemsize)
        _entry(archive, f"{path.stem}/version", [b"3\n"])


def _entry(archive: zipfile.ZipFile, name: str, pieces: Iterable[bytes | memoryview], size: int | None = None) -> None:
    pieces = list(pieces) if size is None else pieces
    expected = size if size is not None else sum(len(p) for p in pieces)  # type: ignore[arg-type]  # a list then
    info = zipfile.ZipInfo(name)  # dated 1980-01-01
    info.create_system, info.external_attr, info.file_size = 3, 0o644 << 16, expected
    large = expected * 1.05 > _LIMIT  # zipfile then adds a field of 20 bytes to the header
    assert archive.fp is not None
    start = archive.fp.tell() + 30 + len(name.encode()) + 20 * large + 4
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    written = 0
    with archive.open(info, "w", force_zip64=large) as stream:
        for piece in pieces:
            stream.write(piece)
            written += len(piece)
    if written != expected:
        raise ValueError(f"{name}: {written} bytes came, {expected} were announced")


def _pickled(value: TensorPlan | Mapping[str, TensorPlan]) -> bytes:
    if isinstance(value, TensorPlan):
        body = _tensor(value, 0)
    else:
        rows = (_plain(name) + _tensor(tensor, i) for i, (name, tensor) in enumerate(value.items()))
        body = pickle.EMPTY_DICT + pickle.MARK + b"".join(rows) + pickle.SETITEMS
    return pickle.PROTO + b"\x02" + body + pickle.STOP


def _tensor(tensor: TensorPlan, number: int) -> bytes:
    """Opcodes of `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`."""
    kind = _global("torch", _STORAGES[tensor.dtype.str])
    place = [_plain("storage"), kind, _plain(str(number)), _plain("cpu"), _plain(tensor.count)]
    strides = np.cumprod([1, *tensor.shape[:0:-1]], dtype=np.int64)[::-1].tolist() if tensor.shape else []
    parts = [
        _tuple(place) + pickle.BINPERSID, _plain(0), _tuple([_plain(v) for v in tensor.shape]),
        _tuple([_plain(v) for v in strides]), pickle.NEWFALSE,
        _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
    ]  # fmt: skip
    return _global("torch._utils", "_rebuild_tensor_v2") + _tuple(parts) + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(parts: list[bytes]) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def _plain(value: int | str) -> bytes:
    if isinstance(value, str):
        data = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(data)) + data
    return pickle.dumps(value, 2)[2:-1]  # without PROTO and STOP
