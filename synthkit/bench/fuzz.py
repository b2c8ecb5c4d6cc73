"""`synthkit bench fuzz`: mutated files against every reader of a bank; nothing but typed errors may come of it.

The inputs are a pure function of (seed, target, number). They run in one child process with a memory limit, which the
parent watches: a crash, a hang, an exception that is no `SynthkitError`, memory over the bound, or an input that is
accepted and is not harmless is a finding; the input is saved, and the child starts again with the next one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from synthkit.cli.arguments import Arguments
from synthkit.errors import RunError, UsageError


def main(argv: list[str]) -> int:
    """Parse, fuzz, print JSON; exit code 0 when nothing was found, else 1."""
    parser = Arguments(prog="synthkit bench fuzz", description="Throw mutated files at every reader of a bank.")
    parser.add_argument("--inputs", type=int, default=100_000, help="number of inputs, rounded up per target (100000)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument(
        "--engine", choices=("own", "atheris"), default="own", help="own mutators, or atheris (coverage)"
    )
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    parser.add_argument("--work", type=Path, default=None, help="folder for findings (default: temporary)")
    parser.add_argument("--target", action="append", default=None, help="only these targets (several times)")
    args = parser.parse(argv)
    if args.inputs < 1:
        raise UsageError("bench fuzz: --inputs must be at least 1", got=args.inputs)
    work = args.work or Path(tempfile.mkdtemp(prefix="synthkit-fuzz-"))
    if args.engine == "atheris":
        from synthkit.bench.fuzz_atheris import run_atheris

        result = run_atheris(args.inputs, args.seed, work)
    else:
        from synthkit.bench.fuzz_parent import fuzz

        result = fuzz(args.inputs, args.seed, work, only=args.target)
    if args.out:
        from synthkit.runtime import write_json

        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    if result["findings"]:
        raise RunError(f"bench fuzz: {len(result['findings'])} findings", hint=f"the inputs are kept in {work}")
    if args.work is None:
        shutil.rmtree(work)
    return 0
