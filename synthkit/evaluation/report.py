"""The result of `synthkit evaluate` as text, and the JSON file that collects results. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from synthkit.errors import OutputExistsError
from synthkit.runtime import write_json

KIND = "synthkit evaluate"


def render(result: dict[str, Any]) -> str:
    """A table for people; warnings stand at the end, where they are read."""
    model, scores = result["model"], result["metrics"]
    head = f"with the modules of {model['head']}" if model.get("head") else ""
    facts = ", ".join(text for text in (model["arch"], head, f"{model['parameters']:,} parameters") if text)
    lines = [("model", f"{model['spec']} ({facts})"), ("data", _data_line(result["data"], scores["n"]))]
    if result.get("teacher"):
        lines.append(("teacher", result["teacher"]["spec"]))
    if "what" in scores:
        lines.append(("measured", scores["what"]))
    if "top1" in scores:
        lines.append(("top-1", f"{_percent(scores['top1'])} +- {100 * scores['top1_stderr']:.2f} (standard error)"))
    if "top5" in scores:
        lines.append(("top-5", _percent(scores["top5"])))
    if "teacher_top1" in scores:
        lines.append(("teacher top-1", _percent(scores["teacher_top1"])))
    if "agreement" in scores:
        lines.append(("agreement", _percent(scores["agreement"])))
    if "kl" in scores:
        lines.append(("KL(teacher||model)", f"{scores['kl']:.4f} nats"))
    if "ece" in scores:
        lines.append(("ECE (15 bins)", f"{scores['ece']:.4f}"))
    if "nll" in scores:
        lines.append(("NLL", f"{scores['nll']:.4f} nats"))
    width = max(len(name) for name, _ in lines)
    text = [f"{name:<{width}}  {value}" for name, value in lines]
    text += _per_class(scores)
    text += [f"note: {line}" for line in result["notes"]]
    return "\n".join(text + [f"warning: {line}" for line in result["warnings"]])


def _data_line(data: dict[str, Any], n: int) -> str:
    split = f" {data['split']}" if data.get("split") else ""
    return f"{data['spec']}{split}, {n:,} images"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _per_class(scores: dict[str, Any], most: int = 20) -> list[str]:
    """Every class, or of many classes the worst ten."""
    rows = [(name, share) for name, share in scores["per_class"].items() if share is not None]
    title = "per class (agreement)" if "what" in scores else "per class"
    if len(rows) > most:
        rows = sorted(rows, key=lambda row: row[1])[:10]
        title = f"the 10 worst of {len(scores['per_class'])} classes"
    width = max((len(name) for name, _ in rows), default=0)
    predicted = scores.get("predicted", {})
    return [f"{title}:"] + [
        f"  {name:<{width}}  {_percent(share):>8}  predicted {predicted.get(name, 0):,} times" for name, share in rows
    ]


def check_out(path: Path) -> list[dict[str, Any]]:
    """The results already in `path`; a file that is not a collection of results is never touched.

    Raises:
        OutputExistsError: something else lies there.
    """
    if not path.exists():
        return []
    found: Any = None
    if path.is_file():
        try:
            found = json.loads(path.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            found = None  # not ours; refused below
    if not isinstance(found, dict) or found.get("kind") != KIND or not isinstance(found.get("results"), list):
        raise OutputExistsError(
            f"out: {path} exists and does not hold results of synthkit evaluate", hint="choose another --out"
        )
    return found["results"]


def add_result(path: Path, result: dict[str, Any]) -> None:
    """Add `result` to the collection in `path`; one of the same model, data, split, teacher and sample (or of the same
    bank, data, protocol and networks) is replaced.

    Raises:
        OutputExistsError: something else lies there. StorageError: it cannot be written.
    """
    results = [old for old in check_out(path) if _key(old) != _key(result)]
    write_json(path, {"kind": KIND, "results": [*results, result]})


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    data, teacher = result["data"], result.get("teacher") or {}
    if "model" not in result:  # networks trained on a bank
        protocol = result["protocol"]
        return (result["bank"]["path"], data["spec"], data["limit"], protocol["name"], *protocol["changed"],
                *result["results"], result["nets"], result["seed"])  # fmt: skip
    return (
        result["model"]["spec"],
        result["model"].get("sha256"),
        data["spec"],
        data.get("split"),
        data.get("limit"),
        data.get("seed"),
        teacher.get("spec"),
    )
