"""One .npz of all arrays, for numpy without pickle: images, labels, logits, class names, mean, std and the rest"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank.export.arrays import EVERYTHING, ArrayPlan, class_name_array, plan_columns, plan_extras, raw_bytes
from synthkit.bank.export.base import Format

FILE = "bank.npz"


@dataclass(frozen=True, kw_only=True)
class NpzOptions:
    """How the file is written."""

    compress: bool = False
    """Deflate the arrays: smaller by what the images allow, and much slower to write and read."""


class Npz(Format):
    """Columns under the bank's names; images uint8 (N,C,H,W). `np.load(..., allow_pickle=False)` reads it."""

    Options = NpzOptions
    carries = EVERYTHING

    def check(self) -> None:
        """See `Format.check`."""
        if class_name_array(self.source.names) is None:
            self.notes.append("class_names would take more than 64 MiB as an array: they are in synthkit.json alone")

    def plan(self) -> list[ArrayPlan]:
        """The arrays, in the order of the file."""
        found = plan_columns(self.source, self.columns)
        names = class_name_array(self.source.names)
        if names is not None:
            found.append(ArrayPlan("class_names", names.dtype, names.shape, value=names))
        return found + plan_extras(self.source)

    def passes(self) -> int:
        """See `Format.passes`."""
        return len(self.columns)

    def estimate(self) -> int:
        """See `Format.estimate`."""
        return sum(p.bytes + 512 for p in self.plan()) + 4096

    def write(self, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
        """See `Format.write`."""
        plan = self.plan()
        with zipfile.ZipFile(folder / FILE, "x", allowZip64=True) as archive:
            for array in plan:
                entry = zipfile.ZipInfo(f"{array.name}.npy")  # dated 1980-01-01: the same bytes at any time
                entry.create_system, entry.external_attr = 3, 0o644 << 16
                entry.compress_type = zipfile.ZIP_DEFLATED if self.options.compress else zipfile.ZIP_STORED
                with archive.open(entry, "w", force_zip64=True) as stream:
                    stream.write(_header(array))
                    for piece in array.pieces(self.source, advance):
                        stream.write(raw_bytes(piece))
        return {"arrays": FILE, "names": [a.name for a in plan]}

    def usage(self) -> str:
        """See `Format.usage`."""
        return f'import numpy\n\ndata = numpy.load("DIR/{FILE}")\ndata["images"]  # uint8 (N, C, H, W)'


def _header(array: ArrayPlan) -> bytes:
    stream = io.BytesIO()
    form = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(stream, form)
    return stream.getvalue()
