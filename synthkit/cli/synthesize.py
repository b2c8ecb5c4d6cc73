"""`synthkit synthesize`: parse, run, print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from synthkit.cli.arguments import print_json
from synthkit.config.parse import parse_command_line

if TYPE_CHECKING:
    from synthkit.bank import Bank


def main(argv: Sequence[str]) -> int:
    """Run `synthkit synthesize ARGV...`; returns the exit code. Errors are raised as `SynthkitError`."""
    parsed = parse_command_line("synthesize", argv)
    if parsed.text is not None:
        print(parsed.text)
        return 0
    from synthkit.runtime import RunDir
    from synthkit.synthesis.engine import run_folder, synthesize

    bank = synthesize(parsed.config)
    run = RunDir(run_folder(parsed.config, bank.path)).read_json("run.json") or {}
    if parsed.json:
        facts = {"path": str(bank.path), "images": len(bank), "complete": bank.complete}
        print_json({**facts, **{k: v for k, v in run.items() if k != "config"}})
    else:
        print("\n".join(summary_lines(bank, run)))
    return 0


def summary_lines(bank: Bank, run: dict[str, Any]) -> list[str]:
    """What a person wants to know after a synthesize run."""
    lines = [f"bank {bank.path}: {len(bank)} images of {bank.shape}, {bank.num_classes} classes"]
    student = run.get("student")
    if student:
        lines.append(
            f"  co-trained student {100 * student['test_top1']:.2f} % (teacher {100 * student['teacher_top1']:.2f} %) "
            f"on {student['test_n']} labelled images, last epoch, measured only"
        )
    for text, count in (run.get("warnings") or {}).items():
        lines.append(f"  warning ({count}x): {text}")
    if not bank.complete:
        lines.append("  unfinished: other workers (--shards I/N) still have to make the rest, in any order")
        return lines
    lines.append(f"next: synthkit distill --bank {bank.path} --student NAME, or synthkit bank show {bank.path}")
    return lines
