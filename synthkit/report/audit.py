"""The result of `bank audit` for people: lines for the terminal, a picture of pairs, one HTML page."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit import __version__
from synthkit.evaluation.copies import KINDS
from synthkit.report.markup import Markup, clean, el, join, table
from synthkit.report.pairs import Pair, pairs_png
from synthkit.report.style import style

if TYPE_CHECKING:
    from synthkit.bank import Bank
    from synthkit.data.real import RealData

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_QUANTILES = (("min", "nearest"), ("p01", "1 %"), ("p10", "10 %"), ("median", "median"), ("p90", "90 %"))


def audit_lines(result: dict[str, Any]) -> list[str]:
    """The result as plain lines."""
    bank, train, held = result["bank"], result["train"], result["holdout"]
    lines = [f"{bank['path']}: {bank['images']:,} images. Its record says: {bank['origin']}", "",
             f"  {result['verdict']['text']}", "",
             f"  training    {train['images']:,} images of {train['name']} ({train['split']})",
             f"  hold-out    {_holdout(held)}", f"  copies      {_copies(result['copies'])}"]  # fmt: skip
    for space in result["spaces"]:
        lines += ["", f"  in {space['features']['name']}"]
        lines += [f"    {name:<12} {text}" for name, text in _space_rows(result, space)]
    return lines + ["", *(f"  note: {note}" for note in result["notes"])]


def _holdout(held: dict[str, Any] | None) -> str:
    return "none" if held is None else f"{held['used']:,} images of {held['name']} ({held['split']})"


def _copies(copies: dict[str, Any]) -> str:
    kinds = ", ".join(f"{copies[kind]:,} {kind}" for kind in KINDS)
    return f"{copies['found']:,} of {copies['searched']:,} ({kinds}; shifts up to {copies['shift']} pixels)"


def _space_rows(result: dict[str, Any], space: dict[str, Any]) -> list[tuple[str, str]]:
    near, member = space["near"], space["membership"]

    def quantiles(row: dict[str, float]) -> str:
        return ", ".join(f"{word} {row[key]:.4g}" for key, word in _QUANTILES)

    rows = [
        ("bank", f"distance to the nearest training image: {quantiles(space['bank'])}"),
        ("reference", f"the same of {space['reference_images']:,} {space['reference_is']}: "
         f"{quantiles(space['reference'])}"),
        ("near", f"{near['count']:,} of {result['bank']['compared']:,} below {near['threshold']:.4g} and below "
         f"{near['ratio_threshold']:.3g} of the distance to the next ones (the reference's {result['percentile']:g} % "
         f"each); {near['reference']:,} of the reference are, so chance gives about {near['expected']:.1f}, rarely "
         f"above {near['limit']:,}; {near['closer']:,} below {near['closer_below']:.3g}, where one would be enough"),
    ]  # fmt: skip
    if member is not None:
        interval = f"no interval: only {member['nearest']} real images are nearest to any"
        if member["low"] is not None:
            interval = f"95 % interval {member['low']:.4f} to {member['high']:.4f}"
        rows.append(
            ("membership", f"AUC {member['auc']:.4f} ({interval}; p {member['p']:.2g}); 0.5 is no signal: "
             f"{member['share']:.1%} of the nearest real images are training images, by chance "
             f"{member['by_chance']:.1%} ({member['train']:,} training, {member['holdout']:,} hold-out images)")
        )  # fmt: skip
    return rows


def audit_picture(result: dict[str, Any], bank: Bank, train: RealData) -> bytes:
    """Copies, near and closest pairs: bank image left, training image right. PNG bytes."""
    listed = result["pairs"]
    left = bank.batch(np.array([p["row"] for p in listed]), columns=("images",)).images
    assert left is not None  # the column was asked for
    right = train.images.numpy()
    pairs = [
        Pair(image, right[p["train"]], _caption(p), p["kind"] != "closest")
        for image, p in zip(left, listed, strict=True)
    ]
    name = bank.path.resolve().name
    real = " (contains real images)" if bank.spec.contains_real else ""
    title = f"{name}{real}: left the bank, right the nearest image of {train.name} ({train.split})"
    found = sum(p.marked for p in pairs)
    subtitle = (
        f"{found} copies or near copies in red, then the closest" if found else "no copy found: the closest pairs"
    )
    return pairs_png(pairs, title=title, subtitle=subtitle)


def _caption(pair: dict[str, Any]) -> str:
    shown = pair["kind"] if pair["distance"] is None else f"{pair['distance']:.3g}"
    if pair["kind"] == "near":
        shown = f"near {shown}"
    return f"{pair['row']}, {pair['train']}: {shown.replace('mirrored and shifted', 'mirrored, shifted')}"


def audit_page(result: dict[str, Any], picture: bytes) -> bytes:
    """One self-contained HTML page; everything from a file is escaped."""
    bank, train, held = result["bank"], result["train"], result["holdout"]
    heading = f"Privacy audit of {clean(bank['path'], 120)}"
    rows: list[tuple[str, object]] = [
        ("bank", f"{bank['images']:,} images. Its record says: {bank['origin']}"),
        ("training images", f"{train['images']:,} of {train['name']} ({train['split']})"),
        ("hold-out", _holdout(held)), ("copies", _copies(result["copies"])),
    ]  # fmt: skip
    sections = [el("section", el("h2", "Verdict"), el("p", el("strong", result["verdict"]["text"])), class_="item"),
                el("section", el("h2", "What was compared"), table(None, rows), class_="item")]  # fmt: skip
    for space in result["spaces"]:
        body = table(None, _space_rows(result, space))
        sections.append(el("section", el("h2", f"In {space['features']['name']}"), body, class_="item"))
    data = base64.b64encode(picture).decode()
    image = Markup(f'<img alt="closest pairs" style="max-width:100%" src="data:image/png;base64,{data}"/>')
    sections.append(el("section", el("h2", "The pairs to look at"), el("figure", image), class_="item"))
    sections += [el("p", f"note: {note}", class_="soft") for note in result["notes"]]
    head = el("head", Markup('<meta charset="utf-8"/>'),
              el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
              el("meta", name="viewport", content="width=device-width, initial-scale=1"), el("title", heading),
              el("style", Markup(style())))  # fmt: skip
    body = el("body", el("header", el("h1", heading)), el("main", *sections), el("footer", f"synthkit {__version__}"))
    return f"<!doctype html>\n{el('html', join([head, body]), lang='en')}\n".encode()
