"""One .safetensors of all arrays: images, labels, logits, ...; class names and provenance in its metadata.

The file: uint64 length of the header, the header (JSON, padded with blanks to 8 bytes), the arrays without gaps, those
with the largest numbers first so that every one is aligned. Written here piece by piece; the library holds it all.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from synthkit.bank import card, seal
from synthkit.bank.export.arrays import EVERYTHING, ArrayPlan, plan_columns, plan_extras, raw_bytes
from synthkit.bank.export.base import Format

FILE = "bank.safetensors"
_DTYPES = {
    "|u1": "U8", "<u2": "U16", "<u4": "U32", "<u8": "U64", "<i4": "I32", "<i8": "I64", "<f2": "F16", "<f4": "F32",
    "<f8": "F64",
}  # fmt: skip


class Safetensors(Format):
    """Columns under the bank's names; images uint8 (N,C,H,W)."""

    carries = EVERYTHING

    def plan(self) -> list[ArrayPlan]:
        """The arrays, in the order of the file."""
        found = [*plan_columns(self.source, self.columns), *plan_extras(self.source)]
        return sorted(found, key=lambda p: (-p.dtype.itemsize, p.name))

    def passes(self) -> int:
        """See `Format.passes`."""
        return len(self.columns)

    def estimate(self) -> int:
        """See `Format.estimate`."""
        return sum(p.bytes for p in self.plan()) + len(self._header()) + 4096

    def write(self, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
        """See `Format.write`."""
        with open(folder / FILE, "xb") as stream:
            stream.write(self._header())
            for array in self.plan():
                for piece in array.pieces(self.source, advance):
                    stream.write(raw_bytes(piece))
        return {"arrays": FILE, "names": [a.name for a in self.plan()]}

    def _header(self) -> bytes:
        spec, record = self.source.spec, self.source.bank.record
        facts = {
            "made_by": "synthkit export", "label_kind": self.source.label_kind, "bank_uuid": record["uuid"],
            "bank_root": seal.root_hash(self.source.bank.sidecars) if self.source.complete else "",
            "recipe_hash": str(record.get("recipe_hash") or ""), "origin": card.origin_line(spec),
            "contains_real": json.dumps(spec.contains_real), "real_data_used": json.dumps(spec.real_data_used),
            "class_names": json.dumps(spec.class_names), "mean": json.dumps(spec.mean), "std": json.dumps(spec.std),
        }  # fmt: skip
        entries: dict[str, Any] = {"__metadata__": facts}
        end = 0
        for array in self.plan():
            entries[array.name] = {
                "dtype": _DTYPES[array.dtype.str], "shape": list(array.shape), "data_offsets": [end, end + array.bytes]
            }  # fmt: skip
            end += array.bytes
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def usage(self) -> str:
        """See `Format.usage`."""
        return (
            "from safetensors.numpy import load_file  # or safetensors.torch\n\n"
            f'data = load_file("DIR/{FILE}")\ndata["images"]  # uint8 (N, C, H, W)'
        )
