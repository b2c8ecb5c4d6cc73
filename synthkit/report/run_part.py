"""The part of a report on a distill or teach run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from synthkit.report.markup import Markup, clean, el, join, table
from synthkit.report.numbers import Figure, number
from synthkit.report.parts import (
    Part,
    charts,
    environment,
    line,
    same_order,
    settings,
    text,
    tiles,
    warning_lines,
    where_badge,
)
from synthkit.report.sources import Curve, RunSource
from synthkit.report.svg import Level, Line, bars, line_chart
from synthkit.runtime import format_seconds

CONTROL_COLOUR = 1
SEED_COLOURS = (0, 2, 7, 5, 6, 3)
MOST_CLASSES = 20

# key of a result, its name, whether it is a share, whether it is measured on real test data
_ROWS = (
    ("top1", "top-1", True, True),
    ("top5", "top-5", True, True),
    ("retention", "retention (student / teacher)", True, True),
    ("eval_agreement", "agreement with the teacher", True, True),
    ("eval_kl", "KL(teacher ‖ student), nats", False, True),
    ("ece", "calibration error (ECE)", False, True),
    ("nll", "negative log-likelihood, nats", False, True),
    ("holdout_agreement", "agreement, images held out", True, False),
    ("holdout_kl", "KL(teacher ‖ student), images held out", False, False),
)
_KINDS = {"distill": "distill run", "control": "control run", "teach": "teacher", "run": "run"}


def run_part(source: RunSource) -> Part:
    """Header, table, curves and recipe of a run."""
    numbers = {key: source.figure(key) for key, *_ in _ROWS}
    control = {key: Figure.of((source.control or {}).get(key)) for key, *_ in _ROWS}
    teacher = source.figure("teacher_top1")
    teacher = teacher.without_spread() if teacher else None
    part = Part(
        title=source.path.resolve().name or "run",
        kind=_KINDS[source.kind],
        verdict=verdict(source, numbers, control, teacher),
        body=[],
        warnings=_warnings(source, numbers, control, teacher),
        notes=same_order(note for record in source.members for note in warning_lines(record.get("notes"))),
        student=numbers["top1"],
        teacher=teacher,
        control=control["top1"],
        retention=numbers["retention"],
        path=clean(source.path),
    )
    seconds = source.figure("seconds")
    step = number(source.fact("step"))
    part.body = [
        tiles([
            ("student top-1, real test data" if source.kind != "teach" else "top-1, real test data",
             _percent(numbers["top1"])),
            ("of the teacher's top-1 kept", _percent(numbers["retention"])),
            ("agreement, held-out synthetic images", _percent(numbers["holdout_agreement"])),
            ("training steps", f"{int(step):,}" if step is not None else None),
            ("training time" + (" per seed" if len(source.results) > 1 else ""),
             format_seconds(seconds.mean) if seconds else None),
        ]),
        _scores(source, numbers, control, teacher),
        charts("Training", [*_curves(source, teacher), _per_class(source)]),
        _recipe(source),
        environment(source.record, *source.members),
    ]  # fmt: skip
    return part


def _percent(figure: Figure | None) -> str | None:
    return figure.percent() if figure else None


def verdict(
    source: RunSource, numbers: dict[str, Figure | None], control: dict[str, Figure | None], teacher: Figure | None
) -> str:
    """One or two sentences on what was reached, and on what data."""
    who = text(source.fact("student") or source.fact("arch") or _config(source).get("student")) or "the model"
    data = text(source.fact("eval_data") or _config(source).get("eval_data") or source.fact("data"))
    top1 = numbers["top1"]
    seeds = f" over {len(source.results)} seeds" if len(source.results) > 1 else ""
    if not source.results:
        return f"{who}: the run is not finished, there is no result yet."
    if source.kind == "teach":
        where = f" on real test data ({data})" if data else " on real test data"
        reached = f", reaches {top1.percent()} top-1{where}" if top1 else "; its accuracy was not measured"
        return f"{who}, trained on real data{reached}."
    other = text(source.fact("trained_on"))
    trained = "from synthetic images" if source.kind == "distill" else f"on {other}" if other else "as a control"
    if top1 is None:
        held = numbers["holdout_agreement"]
        said = f"{who} agrees with its teacher on {held.percent()} of held-out synthetic images" if held else who
        return f"{said}; its accuracy on real data was not measured."
    where = f"real test data ({data})" if data else "real test data"
    words = f"{who}, trained {trained}, reaches {top1.percent()} top-1 on {where}{seeds}"
    if teacher is not None:
        kept = numbers["retention"]
        words += f"; its teacher {teacher.percent()}"
        words += f", so {kept.percent()} of the teacher's accuracy is kept" if kept else ""
    words += "."
    other = control["top1"]
    if other is not None and source.control:
        what = text(source.control.get("trained_on")) or "something else"
        difference = 100 * (top1.mean - other.mean)
        side = "above" if difference >= 0 else "below"
        words += f" That is {abs(difference):.1f} points {side} the control, trained on {what}."
    return words


def _warnings(
    source: RunSource, numbers: dict[str, Figure | None], control: dict[str, Figure | None], teacher: Figure | None
) -> list[str]:
    found: list[str] = []
    if not source.complete:
        done = f"{len(source.results)} of {source.planned} trainings have a result"
        found.append(f"not finished: {done}; go on with --resume")
    top1, other = numbers["top1"], control["top1"]
    noise = (text((source.control or {}).get("trained_on")) or "").startswith("noise")
    if noise and top1 and other and top1.mean <= other.mean + 2 * (top1.std or 0.0):
        found.append("a student trained on noise is as good: these images show no benefit over it")
    if source.kind == "distill" and top1 is not None:
        if len(source.results) == 1:
            found.append("one seed only: the spread between runs is not known (--seeds 3)")
        if source.control_curve is None:
            found.append("there is no control (--control noise, or --control DATA for as many real images)")
    if top1 is not None and teacher is not None and teacher.mean < top1.mean:
        found.append("the student is above its teacher: check that both saw the same test data")
    for result in [*source.results, *([source.control] if source.control else [])]:
        found += warning_lines(result.get("warnings"))
    return same_order(found + source.notes)


def _scores(
    source: RunSource, numbers: dict[str, Figure | None], control: dict[str, Figure | None], teacher: Figure | None
) -> Markup | None:
    """The table teacher / student / control, one measure per row, each with the data that it was measured on."""
    alone = source.kind == "teach"
    has_control = any(control.values())
    rows: list[list[object]] = []
    for key, name, share, real in _ROWS:
        ours = numbers[key]
        if ours is None:
            continue
        cells: list[object] = [join([name, where_badge(real)])]
        if not alone:
            cells.append(teacher.percent() if key == "top1" and teacher else "")
        cells.append(el("span", ours.percent() if share else ours.plain(), class_="lead" if key == "top1" else None))
        if has_control:
            theirs = control[key]
            cells.append("" if theirs is None else theirs.percent() if share else theirs.plain())
        rows.append(cells)
    if not rows:
        return None
    rows.append(["trainings (n)", *([] if alone else [""]), str(len(source.results)), *(["1"] if has_control else [])])
    head = ["", *([] if alone else ["teacher"]), "model" if alone else "student", *(["control"] if has_control else [])]
    note = _provenance(source, numbers["top1"] is not None)
    return el("div", el("h3", "Results"), table(head, rows), el("p", note, class_="soft") if note else None)


def _provenance(source: RunSource, measured: bool) -> str:
    """What the columns were trained on and what the rows were measured on."""
    alone = source.kind == "teach"
    images, held = number(source.fact("images")), number(source.fact("holdout_images"))
    trained = text(source.fact("data" if alone else "trained_on"))
    if trained == "bank" and images is not None:
        trained = f"{int(images):,} images of the bank {text(source.fact('bank')) or ''}".rstrip()
    data = text(source.fact("eval_data") or (source.fact("data") if alone else None))
    other = text((source.control or {}).get("trained_on"))
    n = number(source.fact("eval_images"))
    said = [
        f"{'Model' if alone else 'Student'}: trained on {trained}." if trained else "",
        f"Control: trained on {other}, with the same number of steps." if other else "",
        f"Real test data: {data}{f', {int(n):,} images' if n else ''}." if data and measured else "",
        f"Synthetic images: {int(held):,} of the bank, kept out of training." if held else "",
    ]
    return " ".join(filter(None, said))


def _config(source: RunSource) -> dict[str, Any]:
    found = source.record.get("config")
    return found if isinstance(found, dict) else {}


def _lines(source: RunSource, key: str, label: str = "") -> list[Line]:
    """The curve of `key` of every seed, and of the control."""
    found = []
    for i, curve in enumerate(source.curves[: len(SEED_COLOURS)]):
        name = " ".join(filter(None, [label, curve.name if len(source.curves) > 1 or not label else ""]))
        found.append(line(curve.records, key, name or curve.name, SEED_COLOURS[i]))
    if source.control_curve is not None:
        found.append(line(source.control_curve.records, key, f"{label} control".strip(), CONTROL_COLOUR, dashed=True))
    return found


def _curves(source: RunSource, teacher: Figure | None) -> list[Markup | None]:
    levels = [Level("teacher", teacher.mean)] if teacher is not None else []
    shown, many = len(SEED_COLOURS), len(source.curves)
    cut = f" First {shown} of {many} seeds." if many > shown else ""
    data = "real data" if source.kind == "teach" else "the training images (of the control: its own)"
    return [
        line_chart("Training loss", _lines(source, "loss"), x_label="step", wide=True,
                   note=f"Mean of each epoch.{cut}"),
        line_chart("Top-1 on real test data", _lines(source, "top1"), x_label="step", percent=True, levels=levels,
                   note=f"Only looked at: nothing is chosen by it.{cut}"),
        line_chart("Training accuracy", _lines(source, "train_top1"), x_label="step", percent=True,
                   note=f"On {data}.{cut}"),
        line_chart("Agreement while training", _lines(source, "agreement"), x_label="step", percent=True,
                   note=f"With the teacher, on {data}.{cut}"),
        line_chart("Agreement on held-out images", _lines(source, "holdout_agreement"), x_label="step", percent=True,
                   note=f"With the teacher, on synthetic images kept out of training.{cut}"),
        line_chart("KL on held-out images", _lines(source, "holdout_kl"), x_label="step", zero=True, wide=True,
                   note=f"KL(teacher ‖ student) in nats, synthetic images kept out of training.{cut}"),
        line_chart("Learning rate", _first(source.curves), x_label="step", zero=True),
    ]  # fmt: skip


def _first(curves: Sequence[Curve]) -> list[Line]:
    return [line(curves[0].records, "lr", "learning rate", 4)] if curves else []


def _class_figures(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of each class, the mean over the results that measured it."""
    found: dict[str, list[float]] = {}
    for result in results:
        per_class = result.get("per_class")
        for name, value in per_class.items() if isinstance(per_class, dict) else ():
            share = number(value)
            if share is not None:
                found.setdefault(clean(name, 60), []).append(share)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _per_class(source: RunSource) -> Markup | None:
    ours = _class_figures(source.results)
    theirs = _class_figures([source.control]) if source.control else {}
    rows = list(ours.items())
    note = "Share of the real test images of a class that the student names right."
    if len(rows) > MOST_CLASSES:
        rows = sorted(rows, key=lambda row: row[1])[:MOST_CLASSES]
        note += f" The {MOST_CLASSES} worst of {len(ours)} classes."
    return bars("Accuracy of each class", rows, note=note, marks=theirs, mark_name="control")


def _recipe(source: RunSource) -> Markup:
    member = source.members[0] if source.members else {}
    config = {k: v for k, v in _config(source).items() if k not in ("resume",)}
    effective = {
        "protocol": member.get("protocol"), "plan": member.get("plan"), "set by flag": member.get("changed"),
    }  # fmt: skip
    return el(
        "div",
        settings("Effective training plan", {k: v for k, v in effective.items() if v}),
        settings("Settings of the run (run.json)", config),
    )
