"""The page of the loss tables, `assets/results/losses.md`, from the JSON files of `synthkit bench losses`.

`python -m synthkit.bench.losses_page` writes it again; a test compares it with the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from synthkit import tables
from synthkit.paths import assets_dir

FILES = {"losses_mnist_synthetic.json": "synthetic", "losses_cifar10_real.json": "real",
         "losses_cifar10_real_56.json": "real, larger"}  # fmt: skip


def page(folder: Path) -> str:
    """The Markdown text of the tables that lie in `folder`."""
    parts = ["# Distillation losses, measured", "", INTRODUCTION, ""]
    for name, title in FILES.items():
        if (folder / name).is_file():
            parts += section(json.loads((folder / name).read_text()), title, name)
    return "\n".join(parts).rstrip() + "\n"


INTRODUCTION = (
    "Written by `python -m synthkit.bench.losses_page` from the JSON beside it. Top-1 on test images, last epoch, mean "
    "± std over seeds. `above KD` is the mean difference to the row `kd` over the same seeds ± its standard error. "
    "Weights are the published ones; warm-ups and initial phases take one epoch. These are minutes of two CPU cores, "
    "not the published 240 epochs: a loss that needs a long schedule is not judged here."
)


def section(table: dict[str, Any], title: str, name: str) -> list[str]:
    """One table as lines, the best first, losses that failed at the end."""
    rows = sorted(table["rows"].items(), key=lambda item: -_mean(item[1]))
    teacher = table["teacher_top1"]
    lines = [
        f"## {_heading(table, title)}",
        "",
        f"`{name}`: bank of {_images(table)}, {table['epochs']} epochs, protocol `{table['protocol']}`, precision "
        f"{table['precision']}; the teacher has {_percent(teacher)} %.",
        "",
        "| row | loss | top-1 | above KD | CPU s |",
        "|---|---|---|---|---|",
    ]
    return [*lines, *(_line(key, row) for key, row in rows), ""]


def _heading(table: dict[str, Any], title: str) -> str:
    teacher = Path(table["teacher"]).stem
    kind = "a synthetic bank, the teacher's argmax as labels" if table["beside"] == "kd" else "labelled real images"
    return f"{teacher} to {table['student']} on {kind}" + ("" if title != "real, larger" else " (larger pair)")


def _images(table: dict[str, Any]) -> str:
    return f"{table['images']:,} images" if table.get("images") else "images"


def _line(name: str, row: dict[str, Any]) -> str:
    if row["top1"] is None:
        return f"| `{name}` | `{row['loss']}` | – | {row['failed'].split('; ')[0].removeprefix('seed 0: ')} | |"
    top1, gap = row["top1"], row.get("above_kd")
    shown = _percent(top1["mean"]) + (f" ± {_percent(top1['std'])}" if top1["n"] > 1 else "")
    above = ""
    if gap is not None and name != "kd":
        above = f"{100 * gap['mean']:+.2f}" + (f" ± {_percent(gap['stderr'])}" if gap["n"] > 1 else "")
    plain = f" (its own classifier: {_percent(row['plain_top1']['mean'])})" if "plain_top1" in row else ""
    options = ", ".join(f"{k} {v}" for k, v in {**row["options"], **row["config"]}.items())
    how = f"`{row['loss']}`" + (f", {options}" if options else "")
    return f"| `{name}` | {how} | {shown}{plain} | {above} | {row['cpu_seconds']:.0f} |"


def _mean(row: dict[str, Any]) -> float:
    return -1.0 if row["top1"] is None else row["top1"]["mean"]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def unknown_rows(table: dict[str, Any]) -> set[str]:
    """Losses of the table of losses that a measured table lacks."""
    return set(tables.LOSSES) - set(table["rows"])


if __name__ == "__main__":
    target = assets_dir() / "results" / "losses.md"
    target.write_text(page(target.parent), encoding="utf-8")
    print(target)
