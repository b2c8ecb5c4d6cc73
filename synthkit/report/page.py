"""`report`: banks and runs as one HTML file that needs nothing else: no script, no font, no address outside."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from pathlib import Path

from synthkit import __version__
from synthkit.errors import OutputExistsError, StorageError, UsageError
from synthkit.report.bank_part import bank_part
from synthkit.report.markup import Markup, clean, el, join, table
from synthkit.report.parts import Part
from synthkit.report.run_part import run_part
from synthkit.report.sources import BankSource, load
from synthkit.report.style import style
from synthkit.runtime import atomic_write

MARKER = "<!-- synthkit report 1 -->"
"""What tells a report from any other file: only a file that begins with it is ever replaced."""
_START = f"<!doctype html>\n{MARKER}\n"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

PathLike = str | os.PathLike[str]


def report(
    paths: PathLike | Iterable[PathLike], out: PathLike = "report.html", *, title: str | None = None,
    per_class: int = 10, max_classes: int = 20,
) -> Path:  # fmt: skip
    """Write one self-contained HTML page on banks and run directories.

    Args:
        paths: bank or run directories (of distill, several seeds and control included, or of teach), in page order.
        out: the file to write; only a report made by synthkit is replaced.
        title: heading of the page.
        per_class: images per class of a bank's picture, at most.
        max_classes: classes in it, at most.

    Returns:
        `out` as a path.

    Raises:
        UsageError: a path holds neither, nothing was given, or `out` is no place for a page; nothing was written.
        OutputExistsError: something else lies at `out`.
        BankError: a bank is damaged. StorageError: the page cannot be written.
    """
    target = Path(out)
    check_out(target)
    data = build(paths, title=title, per_class=per_class, max_classes=max_classes).encode()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, data)
    except OSError as error:  # atomic_write names a full disk and missing permission itself
        raise StorageError(f"report: cannot write {target}: {error.strerror}", hint="choose another --out") from error
    return target


def build(
    paths: PathLike | Iterable[PathLike], *, title: str | None = None, per_class: int = 10, max_classes: int = 20
) -> str:
    """The page of `report` as text."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    places = list({Path(path).resolve(): Path(path) for path in paths}.values())
    if not places:
        raise UsageError("report: nothing to show", hint="give one or more bank or run directories")
    for name, value in (("per_class", per_class), ("max_classes", max_classes)):
        if not 1 <= value <= 100:
            raise UsageError(f"report: {name} must be 1 to 100", got=value)
    sources = [load(place) for place in places]
    parts = [
        bank_part(s, per_class=per_class, max_classes=max_classes) if isinstance(s, BankSource) else run_part(s)
        for s in sources
    ]
    return _page(parts, title)


def check_out(target: Path) -> None:
    """Look before any work whether a page may be written to `target`.

    Raises:
        UsageError: not an .html name, or a file stands where a folder should.
        OutputExistsError: something else is there.
    """
    if target.suffix.lower() not in (".html", ".htm"):
        raise UsageError("report: --out must name an .html file", got=str(target))
    if target.is_dir():
        raise OutputExistsError(f"report: {target} is a directory", hint="choose another --out")
    above = next((p for p in target.absolute().parents if p.exists()), None)
    if above is not None and not above.is_dir():
        raise UsageError(f"report: {above} is a file, so {target} cannot be made", hint="choose another --out")
    if (target.exists() or target.is_symlink()) and not is_report(target):
        raise OutputExistsError(
            f"report: {target} exists and was not made by synthkit report", hint="choose another --out"
        )


def is_report(path: Path) -> bool:
    """Whether `path` is a page that `report` wrote."""
    if not path.is_file() or not os.access(path, os.R_OK):
        return False
    with open(path, "rb") as stream:
        return stream.read(len(_START.encode())) == _START.encode()


def _page(parts: list[Part], title: str | None) -> str:
    heading = clean(title, 200) if title else (parts[0].title if len(parts) == 1 else "Banks and students")
    when = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    head = el(
        "head",
        Markup('<meta charset="utf-8"/>'),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="generator", content=f"synthkit {__version__}"),
        el("title", f"{heading} - synthkit report"),
        el("style", Markup(style())),
    )
    top = el("header", el("h1", heading), el("p", f"synthkit report, {when}", class_="soft"))
    sections = [part.render(f"part{i}") for i, part in enumerate(parts, 1)]
    note = "Badges say where a number was measured. Test data is only looked at: no setting is chosen by it here."
    body = el("body", top, el("main", _overview(parts), *sections), el("footer", f"synthkit {__version__}. {note}"))
    return f"{_START}{el('html', join([head, body]), lang='en')}\n"


def _overview(parts: list[Part]) -> Markup | None:
    """All parts in one table, where there are several."""
    if len(parts) < 2:
        return None
    has_control = any(part.control for part in parts)
    rows = []
    for i, part in enumerate(parts, 1):
        figures = [part.teacher, part.student, *([part.control] if has_control else []), part.retention]
        seeds = f"{part.student.n}" if part.student else ""
        link = el("a", part.title, href=f"#part{i}")
        rows.append([link, part.kind, *(figure.percent() if figure else "" for figure in figures), seeds])
    head = ["", "kind", "teacher", "student", *(["control"] if has_control else []), "retention", "n"]
    note = "Top-1 on real test data; retention is student / teacher. A bank's student is the one trained along with it."
    return el("section", el("h2", "Overview"), table(head, rows), el("p", note, class_="soft"), class_="item")
