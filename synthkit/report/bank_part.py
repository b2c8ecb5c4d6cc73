"""The part of a report on a bank."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from synthkit.bank.card import method_of
from synthkit.errors import BankError
from synthkit.report.grid import grid_png
from synthkit.report.markup import Markup, badge, clean, details, el, facts, join, table
from synthkit.report.numbers import LARGEST, Figure, number, short
from synthkit.report.parts import (
    Part,
    charts,
    environment,
    line,
    percent,
    same_order,
    settings,
    text,
    tiles,
    warning_lines,
    where_badge,
)
from synthkit.report.sources import BankSource
from synthkit.report.svg import Band, Level, Line, heat_map, line_chart
from synthkit.runtime import format_bytes, format_seconds
from synthkit.synthesis.curriculum import adversarial_weight

PICTURE_BYTES = 1_250_000  # as base64 this leaves a report of one bank below 2 MB
MOST_BINS = 60
HEAT_CLASSES = 30
_GENERATOR_COLOURS = {"g_loss": 4, "g_adversarial": 3, "g_one_hot": 0, "g_entropy": 2, "g_bn": 1}
_DRAWN = {"epoch", "step", "lr", "kd", "agreement", "class_balance", "test_top1", "test_agreement", "test_n", "seconds"}


def bank_part(source: BankSource, *, per_class: int = 10, max_classes: int = 20) -> Part:
    """Header, table, picture, charts and recipe of a bank.

    Raises:
        BankError: a shard is damaged. UsageError: a number is out of range.
    """
    student, teacher, measured = _student(source)
    retention = Figure(student.mean / teacher.mean) if student and teacher and teacher.mean > 0 else None
    info = source.info
    seconds = number(source.run.get("seconds")) or number(info.get("seconds"))
    part = Part(
        title=source.path.resolve().name or "bank", kind="bank", verdict=verdict(source, student, teacher),
        body=[], warnings=_warnings(source), badges=_badges(source), student=student, teacher=teacher,
        retention=retention, path=clean(source.path),
    )  # fmt: skip
    part.body = [
        tiles([
            ("images", f"{info['images']:,}"),
            ("class balance (1 is even)", short(info["balance"]) if info["balance"] is not None else None),
            ("top-1 of the co-trained student", percent(student.mean) if student else None),
            ("of the teacher's top-1 kept", percent(retention.mean) if retention else None),
            ("time to make it", format_seconds(seconds) if seconds else None),
            ("on disk", format_bytes(info["bytes"])),
        ]),
        _scores(source, student, teacher, retention, measured),
        _picture(source, per_class, max_classes),
        charts("Curriculum", [_difficulty(source), _balance_map(source), _ramp(source), _balance(source)]),
        charts("Making the images", _training(source, teacher)),
        _facts(source),
        settings("Recipe (bank.json)", source.bank.spec.recipe),
        settings("Settings of the run (run.json)", _settings(source)),
        environment(source.run, {"versions": info["versions"], "hardware": info["hardware"]}),
    ]  # fmt: skip
    return part


def _student(source: BankSource) -> tuple[Figure | None, Figure | None, dict[str, Any]]:
    """The co-trained student's and the teacher's top-1 on real test data, and all that was measured there."""
    found = source.run.get("student")
    if not isinstance(found, dict):  # not finished: what the log measured last
        found = next((r for r in reversed(source.metrics) if "test_top1" in r), {})
    return Figure.of(found.get("test_top1")), Figure.of(found.get("teacher_top1")), found


def verdict(source: BankSource, student: Figure | None, teacher: Figure | None) -> str:
    """One or two sentences: what it is, from what, and how good the student trained along with it is."""
    info, spec = source.info, source.bank.spec
    size = " x ".join(str(v) for v in spec.shape)
    who = text(spec.teacher.get("name") or spec.teacher.get("arch"))
    words = f"{info['images']:,} images ({size}) of {spec.num_classes} classes, made by {clean(method_of(spec), 60)}"
    words += f" from the teacher {who}. " if who else ". "
    words += info["origin"]
    if student is not None:
        words += f" The student trained along with it reaches {student.percent()} top-1 on real test data"
        words += f", the teacher {teacher.percent()}." if teacher else "."
    return words


def _badges(source: BankSource) -> list[Markup]:
    spec = source.bank.spec
    found = [badge("contains real images", "real") if spec.contains_real
             else badge("no image is a real one", "synthetic"),
             badge("real data was used" if spec.real_data_used or spec.contains_real else "no real data was used",
                   "real" if spec.real_data_used or spec.contains_real else "synthetic")]  # fmt: skip
    state = "sealed" if source.info["sealed"] else "complete" if source.info["complete"] else "unfinished"
    return [*found, badge(state, "plain")]


def _warnings(source: BankSource) -> list[str]:
    info, found = source.info, []
    if not info["complete"]:
        found.append(f"unfinished: {info['shards']} of {info['shards_planned']} shards are there; go on with --resume")
    counts = info["label_histogram"]
    if counts:
        names = source.bank.class_names
        absent = [clean(names[i], 40) for i, count in enumerate(counts) if not count]
        if absent:
            shown = ", ".join(absent[:12]) + (", …" if len(absent) > 12 else "")
            found.append(f"{len(absent)} of {len(names)} classes have no image: {shown}")
        if info["balance"] is not None and info["balance"] < 0.9:
            top = int(np.argmax(counts))
            share = counts[top] / sum(counts)
            found.append(f"the classes are uneven (balance {info['balance']:.2f} of 1); "
                         f"{100 * share:.0f} % of the images are {clean(names[top], 40)}")  # fmt: skip
    return same_order(found + warning_lines(source.run.get("warnings")) + source.notes)


def _scores(
    source: BankSource, student: Figure | None, teacher: Figure | None, retention: Figure | None,
    measured: dict[str, Any],
) -> Markup | None:  # fmt: skip
    """Teacher and co-trained student; every row with the data that it was measured on."""
    rows: list[list[object]] = []
    if student is not None:
        ours = el("span", student.percent(), class_="lead")
        rows.append(["top-1", teacher.percent() if teacher else "", ours, where_badge(True)])
    if retention is not None:
        rows.append(["retention (student / teacher)", "", retention.percent(), where_badge(True)])
    agreement = percent(measured.get("test_agreement"))
    if agreement is not None:
        rows.append(["agreement with the teacher", "", agreement, where_badge(True)])
    card = source.info["teacher"].get("accuracy")
    for name, value in card.items() if isinstance(card, dict) else [("", card)]:
        share = percent(value)
        if share is not None:
            rows.append([f"top-1 {clean(name, 60)}".strip(), share, "", badge("claimed by its card", "plain")])
    own, confidence = percent(source.info["teacher_agreement"]), percent(source.info["mean_confidence"])
    if own is not None:
        rows.append(["the teacher's argmax is the label", own, "", where_badge(False)])
    if confidence is not None:
        rows.append(["the teacher's mean confidence", confidence, "", where_badge(False)])
    if not rows:
        return None
    config = source.run.get("config")
    data = text(config.get("eval_data")) if isinstance(config, dict) else None
    n = number(measured.get("test_n"))
    note = None
    if student is not None:
        note = (
            f"Real test data: {data or 'labelled images'}{f', {int(n):,} images' if n else ''}. The co-trained student "
            "is a by-product of making the images (one run, no control); synthkit distill measures one that is "
            "trained from the finished bank."
        )
    shown = slice(1, 3 if student is not None else 2)
    head = ["", *["teacher", "co-trained student"][: 2 if student is not None else 1]]
    cells = [[join([row[0], row[3]]), *row[shown]] for row in rows]
    return el("div", el("h3", "Results"), table(head, cells), el("p", note, class_="soft") if note else None)


def _picture(source: BankSource, per_class: int, max_classes: int) -> Markup | None:
    """The class grid; fewer images are shown where the picture would be too large for a page."""
    bank = source.bank
    if not len(bank):
        return None
    if bank.has("labels"):
        labels = bank.column("labels")
        if labels.min() < 0 or labels.max() >= bank.num_classes:
            hint = f"see: synthkit bank verify --deep {bank.path}"
            raise BankError(f"{bank.path}: labels lie outside the classes", got=f"{labels.min()} to {labels.max()}",
                            hint=hint)  # fmt: skip
    picture, columns, rows = b"", per_class, max_classes
    for most in ((100, 100), (10, 10), (8, 8), (5, 6), (4, 4)):
        columns, rows = min(per_class, most[0]), min(max_classes, most[1])
        picture = grid_png(bank, columns, max_classes=rows)
        if len(picture) <= PICTURE_BYTES:
            break
    order = "by the difficulty stored with them" if bank.has("difficulty") else "by the step that made them"
    if not bank.has("difficulty") and not bank.has("origin_step"):
        order = "in stored order (the bank records no difficulty)"
    labelled = bank.has("labels") and bank.spec.label_kind != "none"
    shown = f"{min(rows, bank.num_classes)} of {bank.num_classes} classes" if bank.num_classes > rows else "every class"
    said = f"{shown if labelled else 'All images'}, up to {columns} images each, {order}"
    said += ": easy on the left, hard on the right. " if bank.has("difficulty") else ": first on the left. "
    said = said[0].upper() + said[1:] + _labels(bank.spec.label_kind) + " " + source.info["origin"]
    code = "data:image/png;base64," + base64.b64encode(picture).decode()
    width = int.from_bytes(picture[16:20], "big")  # of the PNG header; the page does not blow the picture up
    says = f"Images of the bank, one row per class. {source.info['origin']}"
    image = el("img", src=code, alt=says, style=f"max-width:{max(width, 560)}px")
    figure = el("figure", el("div", image, class_="scroll"), el("figcaption", el("p", said)), class_="picture")
    return el("div", el("h3", "Images, easy to hard"), figure)


def _labels(kind: str) -> str:
    return {
        "argmax": "A row is what the teacher says the image is.",
        "target": "A row is the class that was asked for.",
        "real": "A row is the label of the real data.",
    }.get(kind, "The images carry no labels.")


def _difficulty(source: BankSource) -> Markup | None:
    """Mean and quantiles of the stored difficulty over the steps that made the images (else over stored order)."""
    bank = source.bank
    if not len(bank) or not bank.has("difficulty"):
        return None
    values = bank.column("difficulty").astype(np.float64)
    by_step = bank.has("origin_step")
    place = bank.column("origin_step").astype(np.float64) if by_step else np.arange(len(bank), dtype=np.float64)
    usable = np.abs(values) < LARGEST  # false for NaN too: a stranger's bank is not checked deeply here
    place, values = place[usable], values[usable]
    if not len(values):
        return None
    x, quantiles, mean = binned(place, values)
    low, first, median, third, high = quantiles
    return line_chart(
        "Difficulty over the curriculum",
        [Line("mean", x, mean, 0), Line("median", x, median, 2, dashed=True)],
        bands=[Band("10 to 90 %", x, low, high, 0), Band("25 to 75 %", x, first, third, 0)],
        x_label="step that made the image" if by_step else "image, in stored order",
        note="As stored with each image; higher is harder for the student of that moment.",
    )


def binned(place: np.ndarray, values: np.ndarray) -> tuple[list[float], list[list[float]], list[float]]:
    """Mean and the 10, 25, 50, 75, 90 % quantiles of `values` at each place, or in bins where there are many places.

    Returns:
        (places, five lists of quantiles, means); bins hold equal counts of images, up to ties.
    """
    order = np.argsort(place, kind="stable")
    place, values = place[order], values[order]
    starts = np.flatnonzero(np.r_[True, np.diff(place) > 0])
    if len(starts) > MOST_BINS:
        wanted = np.linspace(0, len(place), MOST_BINS, endpoint=False)
        starts = np.unique(starts[np.searchsorted(starts, wanted, side="right") - 1])
    groups = np.split(values, starts[1:])
    x = [float(np.mean(part)) for part in np.split(place, starts[1:])]
    quantiles = np.array([np.quantile(group, (0.1, 0.25, 0.5, 0.75, 0.9)) for group in groups]).T.tolist()
    return x, quantiles, [float(group.mean()) for group in groups]


def _shard_counts(source: BankSource) -> np.ndarray | None:
    """(parts, K) label counts; neighbouring shards of a large bank are taken together."""
    rows = [s.raw.get("label_histogram") for s in source.bank.sidecars]
    if not rows or any(row is None for row in rows) or source.bank.num_classes > HEAT_CLASSES:
        return None
    counts = np.array(rows, dtype=np.int64)
    if len(counts) > MOST_BINS:
        cuts = np.linspace(0, len(counts), MOST_BINS, endpoint=False).astype(int)
        counts = np.add.reduceat(counts, cuts, axis=0)
    return counts


def _balance_map(source: BankSource) -> Markup | None:
    counts = _shard_counts(source)
    if counts is None or len(counts) < 2:
        return None
    together = "parts of neighbouring shards" if len(source.bank.sidecars) > MOST_BINS else "shards"
    label = "part of the bank" if len(source.bank.sidecars) > MOST_BINS else "shard"
    note = f"Images of each class in the {together}, in the order they were made, against an even share."
    return heat_map("Classes over the bank", source.bank.class_names, counts, x_label=label, note=note)


def _balance(source: BankSource) -> Markup | None:
    return line_chart("Class balance while making", [line(source.metrics, "class_balance", "class balance", 0)],
                      x_label="step", zero=True, levels=[Level("even", 1.0)],
                      note="Entropy of the teacher's classes in an epoch; 1 is even, 0 a single class.")  # fmt: skip


def _adversarial(source: BankSource) -> Line | None:
    """The weight of the adversarial term: as logged, else as the recipe's ramp gives it for each logged epoch."""
    for key in ("adv_weight", "adversarial_weight"):
        if any(key in r for r in source.metrics):
            return line(source.metrics, key, "weight", 3)
    recipe = source.bank.spec.recipe
    method = recipe.get("method")
    if not isinstance(method, dict):
        return None
    found = [number(method.get(key)) for key in ("epochs", "adv", "grad_adv", "begin", "end")]
    if any(v is None for v in found):
        return None
    epochs, start, growth, begin, end = (min(1e9, max(-1e9, v)) for v in found if v is not None)
    if recipe.get("curriculum") in ("weights-only", "none"):
        growth = 0.0
    records = [r for r in source.metrics if "epoch" in r and "step" in r]
    values = [adversarial_weight(int(r["epoch"]), int(epochs), start, growth, begin, end) for r in records]
    return Line("weight, from the recipe", [r["step"] for r in records], values, 3)


