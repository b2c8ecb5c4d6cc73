"""Data-free model selection: when to stop a run, and which run to take, without a validation set.

Students are judged by what can be seen without data (`signals`) on probe images: images of banks that the student did
not learn from. The choice follows one rule (`choosing.RULE`), fixed in advance. Labelled test data, where they are
given, are looked at only after every choice is made, and say what the choice has cost: its regret, the gap in top-1 to
the best that could have been chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.errors import RequirementError, UsageError
from synthkit.evaluation.choosing import RULE, best, mean_or_none, rank_scores
from synthkit.evaluation.signals import SIGNALS, disagreement

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.bank import Bank
    from synthkit.data.real import RealData
    from synthkit.evaluation.probes import Probe, Run

OTHERS = "others"
LIMIT = 512
"""Probe images of one bank, at most."""
TOTAL = 4096
"""Probe images that one student is shown, at most (twice: as they are and augmented)."""


@dataclass(kw_only=True)
class Student:
    """One stored student of a run, and what was seen of it."""

    run: int
    """Index of its run."""
    step: int
    folder: Path
    last: bool
    """Whether it is its run's last one."""
    progress: float
    """Its step over the run's last step."""
    probes: dict[str, dict[str, float]] = field(default_factory=dict)
    """Probe bank -> signal -> value."""
    classes: dict[str, Tensor] = field(default_factory=dict)
    """Probe bank -> (N,) classes that it names."""
    score: float | None = None
    """Among the students of its run."""
    top1: float | None = None
    """On the labelled test data."""

    def table(self, signal: str) -> dict[str, float]:
        """Probe bank -> value of `signal`."""
        return {name: found[signal] for name, found in self.probes.items() if signal in found}

    def pooled(self, signal: str) -> float | None:
        """Mean over the probe banks, each with the same weight; None where the signal is absent."""
        return mean_or_none(list(self.table(signal).values()))


