"""`synthkit relabel`: parse, run, print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from synthkit.cli.arguments import print_json
from synthkit.config.parse import parse_command_line
from synthkit.distillation.relabel_presets import PRESETS

if TYPE_CHECKING:
    from synthkit.bank import LabelSet


def main(argv: Sequence[str]) -> int:
    """Run `synthkit relabel ARGV...`; returns the exit code. Errors are raised as `SynthkitError`."""
    parsed = parse_command_line("relabel", argv)
    if parsed.text is not None:
        print(parsed.text)
        return 0
    from synthkit.distillation.outputs import is_first_process
    from synthkit.distillation.relabel import relabel

    labels = relabel(parsed.config)
    if not is_first_process():
        return 0
    if parsed.json:
        print_json(facts(labels))
    else:
        print("\n".join(summary_lines(labels)))
    return 0


def facts(labels: LabelSet) -> dict[str, Any]:
    """A label set as plain data."""
    spec = labels.spec
    return {
        "name": labels.name, "path": str(labels.path), "kind": spec.kind, "rows": spec.rows, "images": spec.images,
        "top_k": spec.top_k, "bytes": labels.nbytes, "bytes_per_row": spec.row_bytes, "shards": spec.shards,
        "teacher": spec.teacher, "policy": spec.policy, "agreement_with_bank_labels": labels.agreement,
        "tail_error": labels.tail_error,
    }  # fmt: skip


def summary_lines(labels: LabelSet) -> list[str]:
    """What a person wants to know after a relabel run."""
    spec, bank = labels.spec, labels.path.parent.parent
    lines = [f"label set {labels.name} of bank {bank}: {spec.rows:,} {spec.kind}, {spec.row_bytes} bytes each, "
             f"{labels.nbytes / 1e6:,.2f} MB"]  # fmt: skip
    if not labels.complete:
        made = f"{len(labels.sidecars)} of {spec.shards} shards"
        return [*lines, f"unfinished ({made}): the other --shards I/N make the rest, or --resume without --shards"]
    if labels.agreement is not None:
        lines.append(f"  the teacher names the bank's label on {100 * labels.agreement:.2f} % of them")
        if labels.agreement < 2 / spec.num_classes and spec.num_classes > 2:
            lines.append("  warning: that is about chance; is the class order of the teacher the bank's?")
    errors = labels.tail_error
    if errors is not None:
        said = ", ".join(f"{100 * value:.2f} % at T = {t}" for t, value in errors.items())
        lines.append(f"  top {spec.top_k} misses the teacher's probabilities by (total variation) {said}")
    preset = spec.policy.get("name")
    protocol = f" --protocol {preset}" if preset in PRESETS else ""
    lines.append(f"next: synthkit distill --bank {bank} --label_set {labels.name} --student NAME{protocol}")
    return lines
