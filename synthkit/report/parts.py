"""Blocks that the bank part and the run part of a report share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from synthkit.report.markup import Markup, badge, clean, details, el, facts, flat
from synthkit.report.numbers import Figure, number
from synthkit.report.sources import Record
from synthkit.report.svg import Line
from synthkit.runtime import format_bytes, format_seconds

REAL = "real test data"
SYNTHETIC = "synthetic images"


@dataclass
class Part:
    """One bank or run of a report."""

    title: str
    kind: str
    verdict: str
    body: list[Markup | None]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    badges: list[Markup] = field(default_factory=list)
    student: Figure | None = None
    teacher: Figure | None = None
    control: Figure | None = None
    retention: Figure | None = None
    path: str = ""

    def render(self, anchor: str) -> Markup:
        """The section of the page."""
        listed = el("ul", *(el("li", text) for text in self.warnings), class_="warnings") if self.warnings else None
        return el(
            "section",
            el("span", self.kind, class_="kind"),
            el("h2", self.title),
            el("p", self.path, class_="soft"),
            el("p", self.verdict, class_="verdict"),
            el("div", *self.badges, class_="badges") if self.badges else None,
            listed,
            el("ul", *(el("li", text) for text in self.notes), class_="soft notes") if self.notes else None,
            *self.body,
            class_="item",
            id=anchor,
        )


def where_badge(real: bool) -> Markup:
    """Says whether a number was measured on real test data or on synthetic images."""
    return badge(REAL, "real") if real else badge(SYNTHETIC, "synthetic")


def tiles(pairs: Iterable[tuple[str, str | None]]) -> Markup | None:
    """Large figures; those that are None are left out."""
    found = [el("div", el("b", value), el("span", name), class_="tile") for name, value in pairs if value is not None]
    return el("div", *found, class_="tiles") if found else None


def charts(title: str, found: Sequence[Markup | None]) -> Markup | None:
    """A block of charts under a heading; nothing where every chart is absent."""
    drawn = [chart for chart in found if chart is not None]
    return el("div", el("h3", title), el("div", *drawn, class_="charts")) if drawn else None


def series(records: Sequence[Record], key: str, x: str = "step") -> tuple[list[float], list[float]]:
    """The values of `key` and where they lie on `x`, from the records that have both."""
    found = [(r[x], r[key]) for r in records if key in r and x in r]
    return [a for a, _ in found], [b for _, b in found]


def line(records: Sequence[Record], key: str, name: str, colour: int = 0, dashed: bool = False) -> Line:
    """The curve of `key` over steps (empty where it was not logged)."""
    x, y = series(records, key)
    return Line(name, x, y, colour, dashed)


def percent(value: object) -> str | None:
    """A share as text; None where it is no number."""
    found = number(value)
    return None if found is None else f"{100 * found:.2f} %"


def text(value: object) -> str | None:
    """`value` as one line; None where it is no text or number."""
    plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    return clean(value) if plain and value != "" else None


def settings(title: str, value: Any, *, open_: bool = False) -> Markup | None:
    """Nested settings as folded rows."""
    rows = flat(value) if isinstance(value, dict) and value else []
    return details(title, facts(rows, "facts recipe") or "", open_=open_) if rows else None


def environment(record: dict[str, Any], *others: dict[str, Any]) -> Markup | None:
    """Versions, hardware, time and memory of a run; the first record that knows something wins."""
    rows: list[tuple[str, object]] = []
    records = [record, *others]
    for key in ("seconds", "wall_seconds"):
        found = next((v for r in records if (v := number(r.get(key))) is not None), None)
        if found is not None:
            rows.append(("training time" if key == "seconds" else "time with evaluation", format_seconds(found)))
    for key in ("peak_memory_bytes", "peak_memory"):
        found = next((v for r in records if (v := number(r.get(key))) is not None), None)
        if found is not None:
            rows.append(("peak memory", format_bytes(found)))
            break
    rate = next((v for r in records if (v := number(r.get("steps_per_second"))) is not None), None)
    rows += [("steps per second", f"{rate:.3g}")] if rate is not None else []
    for key in ("hardware", "versions"):
        found = next((r[key] for r in records if isinstance(r.get(key), dict) and r[key]), {})
        for name, value in flat(found) if found else []:
            memory = number(found.get(name)) if name == "gpu_memory" else None
            if value != "none":
                rows.append((name.replace("_", " "), value if memory is None else format_bytes(memory)))
    listed = facts(rows)
    return details("Versions, hardware, time and memory", listed) if listed is not None else None


def warning_lines(value: Any) -> list[str]:
    """Warnings as lines: a list of texts, or texts with how often they came."""
    if isinstance(value, dict):
        counts = [(clean(k), number(v)) for k, v in list(value.items())[:50]]
        return [f"{name} ({int(n)} times)" if n is not None and n > 1 else name for name, n in counts]
    if isinstance(value, list):
        return [clean(v) for v in value[:50] if isinstance(v, str)]
    return []


def same_order(values: Iterable[str]) -> list[str]:
    """Each text once, in order."""
    return list(dict.fromkeys(values))
