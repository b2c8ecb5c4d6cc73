"""`synthkit teach`: parse, run, print."""

from __future__ import annotations

from collections.abc import Sequence

from synthkit.cli.arguments import print_json
from synthkit.config.parse import parse_command_line


def main(argv: Sequence[str]) -> int:
    """Run `synthkit teach ARGV...`; returns the exit code. Errors are raised as `SynthkitError`."""
    parsed = parse_command_line("teach", argv)
    if parsed.text is not None:
        print(parsed.text)
        return 0
    from synthkit.distillation.outputs import is_first_process
    from synthkit.distillation.teach import teach

    result = teach(parsed.config)
    if not is_first_process():
        return 0
    if parsed.json:
        print_json({"path": str(result.path), "card": str(result.card), **result.metrics})
        return 0
    found = result.metrics
    if parsed.config.arch == "unet":
        print(f"denoising loss {found['loss']:.4f} in training, last epoch")
        print(f"written: {result.path}; sample it: synthkit synthesize --method diffusion --method.model {result.path}")
        return 0
    if "top1" in found:
        print(f"top-1 {100 * found['top1']:.2f} % on the test data, last epoch")
    else:
        print(f"train top-1 {100 * found['train_top1']:.2f} % (no test data was given)")
    print(f"written: {result.path}; use it as a model: --teacher {result.path}")
    return 0