def _ramp(source: BankSource) -> Markup | None:
    weight = _adversarial(source)
    return line_chart("Adversarial weight", [weight] if weight else [], x_label="step", zero=True,
                      note="How strongly the generator is asked for what the student does not know yet.")  # fmt: skip


def _training(source: BankSource, teacher: Figure | None) -> list[Markup | None]:
    log = source.metrics
    terms = sorted({key for r in log for key in r if key.startswith("g_")}, key=lambda k: (k == "g_loss", k))
    spare = [i for i in range(8) if i not in _GENERATOR_COLOURS.values()]
    lines = []
    for term in terms[:8]:
        colour = _GENERATOR_COLOURS.get(term) if term in _GENERATOR_COLOURS else spare.pop(0) if spare else 4
        name = "sum" if term == "g_loss" else term.removeprefix("g_").replace("_", " ")
        lines.append(line(log, term, name, colour or 0, dashed=term == "g_loss"))
    levels = [Level("teacher", teacher.mean)] if teacher else []
    agree = [line(log, "agreement", "on synthetic images", 2), line(log, "test_agreement", "on real test data", 7)]
    top1 = [line(log, "test_top1", "student", 0)]
    found = [
        line_chart("Distillation loss of the student", [line(log, "kd", "KD loss", 0)], x_label="step", zero=True,
                   note="On the generator's images of each epoch."),
        line_chart("Terms of the generator's loss", lines, x_label="step",
                   note="With their weights; mean of each epoch."),
        line_chart("Agreement of student and teacher", agree, x_label="step", percent=True),
        line_chart("Co-trained student, top-1 on real test data", top1, x_label="step", percent=True, levels=levels,
                   note="Only looked at: nothing is chosen by it."),
        line_chart("Learning rate of the student", [line(log, "lr", "learning rate", 4)], x_label="step", zero=True),
    ]  # fmt: skip
    return found + _others(source, {*terms, *_DRAWN, "adv_weight", "adversarial_weight"})


