"""What `synthkit bench losses` compares: how each loss is trained on real images and on a synthetic bank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from synthkit import tables
from synthkit.distillation.weighted import Term, parse_terms

SHORT = 1  # epochs of a warm-up or of an initial phase, which the sources spread over 20 to 30 of 240


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    loss: str
    """The loss expression."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the loss, by term where it is a sum."""
    config: dict[str, Any] = field(default_factory=dict)
    """Further fields of the distill config."""
    teachers: int = 1
    """2: the second teacher beside the first. 0: a teacher with fresh weights."""


SMALL_GENDD = {"width": 128, "repeats": 8, "steps": 16, "samples": 1}
"""GenDD's published head takes 147 GFLOP per image; this one fits two cores."""

ALONE = ("soft_ce", "js", "l1", "mse", "pld", "simkd", "gendd", "ferkd", "lelp", "mealv2", "distill_weighted")
"""Losses that were published, or are meant, with nothing beside them."""


UNEVEN = 3.0  # times as hard as the plain row, or as softly: then `--even` trains once more
METHODLESS = ("ce", "kd")
"""What methods stand beside."""


def evened(row: Row, factor: float) -> Row | None:
    """The row with the weight of its method times `factor`; None where it has none, or several networks of its own
    are judged (a deployed module learns by the loss alone, so no weight changes it)."""
    terms = parse_terms(row.loss)
    method = [t.name for t in terms if t.name not in METHODLESS]
    if len(method) != 1 or tables.lookup("loss", method[0]).requires.deploys:
        return None

    def text(term: Term) -> str:
        weight = term.weight * (factor if term.name == method[0] else 1.0)
        schedule = f"@{term.form}{term.at:g}" if term.form not in ("", "cosine") else "@cosine" if term.form else ""
        rounded = float(f"{weight:.3g}")  # in full: a sum cannot hold "4e+03"
        return (f"{rounded:.15g}*" if rounded != 1.0 else "") + term.name + schedule

    return replace(row, loss="+".join(text(term) for term in terms))


def rows(beside: str) -> dict[str, Row]:
    """Every loss of the table and the variants that are no loss of their own.

    Args:
        beside: what stands beside a method: ce (the CRD protocol, on labelled images) or kd (on a synthetic bank).
    """
    real = beside == "ce"
    found = {
        "ce": Row("ce"),
        "kd": Row("0.1*ce+0.9*kd") if real else Row("kd"),
        "logit_std": Row("0.1*ce+9*logit_std") if real else Row("logit_std"),
        "srrl": Row("ce+kd+srrl") if real else Row("kd+srrl"),
        "semckd": Row("ce+kd+400*semckd") if real else Row("kd+400*semckd"),
        "nd": Row(f"ce+kd@ramp{SHORT}+2*nd") if real else Row("kd+2*nd"),
        "ab": Row(f"{beside}@from{SHORT}+ab@until{SHORT}"),
        "dot": Row("ce+kd", config={"optimizer": "dot"}),
        "ce_kd": Row("ce+kd"),
        "kd_self_paced": Row("0.1*ce+0.9*kd" if real else "kd", config={"order": "self_paced"}),
        "random_teacher": Row("0.1*ce+0.9*kd" if real else "kd", teachers=0),
    }
    if not real:  # real images come without a stored difficulty
        found["kd_easy2hard"] = Row("kd", config={"order": "easy2hard"})
    for name in ("dkd", "ikl", "gkl"):
        found[name] = Row(f"{beside}+{name}@ramp{SHORT}" if real else name)
    found["reviewkd"] = Row(f"{beside}+reviewkd@ramp{SHORT}")
    for name in ALONE:
        options: dict[str, Any] = {}
        if name == "gendd":  # the MNIST teachers have 84 features, of which a token of 64 is no part
            options = SMALL_GENDD if real else {**SMALL_GENDD, "token_dim": 42}
        found[name] = Row(name, options=options, teachers=2 if name in ("mealv2", "distill_weighted") else 1)
    for name in ("dist", "ofa", "deit_lt"):
        weight = _beta(name)
        found[name] = Row(f"{beside}+{weight:g}*{name}" if real else name)
    for name in tables.LOSSES:
        if name not in found:
            found[name] = Row(f"{beside}+{_beta(name):g}*{name}")
    return found


def _beta(name: str) -> float:
    return tables.lookup("loss", name).beta
