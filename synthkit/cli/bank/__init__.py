"""`synthkit bank COMMAND ...`: one module per command, with `configure(parser)` and `run(args)`. No torch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from synthkit.cli.arguments import Arguments
from synthkit.errors import UsageError

# command -> (module, what it does). Adding a command is one line here and one module.
COMMANDS: dict[str, tuple[str, str]] = {
    "info": ("info", "what is in a bank: classes, difficulty, teacher, recipe"),
    "ls": ("ls", "the shards of a bank, or the banks in a folder"),
    "verify": ("verify", "check every file against its record (exit code 3 when damaged)"),
    "repair": ("repair", "move damaged parts to quarantine/ and say what to make again"),
    "seal": ("seal", "write the manifest with the root hash (done by itself when a bank is finished)"),
    "merge": ("merge", "join banks, or the parts of one run that was spread over machines"),
    "dedup": ("dedup", "a new bank without duplicates, exact and near"),
    "stats": ("stats", "how diverse it is, and how near to real images (features of the teacher, or pixels)"),
    "import": ("import_", "make a bank of an ImageFolder, parquet, npz, pt, safetensors, WebDataset or MDS"),
    "push": ("push", "upload a sealed bank to the Hugging Face Hub"),
    "pull": ("pull", "fetch a bank from the Hub: pinned, resumable, every hash checked"),
    "audit": ("audit", "does it hold copies of real images? A privacy audit with a plain verdict"),
    "show": ("show", "write a picture: one row per class, easy to hard"),
}


def main(argv: Sequence[str]) -> int:
    """Run `synthkit bank ARGV...`; returns the exit code. Errors are raised as `SynthkitError`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    name = argv[0]
    if name not in COMMANDS:
        raise UsageError("bank: no such command", got=name, allowed=COMMANDS, hint="see: synthkit bank --help")
    module, text = COMMANDS[name]
    command = importlib.import_module(f"synthkit.cli.bank.{module}")
    parser = Arguments(prog=f"synthkit bank {name}", description=text[0].upper() + text[1:] + ".")
    command.configure(parser)
    return command.run(parser.parse(argv[1:]))


def _overview() -> str:
    lines = ["usage: synthkit bank COMMAND ...   (synthkit bank COMMAND --help)", ""]
    return "\n".join(lines + [f"  {name:8} {text}" for name, (_, text) in COMMANDS.items()])
