"""Class names where they become folder names, table cells or labels of other libraries."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_KEPT = set("-_.,()+@")  # beside letters, marks and digits of every script
_MAX_BYTES = 120  # of a folder name; file systems stop at 255
_FORMULA = "=+-@\uff1d\uff0b\uff0d\uff20"  # also the full-width forms, which some spreadsheets take for the plain ones


def printable(text: str) -> str:
    """`text` without control, format and half-surrogate characters (each becomes a blank; runs of blanks one)."""
    kept = (" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)
    return " ".join("".join(kept).split())


def unicode_text(text: str) -> str:
    """`text` that UTF-8 can hold: half surrogates become the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def folder_names(names: Sequence[str]) -> list[str]:
    """One folder name per class, sorted like the class numbers: `000_airplane`.

    The number in front makes the sorted order the label order, keeps equal names apart (also on file systems that
    ignore case) and rules out reserved names (`CON`) and hidden ones. Letters, marks and digits of every script are
    kept (NFC), and a few signs; all else (separators, quotes, what shells and Windows take for commands) becomes `_`;
    names are cut to 120 bytes.
    """
    width = max(3, len(str(len(names) - 1)))
    return [f"{number:0{width}d}_{_safe(name)}".rstrip("_") for number, name in enumerate(names)]


def _safe(name: str) -> str:
    text = unicodedata.normalize("NFC", printable(name))
    text = "".join(c if c in _KEPT or unicodedata.category(c)[0] in "LMN" else "_" for c in text)
    cut = re.sub("__+", "_", text).encode()[:_MAX_BYTES].decode(errors="ignore")
    return cut.strip("._")  # Windows drops a dot at the end


def csv_text(text: str) -> str:
    """`text` as a table cell that no spreadsheet takes for a formula: one that begins like one gets a `'` in front."""
    text = printable(text)
    return f"'{text}" if text[:1] in _FORMULA and text else text


def unique_names(names: Sequence[str]) -> list[str]:
    """Names that are all different and not empty, as `datasets.ClassLabel` demands.

    A name that is empty becomes its number; of equal names the later ones get their number: `cat`, `cat (7)`.
    """
    taken = set(names)
    found: dict[str, int] = {}
    for number, name in enumerate(names):
        new = name or str(number)
        if new in found or (new != name and new in taken):
            new = f"{new} ({number})"
            while new in found or new in taken:
                new += "'"
        found[new] = number
    return list(found)
