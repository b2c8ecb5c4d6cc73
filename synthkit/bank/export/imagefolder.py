"""One PNG per image in one folder per class, as torchvision's ImageFolder reads it, and labels.csv."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from synthkit.bank.export.base import FILE_BLOCK, Format, worked
from synthkit.bank.export.names import csv_text, folder_names
from synthkit.bank.export.png import LEVEL, Piece, check_png, encode_png, png_bytes, png_pieces, png_workers

UNLABELLED = "unlabelled"
_FACTS = ("difficulty", "origin_step", "origin_seed")


@dataclass(frozen=True, kw_only=True)
class ImageFolderOptions:
    """How the folder is written."""

    logits: Literal["all", "none"] = "all"
    """Whether labels.csv holds the logits: one column per class (or the top-k columns of the bank), in the shortest
    digits that give back the same float16."""
    compress_level: int = LEVEL
    """zlib level of the PNGs, 0 to 9; they are lossless at any."""


class ImageFolder(Format):
    """`000_airplane/000123.png`: the number in front makes the sorted class order the label order.

    A class without images keeps its (empty) folder, or all later labels would shift; torchvision then needs
    `allow_empty=True`. Images of a bank without labels lie in one folder, `unlabelled`.
    """

    Options = ImageFolderOptions
    hub_files = "*/*.png"
    carries = (
        "images", "labels", "logits", "difficulty", "origin_step", "origin_seed", "topk_index", "topk_logit",
        "tail_logsumexp",
    )  # fmt: skip

    @property
    def columns(self) -> list[str]:
        """Columns that this export holds."""
        scores = ("logits", "topk_index", "topk_logit", "tail_logsumexp")
        return [c for c in super().columns if self.options.logits == "all" or c not in scores]

    @property
    def file_count(self) -> int:
        """Files and folders that are made."""
        return self.source.count + self.source.spec.num_classes + 8

    def check(self) -> None:
        """See `Format.check`."""
        self.notes += check_png(self.source, self.options.compress_level, "imagefolder", "webdataset or mds with raw")
        counts = self.source.class_counts()
        if self.source.spec.shape[0] == 1:
            self.notes.append("the PNGs are grey; torchvision's default loader makes three equal channels of one")
        if counts is None:
            self.notes.append(f"the bank has no labels: all images are in the folder {UNLABELLED}")
        elif 0 in counts:
            empty = [i for i, n in enumerate(counts) if not n]
            shown = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
            what = f"no image has label {shown}: the folder stays, empty, so that the label numbers hold"
            self.notes.append(f"{what}; read with ImageFolder(DIR, allow_empty=True)")
            self.notes.append("Hugging Face's imagefolder forgets empty classes, its labels shift: use parquet there")

    def estimate(self) -> int:
        """See `Format.estimate`."""
        values = sum(int(np.prod(self.source.row_shape(c))) for c in self.columns if c != "images")
        row = 60 + 12 * values
        folders = self.source.spec.num_classes * FILE_BLOCK
        return png_bytes(self.source, self.options.compress_level, per_file=True) + self.source.count * row + folders

    def write(self, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
        """See `Format.write`."""
        source = self.source
        places = folder_names(source.names) if source.has("labels") else [UNLABELLED]
        for place in places:
            (folder / place).mkdir()
        cells = [csv_text(name) for name in source.names]
        width = max(6, len(str(source.count - 1)))
        work = functools.partial(_files, folder, places, cells, width, self.options.compress_level)
        with open(folder / "labels.csv", "w", encoding="utf-8", newline="") as table:
            csv.writer(table, lineterminator="\n").writerow(self._header())
            with worked(png_pieces(source, self.columns), work, png_workers(source, self.workers)) as results:
                for count, lines in results:
                    table.write(lines)
                    advance(count)
        return {"table": "labels.csv", "folders": places}

    def _header(self) -> list[str]:
        names, source = ["file", "index"], self.source
        names += ["label", "class"] if "labels" in self.columns else []
        names += [c for c in _FACTS if c in self.columns]
        names += ["argmax"] if {"logits", "topk_logit"} & set(self.columns) else []
        names += [f"logit_{i}" for i in range(source.spec.num_classes)] if "logits" in self.columns else []
        if "topk_logit" in self.columns:
            names += [f"top{i + 1}_{what}" for i in range(source.top_k or 0) for what in ("class", "logit")]
            names.append("tail_logsumexp")
        return names

    def usage(self) -> str:
        """See `Format.usage`."""
        empty = 0 in (self.source.class_counts() or [])
        return (
            "from torchvision.datasets import ImageFolder\n\n"
            f'data = ImageFolder("DIR"{", allow_empty=True" if empty else ""})  # labels are the class numbers\n'
            "# logits and difficulty of every file are in DIR/labels.csv"
        )


def _files(folder: Path, places: list[str], cells: list[str], width: int, level: int, piece: Piece) -> tuple[int, str]:
    """Write the PNGs of one piece; returns its number of rows and its lines of labels.csv."""
    first, rows = piece
    labels = rows.get("labels")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = _values(rows)
    for i, image in enumerate(rows["images"]):
        label = 0 if labels is None else int(labels[i])
        name = f"{places[label]}/{first + i:0{width}d}.png"
        with open(folder / name, "xb") as stream:
            stream.write(encode_png(image, level))
        known = [] if labels is None else [label, cells[label]]
        table.writerow([name, first + i, *known, *(value for column in columns for value in column[i])])
    return len(rows["images"]), text.getvalue()


def _values(rows: dict[str, np.ndarray]) -> list[list[list[Any]]]:
    """The numbers behind the label, column group by column group, as texts per row."""
    groups: list[list[list[Any]]] = []
    groups += [_texts(rows[column][:, None]) for column in _FACTS if column in rows]
    if "logits" in rows:
        groups.append([[int(i)] for i in rows["logits"].argmax(axis=1)])
    elif "topk_logit" in rows:
        best = rows["topk_logit"].argmax(axis=1)[:, None]
        groups.append(np.take_along_axis(rows["topk_index"], best, axis=1).tolist())
    if "logits" in rows:
        groups.append(_texts(rows["logits"]))
    if "topk_logit" in rows:
        pairs = zip(rows["topk_index"].tolist(), _texts(rows["topk_logit"]), strict=True)
        groups.append([[v for pair in zip(*row, strict=True) for v in pair] for row in pairs])
        groups.append(_texts(rows["tail_logsumexp"][:, None]))
    return groups


@functools.cache
def _halves() -> np.ndarray:
    """The shortest text of each of the 65,536 float16 values, by its bits."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype("U16").astype(object)


def _texts(values: np.ndarray) -> list[list[str]]:
    """(N, k) numbers as texts: of floats the shortest that read back as the same float16 or float32."""
    if values.dtype == np.float16:
        return _halves()[values.view(np.uint16)].tolist()
    return values.astype("U32").tolist()
