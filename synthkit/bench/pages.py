"""The long tables of `assets/results/` as Markdown, from the JSON files beside them.

`python -m synthkit.bench.pages` writes `losses.md` (`synthkit bench losses`) and `dfkd.md` (`synthkit bench dfkd`)
again; a test compares them with the files.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from synthkit import tables
from synthkit.bench.losses_plan import UNEVEN
from synthkit.paths import assets_dir

LOSSES = {"losses_mnist_synthetic.json": "synthetic", "losses_cifar10_real.json": "real",
         "losses_cifar10_real_56.json": "real, larger"}  # fmt: skip


def losses(folder: Path) -> str:
    """The tables of losses that lie in `folder`."""
    parts = ["# Distillation losses, measured", "", INTRODUCTION, ""]
    for name, title in LOSSES.items():
        if (folder / name).is_file():
            parts += section(json.loads((folder / name).read_text()), title, name)
    return "\n".join(parts).rstrip() + "\n"


INTRODUCTION = (
    "Written by `python -m synthkit.bench.pages` from the JSON beside it. Top-1 on test images, last epoch, mean "
    "± std over seeds. `above KD` is the mean difference to the row `kd` over the same seeds ± its standard error. "
    "`pull` is the norm of a method's gradient on the student's weights at the first step, in units of the plain row's "
    "(`ce` or `kd`, whichever stands beside the methods). Weights are the published ones, but for rows `..._even`, "
    "where a method begins with pull 1; warm-ups and initial phases take one epoch. These are minutes of two CPU "
    "cores, not the published 240 epochs: a loss that needs a long schedule is not judged here."
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
        "| row | loss | top-1 | above KD | pull | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [*(_line(key, row) for key, row in rows), ""]
    found = shortfalls(table)
    if found:
        plain = table["beside"]
        lines += [f"Below plain `{plain}` by more than the seeds explain, and why:", ""]
        lines += [*(f"- `{name}`: {why}." for name, why in found.items()), ""]
    return lines


ALONE = 0.03  # of one seed: twice the median spread of the paired differences in losses_cifar10_real.json
REASONS = {
    "ab": "its first epoch, of a few, sees neither labels nor the teacher's outputs",
    "ce": "hard labels alone",
    "crd": "a row of its memories is renewed once an epoch, so in a few epochs it contrasts with random vectors",
    "deit_lt": "takes the teacher's hard decision alone, not its distribution",
    "dot": "its momenta (0.975 and 0.825) make the teacher's part 4 times as fast and the labels' half as fast as in "
    "`ce_kd`",
    "ft": "its translator has to learn first; its pull was not measured",
    "gendd": "a reduced head, and a few hundred steps of it",
    "gkl": "squares the gaps of all pairs of logits (beta 16), so it pulls hardest where the student is far away",
    "js": "without labels, and bounded: it pulls the least where the student is most wrong",
    "kd_self_paced": "leaves out the hard samples of every batch for half of a short run",
    "l1": "without labels, and its gradient has the same size however far the logits are",
    "lelp": "what is deployed learns sub-classes of the teacher's features, without labels",
    "logit_std": "leaves the scale of the logits free",
    "mealv2": "no labels but the mean of two teachers",
    "nd": "lengthens the features towards the teacher's class means, with a rate for 240 epochs",
    "random_teacher": "the control, whose teacher knows nothing",
    "simkd": "learns the teacher's last map alone; labels and outputs play no part",
    "soft_ce": "at temperature 1 the wrong classes hardly count",
}


def shortfalls(table: dict[str, Any]) -> dict[str, str]:
    """Rows that are worse than the plain one by more than twice the standard error of the paired difference (of one
    seed: by more than `ALONE`), or that failed, and what is known about it."""
    rows = table["rows"]
    plain, found = rows[table["beside"]]["top1"], {}
    for name, row in rows.items():
        if name.startswith("control_") or name.endswith("_even") or not _falls(row, plain):
            continue
        even = rows.get(f"{name}_even")
        said = [REASONS[name]] if name in REASONS else []
        if even is not None:
            said.append(_evenly(row, even, plain))
        elif row.get("pull", 1.0) > UNEVEN:
            said.append(f"begins {row['pull']:.2g} times as hard as plain training")
        found[name] = "; ".join(said)
    return found


def _falls(row: dict[str, Any], plain: dict[str, Any]) -> bool:
    if row["top1"] is None:
        return "not finite" in row["failed"]
    gaps = [a - b for a, b in zip(row["top1"]["values"], plain["values"], strict=True)]
    margin = 2 * statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else ALONE
    return statistics.fmean(gaps) < -margin


def _evenly(row: dict[str, Any], even: dict[str, Any], plain: dict[str, Any]) -> str:
    """What the weight explains."""
    how = f"begins {row['pull']:.2g} times as hard as plain training"
    if even["top1"] is None:
        return f"{how}, and fails with a weight that begins even (`{even['loss']}`) too"
    short = " (still below)" if _falls(even, plain) else ""
    return f"{how}; with a weight that begins even (`{even['loss']}`) it has {_percent(even['top1']['mean'])}{short}"


def _heading(table: dict[str, Any], title: str) -> str:
    teacher = Path(table["teacher"]).stem
    kind = "a synthetic bank, the teacher's argmax as labels" if table["beside"] == "kd" else "labelled real images"
    return f"{teacher} to {table['student']} on {kind}" + ("" if title != "real, larger" else " (larger pair)")


def _images(table: dict[str, Any]) -> str:
    return f"{table['images']:,} images" if table.get("images") else "images"


def _line(name: str, row: dict[str, Any]) -> str:
    if row["top1"] is None:
        reason = row["failed"].split("; ")[0].removeprefix("seed 0: ")
        return f"| `{name}` | `{row['loss']}` | – | {reason} | {_pull(row)} | |"
    top1, gap = row["top1"], row.get("above_kd")
    shown = _percent(top1["mean"]) + (f" ± {_percent(top1['std'])}" if top1["n"] > 1 else "")
    above = ""
    if gap is not None and name != "kd":
        above = f"{100 * gap['mean']:+.2f}" + (f" ± {_percent(gap['stderr'])}" if gap["n"] > 1 else "")
    plain = f" (its own classifier: {_percent(row['plain_top1']['mean'])})" if "plain_top1" in row else ""
    options = ", ".join(f"{k} {v}" for k, v in {**row["options"], **row["config"]}.items())
    how = f"`{row['loss']}`" + (f", {options}" if options else "")
    return f"| `{name}` | {how} | {shown}{plain} | {above} | {_pull(row)} | {row['cpu_seconds']:.0f} |"


def _pull(row: dict[str, Any]) -> str:
    return f"{row['pull']:.2g}" if row.get("pull") else ""


def _mean(row: dict[str, Any]) -> float:
    return -1.0 if row["top1"] is None else row["top1"]["mean"]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def unknown_rows(table: dict[str, Any]) -> set[str]:
    """Losses of the table of losses that a measured table lacks."""
    return set(tables.LOSSES) - set(table["rows"])


# --- the data-free family ---------------------------------------------------------------------------------------------

COLUMNS = {"mnist_bn": "LeNet-5-BN to half", "mnist": "LeNet-5 to half", "cifar10": "ResNet-20 to 8"}
ENDS = {"real": "real images, KD", "real_labels": "real images, labels alone", "noise": "noise"}
PAIRS = {"ResNet-34 -> ResNet-18": "C10 r34", "WRN-40-2 -> WRN-16-1": "C10 wrn"}


def pairs_of(folder: Path) -> dict[str, Any]:
    """Every measured pair, from whichever file it lies in."""
    found: dict[str, Any] = {}
    for name in ("dfkd.json", "dfkd_cifar10.json"):
        if (folder / name).is_file():
            found |= json.loads((folder / name).read_text())["pairs"]
    return found


def dfkd(folder: Path) -> str:
    """All methods of the data-free family, the best of the first column first."""
    pairs = pairs_of(folder)
    published = json.loads((folder / "dfkd.json").read_text())["published"]
    budgets = [f"{COLUMNS[name]}, {table['budget_cpu_seconds']:.0f} s" for name, table in pairs.items()]
    lines = ["# The data-free family, measured", "", DFKD_INTRODUCTION, ""]
    lines += [f"| method | {budgets[0]} | fresh student of its bank | {' | '.join(budgets[1:])} | published |"]
    lines += ["|" + "---|" * (len(budgets) + 3)]
    rows = {name: {row["method"]: row for row in table["rows"]} for name, table in pairs.items()}
    first = rows["mnist_bn"]
    for method in sorted(first, key=lambda m: -first[m]["top1"]["mean"]):
        fresh = first[method]["fresh_student"]
        cells = [_cell(rows[name].get(method)) for name in pairs]
        cells.insert(1, _percent(fresh["top1"]) if fresh else "–")
        lines.append(f"| `{method}` | {' | '.join(cells)} | {_published(published, method)} |")
    for end, text in ENDS.items():
        cells = [_cell(table["ends"].get(end)) for table in pairs.values()]
        cells.insert(1, "")
        lines.append(f"| control: {text} | {' | '.join(cells)} | {_published(published, end)} |")
    teachers = ", ".join(f"{COLUMNS[n]} {_percent(t['teacher']['top1'])}" for n, t in pairs.items())
    return "\n".join([*lines, "", f"Teachers: {teachers}."]) + "\n"


DFKD_INTRODUCTION = (
    "Written by `python -m synthkit.bench.pages` from `dfkd.json` and `dfkd_cifar10.json`. Top-1 on test images of the "
    "co-trained student at its last epoch, mean ± std over seeds; every run of a column takes the same CPU seconds of "
    "one thread. `published` is what others report for their networks and schedules, mostly the best epoch (C10 r34: "
    "ResNet-34 to 18, wrn: WRN-40-2 to 16-1; sources in the JSON). On CIFAR-10 the budget is a few hundred steps: what "
    "stands near 10 has not begun to learn."
)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    top1 = row["top1"]
    return _percent(top1["mean"]) + (f" ± {_percent(top1['std'])}" if top1["n"] > 1 else "")


def _published(entries: list[dict[str, Any]], method: str) -> str:
    own = [e for e in entries if e["method"] == method]
    return ", ".join(f"{e['top1']:.2f} {'MNIST' if e['dataset'] == 'mnist' else PAIRS[e['pair']]}" for e in own)


if __name__ == "__main__":
    results = assets_dir() / "results"
    for target, text in (("losses.md", losses(results)), ("dfkd.md", dfkd(results))):
        (results / target).write_text(text, encoding="utf-8")
        print(results / target)
