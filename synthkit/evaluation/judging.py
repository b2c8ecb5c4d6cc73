"""What a data-free choice has cost, seen from labelled test data: a diagnosis made after every choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.evaluation.choosing import arg_best, centred, mean_or_none, spearman
from synthkit.evaluation.signals import SIGNALS

if TYPE_CHECKING:
    from synthkit.data.real import RealData
    from synthkit.evaluation.selection import Student
    from synthkit.models.view import TeacherView


def diagnose(
    students: Sequence[Student],
    result: dict[str, Any],
    data: RealData,
    teacher: TeacherView,
    device: Any,
) -> dict[str, Any]:
    """Measure every student on labelled data and put the choices of `result` beside the best that could be made.

    It adds `top1` to the rows of `result["candidates"]` and returns JSON-able values. All regrets are differences of
    top-1 shares, from 0 (as good as the oracle, which is the luckiest of its rivals on these very images too):

    - `stopping`: means over the runs of the regret within a run's students; of `choice` (the rule), `last` (the last
      epoch), `random` (expected), and of every signal alone; `runs` has them one by one, `spearman` the mean rank
      correlation of score and signals with top-1 over a run's students.
    - `among_runs`: every run at its chosen stopping point; the oracle is the best of them. `choice`, `random`, and
      every signal alone; `spearman` is taken over the runs' last students.
    - `together`: against the best student of any run at any step: `choice`; `last`, the mean over the runs' last
      students; `best_last`, the best of those; `random`, the mean over all students.
    - `methods`: the method with the best mean score against the one with the best mean top-1 over its seeds.
    """
    from synthkit.evaluation.metrics import matched, score
    from synthkit.evaluation.probes import load_student

    said: list[str] = []
    for student, row in zip(students, result["candidates"], strict=True):
        view = load_student(student.folder, teacher, device)
        fitting, said = matched(view, data)
        scored = score(view, fitting)
        student.top1 = row["top1"] = float((scored.predictions == scored.labels).double().mean())
    result["notes"] += [f"eval_data: {text}" for text in said]
    runs = [[s for s in students if s.run == i] for i in range(len(result["runs"]))]
    stops = [next(s for s in mine if s.step == row["stop"]) for mine, row in zip(runs, result["runs"], strict=True)]
    chosen = next(
        (i for i, row in enumerate(result["runs"]) if result["choice"] and row["run"] == result["choice"]["run"]), None
    )
    return {
        "data": data.name,
        "split": data.split,
        "images": len(data),
        "stopping": _stopping(runs, stops, result["runs"]),
        "among_runs": _among_runs(runs, stops, chosen),
        "together": _together(students, runs, stops, chosen),
        "methods": _methods(result, stops),
    }


def top1s(students: Sequence[Student]) -> np.ndarray:
    """(N,) measured top-1 shares."""
    return np.array([s.top1 for s in students], dtype=np.float64)


def regrets(top1: np.ndarray, picks: dict[str, int | None]) -> dict[str, float | None]:
    """Best of `top1` less that of every pick (None stays None), and the expected regret of a random pick."""
    best = float(top1.max())
    found: dict[str, float | None] = {name: None if i is None else best - float(top1[i]) for name, i in picks.items()}
    return found | {"random": best - float(top1.mean())}


def correlation(values: Sequence[float | None], top1: np.ndarray, better: int = 1) -> float | None:
    """Spearman's correlation of top-1 with the values, turned so that 1 is a signal that orders all of them rightly."""
    if any(value is None for value in values):
        return None
    return spearman([better * float(value or 0.0) for value in values], top1.tolist())


def _stopping(
    runs: Sequence[Sequence[Student]], stops: Sequence[Student], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    each, correlations = [], []
    for mine, stop, row in zip(runs, stops, rows, strict=True):
        if len(mine) < 2:
            continue
        top1 = top1s(mine)
        table = {name: [s.pooled(name) for s in mine] for name in SIGNALS}
        picks = {"choice": list(mine).index(stop), "last": len(mine) - 1}
        picks |= {name: arg_best(table[name], SIGNALS[name].better) for name in SIGNALS}
        oracle = mine[int(top1.argmax())].step
        each.append({"run": row["run"], "oracle": float(top1.max()), "oracle_step": oracle, **regrets(top1, picks)})
        correlations.append(
            {"score": correlation([s.score for s in mine], top1)}
            | {name: correlation(table[name], top1, SIGNALS[name].better) for name in SIGNALS}
        )
    return {
        "n": len(each),
        "regret": {name: mean_or_none([row[name] for row in each]) for name in ("choice", "last", "random", *SIGNALS)},
        "spearman": {name: mean_or_none([row[name] for row in correlations]) for name in ("score", *SIGNALS)},
        "runs": each,
    }


def _among_runs(runs: Sequence[Sequence[Student]], stops: Sequence[Student], chosen: int | None) -> dict[str, Any]:
    from synthkit.evaluation.selection import run_scores

    top1 = top1s(stops)
    picks = {"choice": chosen}
    picks |= {name: arg_best(centred([s.table(name) for s in stops]), SIGNALS[name].better) for name in SIGNALS}
    last = [mine[-1] for mine in runs]
    at_last = top1s(last)
    return {
        "n": len(runs),
        "oracle": float(top1.max()),
        "regret": regrets(top1, picks),
        "spearman": {"score": correlation(run_scores(last), at_last)}
        | {
            name: correlation(centred([s.table(name) for s in last]), at_last, SIGNALS[name].better) for name in SIGNALS
        },
    }


def _together(
    students: Sequence[Student], runs: Sequence[Sequence[Student]], stops: Sequence[Student], chosen: int | None
) -> dict[str, Any]:
    everything, last = top1s(students), top1s([mine[-1] for mine in runs])
    best = float(everything.max())
    return {
        "n": len(students),
        "oracle": best,
        "regret": {
            "choice": None if chosen is None else best - float(top1s(stops)[chosen]),
            "last": best - float(last.mean()),
            "best_last": best - float(last.max()),
            "random": best - float(everything.mean()),
        },
    }


def _methods(result: dict[str, Any], stops: Sequence[Student]) -> dict[str, Any]:
    """Regret of the method with the highest mean score, in mean top-1 over the seeds at their stopping points."""
    names = [row["name"] for row in result["runs"]]
    top1 = {n: float(top1s([s for s, m in zip(stops, names, strict=True) if m == n]).mean()) for n in names}
    oracle = max(top1, key=top1.__getitem__)
    scored = [row["name"] for row in result["methods"] if row["score"] is not None]
    return {
        "top1": top1,
        "oracle": oracle,
        "choice": scored[0] if scored else None,
        "regret": {
            "choice": top1[oracle] - top1[scored[0]] if scored else None,
            "random": top1[oracle] - float(np.mean(list(top1.values()))),
        },
    }
