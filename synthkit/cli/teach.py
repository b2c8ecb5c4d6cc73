"""`synthkit teach`: parse, run, print."""

from __future__ import annotations

import json
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run `synthkit teach ARGV...`; returns the exit code. Errors are raised as `SynthkitError`."""
    from synthkit.config.parse import parse_command_line

    as_json = "--json" in argv
    parsed = parse_command_line("teach", [word for word in argv if word != "--json"])
    if parsed.text is not None:
        print(parsed.text)
        return 0
    from synthkit.distillation.teach import teach
    from synthkit.distillation.outputs import is_first_process

    result = teach(parsed.config)
    if not is_first_process():
        return 0
    if as_json:
        print(json.dumps({"path": str(result.path), "card": str(result.card), **result.metrics}, indent=1))
        return 0
    found = result.metrics
    if "top1" in found:
        print(f"top-1 {100 * found['top1']:.2f} % on the test data, last epoch")
    else:
        print(f"train top-1 {100 * found['train_top1']:.2f} % (no test data was given)")
    print(f"written: {result.path}; use it as a model: --teacher {result.path}")
    return 0
