"""Banks and run directories for the tests of the report, in the layout that synthesize and distill write."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bank import BankSpec, BankWriter

NAMES = ["ant", "bee", "cat"]
METHOD = {"name": "cudfkd", "epochs": 10, "adv": 0.0, "grad_adv": 0.5, "begin": 0.25, "end": 0.75, "lr": 0.1}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def make_bank(
    path: Path, *, shards: int | None = None, size: int = 8, columns: tuple[str, ...] = ("difficulty", "origin_step"),
    per_shard: int = 10, **changes: Any,
) -> Path:  # fmt: skip
    """A bank of 40 grey images in 4 shards; difficulty and step grow with the image; `shards` leaves it unfinished."""
    spec = BankSpec(**{
        "shape": (1, size, size), "num_classes": 3, "class_names": NAMES, "mean": [0.5], "std": [0.5], "images": 40,
        "images_per_shard": per_shard, "seed": 3, "recipe": {"method": METHOD, "curriculum": "easy2hard"},
        "teacher": {"arch": "lenet5", "accuracy": {"toy test": 0.75}}, **changes,
    })  # fmt: skip
    writer = BankWriter.create(path, spec)
    for index in range(writer.shards if shards is None else shards):
        n = writer.shard_size(index)
        at = index * spec.per_shard + np.arange(n)
        arrays: dict[str, np.ndarray] = {
            "images": np.broadcast_to((5 * at % 256).astype(np.uint8)[:, None, None, None], (n, *spec.shape)).copy(),
            "labels": (at % spec.num_classes).astype(np.int32),
            "difficulty": at.astype(np.float32) / 10,
            "origin_step": (10 * at).astype(np.uint32),
        }
        wanted = {"images", *(["labels"] if spec.label_kind != "none" else []), *columns}
        writer.write_shard(index, {k: v for k, v in arrays.items() if k in wanted}, {})
    return path


def add_engine_record(bank: Path, **changes: Any) -> None:
    """run.json and metrics.jsonl as the engine leaves them in a bank."""
    student = {"test_top1": 0.6, "test_agreement": 0.61, "test_n": 500, "teacher_top1": 0.8}
    record = {
        "config": {"teacher": "lenet5@t.pt", "method": METHOD, "eval_data": "mnist:DIR", "images": 40},
        "versions": {"torch": "9.9.9"}, "hardware": {"cpu": "Abacus 3000", "cores": 2}, "status": "complete",
        "seconds": 75.0, "peak_memory_bytes": 3 << 20, "warnings": {"the generator is collapsing": 4},
        "student": student,
    }  # fmt: skip
    write_json(bank / "run.json", {**record, **changes})
    write_lines(bank / "metrics.jsonl", [
        {"epoch": e, "step": 10 * (e + 1), "lr": 0.1 / (e + 1), "kd": 2.0 / (e + 1), "agreement": 0.5,
         "class_balance": 0.9, "g_entropy": -5.0, "g_bn": 3.0 - e / 10, "g_loss": -2.0, "test_top1": 0.06 * (e + 1),
         "temperature_of_room": 20.0 + e}
        for e in range(10)
    ])  # fmt: skip


def result(seed: int, top1: float, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "distill", "student": "lenet5_half", "teacher": "lenet5@t.pt", "bank": "banks/toy",
        "trained_on": "bank", "loss_name": "kd", "protocol": "mnist", "images": 38, "holdout_images": 2,
        "eval_data": "mnist:DIR",
        "seed": seed, "step": 30, "loss": 0.5, "top1": top1, "teacher_top1": 0.8, "retention": top1 / 0.8,
        "eval_agreement": 0.7, "eval_kl": 0.25, "holdout_agreement": 0.9, "holdout_kl": 0.125, "seconds": 12.0,
        "per_class": {"ant": top1, "bee": 0.25, "cat": None}, **changes,
    }  # fmt: skip


def make_run(
    path: Path, tops: tuple[float, ...] = (0.6,), *, control: float | None = 0.2, finished: int | None = None,
    changes: dict[str, Any] | None = None, record: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A distill run of one or several seeds with the accuracies `tops`, and a noise control."""
    config = {"bank": "banks/toy", "student": "lenet5_half", "eval_data": "mnist:DIR", "seeds": len(tops)}
    run = {"config": config, "command": "distill", "status": "done", "plan": {"optimizer": "adamw"},
           "notes": ["resized"], "versions": {"torch": "9.9.9"}, "hardware": {"cpu": "Abacus 3000"},
           "peak_memory": 5 << 20, **(record or {})}  # fmt: skip
    several = len(tops) > 1
    write_json(path / "run.json", run)
    for seed, top1 in enumerate(tops):
        folder = path / f"seed{seed}" if several else path
        write_json(folder / "run.json", {**run, "seed": seed})
        write_lines(folder / "metrics.jsonl", _curve(top1))
        if finished is None or seed < finished:
            write_json(folder / "result.json", {**result(seed, top1), **(changes or {})})
    if control is not None:
        found = result(0, control, kind="control", trained_on="noise N(0.5, 0.25), new in every step")
        write_json(path / "control" / "result.json", found)
        write_json(path / "control" / "run.json", run)
        write_lines(path / "control" / "metrics.jsonl", _curve(control))
    return path


def _curve(top1: float) -> list[dict[str, float]]:
    return [
        {"epoch": e, "step": 10 * e, "loss": 3.0 / e, "agreement": 0.5, "lr": 0.01 / e, "top1": top1 * e / 3,
         "holdout_agreement": 0.3 * e, "holdout_kl": 1.0 / e}
        for e in (1, 2, 3)
    ]  # fmt: skip


def tree(page: str) -> ET.Element:
    """The page as a tree. It is written as well-formed XML: a tag left open or an unescaped value fails here."""
    return ET.fromstring(re.sub(r"<!doctype html>\n<!--[^>]*-->\n", "", page, count=1))


def words(element: ET.Element | None) -> str:
    """All text below `element` (of a page: of its body), hover titles too."""
    element = element.find("body") if element.tag == "html" else element
    assert element is not None
    return " ".join(" ".join(element.itertext()).split())


def charts(page: str) -> dict[str, ET.Element]:
    """The charts of a page by title."""
    found = {}
    for figure in tree(page).iter("figure"):
        if figure.get("class") == "chart":
            heading = next(figure.iter("h4"))
            found[heading.text or ""] = figure
    return found