def select(
    candidates: Sequence[str | Path | tuple[str, int, str | Path]],
    probes: Sequence[str | Path] | str = OTHERS,
    *,
    teacher: str | None = None,
    eval_data: str | RealData | None = None,
    limit: int = LIMIT,
    total: int = TOTAL,
    seed: int = 0,
    device: str = "auto",
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Choose the stopping point of every run, and one run.

    Args:
        candidates: banks made with `--method.checkpoints N`, or directories of distill runs (one student each, so
            nothing to choose within); or (method name, seed, path), where the names and seeds of the banks are not
            those that matter.
        probes: banks whose images the students are judged on. The word `others` among them stands for the banks of
            all other methods of `candidates` (of all other seeds, where there is one method only).
        teacher: model spec; none takes the one that the banks name.
        eval_data: labelled data for a diagnosis of the choice; they decide nothing.
        limit, total: probe images per probe bank, and per student over all of them; every probe bank weighs the same.
        seed: of the choice of probe images and of their augmentation.
        tell: called with a line about the progress.

    Returns:
        JSON-able values: `rule`; `candidates`, one per stored student (`run`, `name`, `seed`, `step`, `last`, `stop`,
        `signals` {name: value or None}, `score` among its run's students, with eval data `top1`); `runs` (`stop`,
        `last`, `score` among the runs at their stopping points, `path` of the chosen student); `choice`, the run with
        the highest score (None where no two runs saw the same probe bank); `methods` (mean score over seeds, best
        first); `diagnosis` (None without eval data, see `judging.diagnose`); `notes`; `seconds`.

    Raises:
        RequirementError: a run without checkpoints or without a probe bank, or different teachers.
        UsageError: a probe is a run's own bank. DataError: classes or image sizes differ. BankError: a damaged bank.
    """
    import torch

    from synthkit.data.specs import load_data
    from synthkit.evaluation import probes as banks
    from synthkit.runtime import resolve_device

    began = time.monotonic()
    if limit < 1 or total < 1:
        raise UsageError("select: limit and total must be at least 1", got=(limit, total))
    words = [probes] if isinstance(probes, str) else list(probes)
    runs = [banks.find_run(*_parts(candidate)) for candidate in candidates]
    _check_distinct(runs)
    where = torch.device(resolve_device(device))
    view, loaded = banks.common_teacher(runs, teacher, where)
    opened = _probe_banks(runs, words)
    sets = [_probes_of(run, runs, opened) for run in runs]
    per_bank = max(1, min(limit, total // max(len(paths) for paths in sets)))
    data = load_data(eval_data, "test", size=view.input_size) if isinstance(eval_data, str) else eval_data
    say = tell or (lambda text: None)
    say(f"{len(opened)} probe banks of up to {per_bank} images each; {sum(len(r.students) for r in runs)} students")
    shown = {path: banks.load_probe(bank, view, loaded.sha256, per_bank, seed) for path, bank in opened.items()}
    students: list[Student] = []
    for index, (run, paths) in enumerate(zip(runs, sets, strict=True)):
        students += _observed(index, run, [shown[path] for path in paths], view, where)
        say(f"{run.path}: {len(run.students)} students on {len(paths)} probe banks")
    _add_disagreement(runs, students)
    result = _decide(runs, students)
    result["notes"] += _notes(runs, students, list(shown.values()))
    result["diagnosis"] = None
    if data is not None:
        from synthkit.evaluation.judging import diagnose

        say(f"diagnosis: {len(students)} students on {len(data)} labelled images")
        result["diagnosis"] = diagnose(students, result, data, view, where)
    return {
        "what": "data-free model selection",
        "rule": RULE,
        "teacher": {"spec": loaded.spec, "arch": loaded.card.arch, "sha256": loaded.sha256},
        "probes": {path: len(probe.images) for path, probe in shown.items()},
        **result,
        "seconds": round(time.monotonic() - began, 2),
    }


def _parts(candidate: str | Path | tuple[str, int, str | Path]) -> tuple[Any, ...]:
    return (candidate[2], candidate[0], candidate[1]) if isinstance(candidate, tuple) else (candidate,)


def _check_distinct(runs: Sequence[Run]) -> None:
    if not runs:
        raise UsageError("select: no run to choose from")
    seen: set[Path] = set()
    for run in runs:
        if run.path.resolve() in seen:
            raise UsageError("select: a run is named twice", got=str(run.path))
        seen.add(run.path.resolve())


# ---- who is judged by what -----------------------------------------------------------------------------------------


def _probe_banks(runs: Sequence[Run], words: Sequence[str | Path]) -> dict[str, Bank]:
    """Every probe bank by its path; those that were named must be nobody's own."""
    from synthkit.bank import Bank
    from synthkit.evaluation.probes import identities

    found: dict[str, Bank] = {}
    for word in words:
        if word == OTHERS:
            found |= {str(run.path): run.bank for run in runs if run.bank is not None}
            continue
        bank = Bank(word)
        own = [run for run in runs if run.made_from & identities(bank)]
        if own:
            raise UsageError(
                f"probe {word}: {own[0].path} learned from these very images, on which every student does well",
                hint=f"leave it out, or use --probe {OTHERS}: no run is then judged by its own bank",
            )
        found[str(bank.path)] = bank
    if not found:
        raise UsageError("select: no probe bank", hint=f"--probe BANK of another method or seed, or --probe {OTHERS}")
    return found


def _probes_of(run: Run, runs: Sequence[Run], banks: Mapping[str, Bank]) -> list[str]:
    """The probe banks that `run` may be judged by: nothing that it learned from, and of the candidates' banks those of
    other methods (a sibling's images are nearly its own, which would favour it); of other seeds where that is all."""
    from synthkit.evaluation.probes import identities

    alone = len({other.name for other in runs}) == 1
    siblings = set() if alone else {str(other.path) for other in runs if other.name == run.name}
    paths = [p for p, bank in banks.items() if p not in siblings and not run.made_from & identities(bank)]
    if not paths:
        raise RequirementError(
            f"{run.path}: there is no probe bank that it did not learn from",
            hint="give one of another method or seed: --probe BANK",
        )
    return paths


# ---- looking -------------------------------------------------------------------------------------------------------


def _observed(index: int, run: Run, probes: Sequence[Probe], teacher: Any, device: Any) -> list[Student]:
    from synthkit.evaluation.probes import load_student, observe

    end = run.students[-1][0]
    found = []
    for step, folder in run.students:
        student = Student(run=index, step=step, folder=folder, last=step == end, progress=step / max(1, end))
        view = load_student(folder, teacher, device)
        for probe in probes:
            student.probes[str(probe.path)], student.classes[str(probe.path)] = observe(view, probe)
        found.append(student)
    return found


def _add_disagreement(runs: Sequence[Run], students: Sequence[Student]) -> None:
    """Compare every student with those of its run's siblings that were as far on."""
    groups = [of_run(students, index) for index in range(len(runs))]
    for index, (run, mine) in enumerate(zip(runs, groups, strict=True)):
        siblings = [groups[i] for i, other in enumerate(runs) if other.name == run.name and i != index]
        for student in mine:
            nearest = [min(group, key=lambda s: abs(s.progress - student.progress)) for group in siblings]
            for name, classes in student.classes.items():
                found = [disagreement(classes, s.classes[name]) for s in nearest if name in s.classes]
                if found:
                    student.probes[name]["disagreement"] = float(np.mean(found))


# ---- deciding ------------------------------------------------------------------------------------------------------


def of_run(students: Sequence[Student], index: int) -> list[Student]:
    """The students of one run, in order."""
    return [s for s in students if s.run == index]


def run_scores(chosen: Sequence[Student]) -> list[float | None]:
    """Scores of one student per run against each other."""
    return rank_scores([s.table("agreement") for s in chosen])


def _decide(runs: Sequence[Run], students: Sequence[Student]) -> dict[str, Any]:
    stops = []
    for index in range(len(runs)):
        mine = of_run(students, index)
        for student, score in zip(mine, rank_scores([s.table("agreement") for s in mine]), strict=True):
            student.score = score
        at = best([s.score for s in mine], [s.pooled("kl") for s in mine], [s.step for s in mine])
        stops.append(mine[at or 0])  # a run with one student has no score: there is nothing to choose
    scores = run_scores(stops)
    at = best(scores, [s.pooled("kl") for s in stops], [s.step for s in stops])
    rows = [
        {"run": str(run.path), "name": run.name, "seed": run.seed, "stop": stop.step,
         "last": of_run(students, i)[-1].step, "score": score, "path": str(stop.folder), "probes": list(stop.probes)}
        for i, (run, stop, score) in enumerate(zip(runs, stops, scores, strict=True))
    ]  # fmt: skip
    return {
        "candidates": [
            {"run": str(runs[s.run].path), "name": runs[s.run].name, "seed": runs[s.run].seed, "step": s.step,
             "last": s.last, "stop": s is stops[s.run], "score": s.score,
             "signals": {name: s.pooled(name) for name in SIGNALS}}
            for s in students
        ],
        "runs": rows,
        "choice": None if at is None else {key: rows[at][key] for key in ("run", "name", "seed", "stop", "path")},
        "methods": _methods(rows),
        "notes": [],
    }  # fmt: skip


def _methods(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean score of every method over its runs, best first; those without a score come last."""
    scores = {
        n: mean_or_none([r["score"] for r in rows if r["name"] == n]) for n in dict.fromkeys(r["name"] for r in rows)
    }
    order = sorted(scores, key=lambda name: -1.0 if scores[name] is None else -float(scores[name] or 0) - 1)
    return [{"name": name, "score": scores[name], "runs": sum(r["name"] == name for r in rows)} for name in order]


def _notes(runs: Sequence[Run], students: Sequence[Student], probes: Sequence[Probe]) -> list[str]:
    notes = []
    real = [str(probe.path) for probe in probes if probe.real]
    if real:
        notes.append(f"not data-free: probe images contain real ones ({', '.join(real)})")
    kinds = len({run.name for run in runs})
    if len(runs) > 1 and all(
        score is None for score in run_scores([of_run(students, i)[-1] for i in range(len(runs))])
    ):
        notes.append(
            "no two runs saw the same probe bank, so the runs cannot be compared; add a bank of a third method"
        )
    elif 1 < kinds < 4:
        notes.append(f"{kinds} methods judge each other: a probe bank of none of them makes the comparison fairer")
    unfinished = [str(run.path) for run in runs if run.bank is not None and not run.bank.complete]
    if unfinished:
        notes.append(f"unfinished runs, judged as far as they are: {', '.join(unfinished)}")
    for name in ("bn_distance", "disagreement"):
        without = [i for i in range(len(runs)) if all(s.pooled(name) is None for s in of_run(students, i))]
        if without:
            reason = (
                "no BatchNorm in student or teacher" if name == "bn_distance" else "no other seed on the same probes"
            )
            notes.append(f"{name} is absent for {len(without)} of {len(runs)} runs: {reason}")
    return notes
