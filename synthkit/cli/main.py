"""`synthkit COMMAND ...`: finds the command's module, turns typed errors into one line and an exit code. No torch."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Sequence

from synthkit import __version__
from synthkit.errors import SynthkitError, UsageError

COMMANDS: dict[str, str] = {
    "demo": "the main job on the embedded default: bank, student, report in a few minutes on a laptop",
    "synthesize": "make a bank of images from a trained classifier",
    "relabel": "further labels of a bank's images, or of stored views of them, by any teacher",
    "distill": "train a student from a bank alone, by any loss or sum of losses",
    "teach": "train a teacher on real data",
    "evaluate": "measure a model, its agreement with its teacher, or what a bank teaches fresh networks",
    "select": "choose stopping point and run without data, by agreement on other banks' images",
    "bank": "info, verify, repair, merge, dedup, stats, privacy audit, import, push, pull, ... of a bank",
    "export": "a bank in another format, or a trained student as safetensors, torch.export or ONNX",
    "report": "one self-contained HTML page of runs and banks",
    "list": "methods, losses, models, datasets, recipes, protocols, presets, curricula, augmentations, formats",
    "recipes": "show, copy or check the shipped recipes",
    "bench": "speed and memory on this machine, as JSON",
    "doctor": "versions, devices, optional parts, writable paths",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0 done, 1 failed, 2 wrong usage, 3 bank damaged, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words and words[0] in COMMANDS else ""
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except SynthkitError as error:
        name = f"synthkit {command}".strip()
        text = str(error).removeprefix(f"{name}: ").removeprefix(f"{command}: ")
        # what a bank or file says of itself may be quoted here: it must not steer the terminal
        text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
        print(f"{name}: error: {text}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(_interrupted(words), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone; Python would complain again while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"synthkit {__version__}")
        return 0
    command, rest = words[0], words[1:]
    if any("py:" in word for word in rest):
        from synthkit.models.own import trust_words

        trust_words(rest)
    if command not in COMMANDS:
        raise UsageError("no such command", got=command, allowed=COMMANDS, hint="synthkit --help")
    if command == "evaluate":
        return _evaluate(rest)
    return importlib.import_module(f"synthkit.cli.{command}").main(rest) or 0


def _evaluate(words: list[str]) -> int:
    from synthkit.cli.arguments import print_json
    from synthkit.config.parse import parse_command_line

    parsed = parse_command_line("evaluate", words)
    if parsed.text is not None:
        print(parsed.text)
        return 0
    from synthkit.cli.evaluate import run

    record = run(parsed.config, quiet=parsed.json)
    if parsed.json:
        print_json(record)
    return 0


def help_text() -> str:
    """The page of `synthkit --help`."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "synthkit: a trained classifier into a bank of synthetic images, a bank into a trained student.\n\n"
        f"usage: synthkit COMMAND [options]\n\ncommands:\n{rows}\n\n"
        "  synthkit COMMAND --help     all options of a command (of a method: --method NAME --help)\n"
        "  synthkit --version\n\n"
        "examples:\n"
        "  synthkit demo\n"
        "  synthkit synthesize --teacher r34@teacher.pt --curriculum easy2hard --out banks/c10\n"
        "  synthkit distill --bank banks/c10 --student r18 --out runs/s1\n"
        "  synthkit evaluate --model runs/s1 --data cifar10:DIR"
    )


def _interrupted(words: list[str]) -> str:
    text = f"synthkit {words[0] if words else ''}: interrupted; what was committed stays valid"
    if words and words[0] in ("demo", "synthesize", "relabel", "distill", "teach"):
        again = words if "--resume" in words else [*words, "--resume"]
        text += f"; go on with: synthkit {shlex.join(again)}"
    return text


if __name__ == "__main__":
    sys.exit(main())
