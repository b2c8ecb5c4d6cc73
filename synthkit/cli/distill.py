"""`synthkit distill`: parse, run, print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from synthkit.cli.arguments import print_json
from synthkit.config.parse import parse_command_line

if TYPE_CHECKING:
    from synthkit.distillation.distill import RunResult


def main(argv: Sequence[str]) -> int:
    """Run `synthkit distill ARGV...`; returns the exit code. Errors are raised as `SynthkitError`."""
    parsed = parse_command_line("distill", argv)
    if parsed.text is not None:
        print(parsed.text)
        return 0
    from synthkit.distillation.distill import distill
    from synthkit.distillation.outputs import is_first_process

    result = distill(parsed.config)
    if not is_first_process():
        return 0
    if parsed.json:
        facts = {"path": str(result.path), "students": [str(s) for s in result.students], **result.metrics}
        print_json(facts)
    else:
        print("\n".join(summary_lines(result)))
    return 0


def figure(value: Any, percent: bool = True) -> str:
    """A number, or a mean with its standard deviation and n, as text."""
    scale, unit = (100.0, " %") if percent else (1.0, "")
    digits = 2 if percent else 4
    if isinstance(value, dict):
        return f"{scale * value['mean']:.{digits}f} +- {scale * value['std']:.{digits}f}{unit} (n={value['n']})"
    return f"{scale * value:.{digits}f}{unit}"


def summary_lines(result: RunResult) -> list[str]:
    """What a person wants to know after a distill run."""
    found = result.metrics
    single = found["runs"][0] if "runs" in found else found
    lines = [
        f"student {single['student']} from {single['bank']} ({single['loss_name']}, {single['protocol']}), last epoch"
    ]
    if "top1" in found:
        lines.append(f"  top-1        {figure(found['top1'])} on {single['eval_data']}")
    if "teacher_top1" in found:
        lines.append(f"  teacher      {figure(found['teacher_top1'])}, retention {figure(found['retention'])}")
    if "eval_agreement" in found:
        lines.append(f"  agreement    {figure(found['eval_agreement'])} with the teacher on that data")
    if "holdout_agreement" in found:
        lines.append(
            f"  held out     {figure(found['holdout_agreement'])} agreement with the teacher, KL "
            f"{figure(found['holdout_kl'], False)} on {single['holdout_images']:,} bank images (no real labels)"
        )
    lines += beside_lines(found, single)
    control = result.control
    if control is not None:
        key, what = ("top1", "top-1") if "top1" in control else ("holdout_agreement", "held-out agreement")
        if key in control:
            lines.append(f"  control      {figure(control[key])} {what}, trained on {control['trained_on']}")
    for text in single.get("warnings") or []:
        lines.append(f"  warning: {text}")
    lines.append(f"written: {result.path}; use it as a model: --model {result.student.parent}")
    return lines


def beside_lines(found: dict[str, Any], single: dict[str, Any]) -> list[str]:
    """What stands beside the student: itself without the modules that its loss deploys, and its moving average."""
    lines = []
    for prefix, what in (("plain_", "alone"), ("ema_", "average")):
        shown = [
            f"{figure(found[prefix + key])} {name}"
            for key, name in (("top1", "top-1"), ("holdout_agreement", "held-out agreement"))
            if prefix + key in found
        ]
        if shown:
            lines.append(f"  {what:<12} {', '.join(shown)}")
    if "deployed_params" in single:
        costs = [
            f"{single[kind + '_params']:,} parameters and {single[kind + '_flops']:,} FLOPs {how}"
            for kind, how in (("deployed", "as deployed"), ("plain", "alone"))
        ]
        lines.append(f"  cost         {', '.join(costs)}")
    return lines