def _others(source: BankSource, drawn: set[str]) -> list[Markup | None]:
    """Whatever else a method logs, a chart each."""
    keys: Sequence[str] = list(dict.fromkeys(k for r in source.metrics for k in r if k not in drawn))[:12]
    return [line_chart(clean(key, 60), [line(source.metrics, key, clean(key, 60), 0)], x_label="step") for key in keys]


def _settings(source: BankSource) -> dict[str, Any]:
    """run.json's configuration without what the recipe says already."""
    config = source.run.get("config")
    if not isinstance(config, dict):
        return {}
    return {k: v for k, v in config.items() if k not in ("method", "curriculum", "resume")}


def _facts(source: BankSource) -> Markup | None:
    info, spec = source.info, source.bank.spec
    teacher = info["teacher"]
    span = info["difficulty_range"]
    listed = facts([
        ("images", f"{info['images']:,}" + (f" of {info['images_planned']:,}" if not info["complete"] else "")),
        ("shape", " x ".join(str(v) for v in spec.shape)),
        ("shards", f"{info['shards']} of {info['shards_planned']}"),
        ("columns", ", ".join(info["columns"])),
        ("labels", _labels(spec.label_kind)),
        ("difficulty", f"{short(span[0])} to {short(span[1])}" if span else None),
        ("steps", f"{int(info['step_range'][0]):,} to {int(info['step_range'][1]):,}" if info["step_range"] else None),
        ("generator snapshots", info["generators"] or None),
        ("real data used", "yes" if info["real_data_used"] else "no"),
        ("contains real pixels", "yes" if info["contains_real"] else "no"),
        ("teacher", text(teacher.get("spec") or teacher.get("name") or teacher.get("arch"))),
        ("teacher sha256", text(teacher.get("sha256"))),
        ("teacher licence", text(teacher.get("licence"))),
        ("made from the banks", ", ".join(_parent(p) for p in info["parents"][:10]) or None),
        ("seed", str(info["seed"])), ("created", text(info["created"])), ("uuid", info["uuid"]),
        ("recipe hash", text(info["recipe_hash"])), ("root hash", text(info["root"])),
    ])  # fmt: skip
    return details("The bank", listed) if listed else None


def _parent(parent: object) -> str:
    """Name of a bank that this one was made from, with the beginning of its root; a stranger may have written it."""
    if not isinstance(parent, dict):
        return clean(parent, 80)
    name, root = parent.get("name") or parent.get("uuid") or "unnamed", str(parent.get("root") or "")
    return clean(f"{name} (root {root[:12]})" if root else name, 80)
