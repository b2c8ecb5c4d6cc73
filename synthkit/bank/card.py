"""README.md of a bank: what is in it and where it comes from, for people. Everything from outside is escaped."""

from __future__ import annotations

import html
import re
from typing import Any

from synthkit.bank.shard import Sidecar
from synthkit.bank.spec import BankSpec

_LABELS = {
    "argmax": "the teacher's argmax",
    "target": "the class that was asked for",
    "real": "labels of real data",
    "none": "none",
}


def escape(value: object) -> str:
    """`value` as one line of Markdown text: no markup, links, HTML or table breaks come through."""
    text = re.sub(r"\s+", " ", "".join(c for c in str(value) if c.isprintable() or c.isspace()))[:300]
    return re.sub(r"([\\`*_\[\]!|~#])", r"\\\1", html.escape(text, quote=False))


def origin_line(spec: BankSpec) -> str:
    """One plain sentence on real data in this bank."""
    if spec.contains_real:
        return "Contains real pixels: the images are, or start from, real images."
    if spec.real_data_used:
        return "Real data was used in making it; no image is a real one."
    return "Made without any real data."


def method_of(spec: BankSpec) -> str:
    """Name of the method that made the images; the recipe holds it plainly or as the name of the method's section."""
    method = spec.recipe.get("method")
    name = method.get("name") if isinstance(method, dict) else method
    return name if isinstance(name, str) else "not recorded"


def render(spec: BankSpec, record: dict[str, Any], sidecars: list[Sidecar], root: str) -> str:
    """The Markdown text of the card."""
    columns = sorted(set.intersection(*(set(s.datasets) for s in sidecars))) if sidecars else []
    channels, height, width = spec.shape
    teacher = spec.teacher
    rows = {
        "images": f"{spec.images:,}, uint8, {channels} x {height} x {width}",
        "classes": spec.num_classes,
        "labels": _LABELS[spec.label_kind],
        "columns": ", ".join(columns),
        "method": method_of(spec),
        "teacher": teacher.get("name") or teacher.get("arch") or "none",
        "teacher sha256": teacher.get("sha256") or "not recorded",
        "teacher accuracy": teacher.get("accuracy") or "not recorded",
        "teacher licence": teacher.get("licence") or "not recorded",
        "seed": spec.seed,
        "shards": f"{spec.shards}, {sum(s.bytes for s in sidecars) / 1e6:,.1f} MB",
        "created": record.get("created"),
        "synthkit": (record.get("versions") or {}).get("synthkit"),
        "recipe hash": record.get("recipe_hash"),
        "root hash": root,
    }
    lines = [
        "# A bank of synthetic images" if not spec.contains_real else "# A bank of images", "",
        f"**{origin_line(spec)}**", "", "| | |", "|---|---|",
        *(f"| {escape(k)} | {escape(v)} |" for k, v in rows.items()), "",
    ]  # fmt: skip
    if spec.class_names:
        shown = ", ".join(escape(n) for n in spec.class_names[:50])
        lines += [f"Classes: {shown}{', ...' if spec.num_classes > 50 else ''}", ""]
    lines += [
        "```", "synthkit bank info DIR        # what is in it", "synthkit bank verify DIR      # whether it is whole",
        "synthkit distill --bank DIR --student NAME", "```", "",
        "The recipe is in `bank.json`; shards are HDF5 files with contiguous datasets, each with a JSON record.", "",
    ]  # fmt: skip
    return "\n".join(lines)
