"""HTML and SVG from plain values. What is not `Markup` is escaped, so that nothing from a file can become markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

# Characters that reorder or hide text around them: a name from a file must not make the page say something else.
_HIDDEN = {c: None for c in [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0xFEFF]}
_VOID = {"img", "br", "meta", "hr", "line", "rect", "circle", "path", "polyline"}


class Markup(str):
    """Text that is markup already."""


def clean(value: object, limit: int = 400) -> str:
    """`value` as one printable line of at most `limit` characters."""
    text = str(value)[: 4 * limit].translate(_HIDDEN)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """One element; `class_` is class, an underscore in a name a dash, an attribute that is None is left out."""
    words = [tag]
    for name, value in attributes.items():
        if value is not None:
            words.append(f'{name.rstrip("_").replace("_", "-")}="{html.escape(clean(value, 1 << 22), quote=True)}"')
    opened = f"<{' '.join(words)}>"
    if tag in _VOID and not children:
        return Markup(opened[:-1] + "/>")
    return Markup(f"{opened}{join(children)}</{tag}>")


def join(children: Iterable[object]) -> Markup:
    """Children one after the other: markup as it is, lists flattened, None left out, everything else escaped."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, (list, tuple)):
            parts.append(join(child))
        else:
            parts.append(html.escape(clean(child), quote=True))
    return Markup("".join(parts))


def table(head: Sequence[object] | None, rows: Iterable[Sequence[object]], kind: str = "") -> Markup:
    """A table that scrolls sideways where the page is narrow; the first cell of a row heads it."""
    top = el("thead", el("tr", *(el("th", cell, scope="col") for cell in head))) if head is not None else None
    body = [el("tr", el("th", row[0], scope="row"), *map(_cell, row[1:])) for row in rows]
    return el("div", el("table", top, el("tbody", *body), class_=kind or None), class_="scroll")


def _cell(value: object) -> Markup:
    """Figures stay on one line; longer text may wrap."""
    return el("td", value, class_="wrap" if not isinstance(value, Markup) and len(str(value)) > 24 else None)


def badge(text: str, kind: str) -> Markup:
    """A small label that says where a number comes from; `kind` is real, synthetic or plain."""
    return el("span", text, class_=f"badge {kind}")


def details(title: str, *body: object, open_: bool = False) -> Markup:
    """A part that folds."""
    inner = join([el("summary", title), *body])
    return Markup(f"<details{' open' if open_ else ''}>{inner}</details>")


def flat(value: Any, prefix: str = "", depth: int = 0) -> list[tuple[str, str]]:
    """Nested data as (dotted key, text) rows, in its own order; lists of plain values stay on one line."""
    if isinstance(value, dict) and value and depth < 8:
        rows: list[tuple[str, str]] = []
        for key, inner in value.items():
            rows += flat(inner, f"{prefix}.{clean(key, 80)}" if prefix else clean(key, 80), depth + 1)
        return rows[:500]
    if isinstance(value, (list, tuple)):
        text = ", ".join(clean(v, 80) for v in value[:40]) + (", …" if len(value) > 40 else "")
        return [(prefix, f"[{text}]")]
    if value is None:
        return [(prefix, "none")]
    if isinstance(value, bool):
        return [(prefix, "true" if value else "false")]
    return [(prefix, clean(value, 300))]


def facts(rows: Iterable[tuple[str, object]], kind: str = "facts") -> Markup | None:
    """Name and value pairs as a description list; nothing where there are none."""
    pairs = [el("div", el("dt", name), el("dd", value)) for name, value in rows if value is not None and value != ""]
    return el("dl", *pairs, class_=kind) if pairs else None
