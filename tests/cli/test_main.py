"""The dispatcher: help, errors, exit codes, and that nothing which only parses or inspects imports torch."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from synthkit import __version__
from synthkit.cli import main as cli_main
from synthkit.cli.main import COMMANDS, main
from synthkit.config.parse import COMMANDS as CONFIGURED
from synthkit.errors import BankError, RunError, SynthkitError

LIGHT = [
    ["--help"],
    ["--version"],
    ["list"],
    ["list", "methods", "--json"],
    ["list", "models"],
    ["list", "losses"],
    ["recipes"],
    ["recipes", "check", "cifar10/cudfkd-r34-r18"],
    ["synthesize", "--help"],
    ["distill", "--help"],
    ["teach", "--help"],
    ["evaluate", "--help"],
    ["select", "--help"],
    ["bank", "--help"],
    ["synthesize", "--teacher", "r34", "--print_config"],
]
"""Command lines that must answer at once and without torch (`bank info` has its own test beside the bank)."""

PROBE = """
import sys
from synthkit.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code or 0
loaded = {name.split(".")[0] for name in sys.modules}
heavy = sorted(loaded & {"torch", "torchvision", "accelerate", "kornia", "diffusers"})
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_light_commands_do_not_import_torch(words):
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "words",
    [["--help"], ["list", "methods"], ["list", "losses"], ["list"], ["recipes"], ["synthesize", "--help"]],
    ids=" ".join,
)
def test_light_commands_answer_in_half_a_second(cli, words):
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert cli(*words).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time, not the clock: these commands wait for nothing, and the tests share the machine.
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < 0.5, taken


def test_importing_synthkit_is_light():
    code = (
        "import sys, synthkit; assert not {'torch', 'numpy', 'jsonargparse'} & set(sys.modules); synthkit.load_recipe"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_names_every_command_and_version(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert set(CONFIGURED) <= set(COMMANDS)
    assert main([]) == 0
    capsys.readouterr()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"synthkit {__version__}\n"


def test_every_command_has_its_module():
    import importlib

    for name in COMMANDS:
        module = importlib.import_module(f"synthkit.cli.{name}")
        assert callable(getattr(module, "main", None) or module.run), name


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["synthesise"], ["synthkit: error:", "'synthesise'", "did you mean 'synthesize'?"]),
        (["synthesize"], ["synthkit synthesize: error: --teacher is needed"]),
        (["synthesize", "--teacher", "r34", "--imags", "3"], ["did you mean --images?"]),
        (["synthesize", "--teacher", "r34", "--method", "cudfk"], ["did you mean 'cudfkd'?"]),
        (["distill", "--bank", "b", "--student", "r18", "--loss", "kdd"], ["did you mean 'kd'?"]),
        (["teach", "--arch", "r18"], ["--data is needed"]),
        (["list", "modles"], ["did you mean 'models'?"]),
        (["list", "models", "--jsn"], ["did you mean --json?"]),
        (["recipes", "shw"], ["did you mean 'show'?"]),
        (["recipes", "show"], ["a NAME is needed"]),
        (["recipes", "show", "cifar10/cudfkd-r34-r81"], ["did you mean 'cifar10/cudfkd-r34-r18'?"]),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_line(capsys, words, parts):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err


@pytest.mark.parametrize(
    ("error", "code"), [(SynthkitError("x"), 1), (RunError("x"), 1), (BankError("x"), 3), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(monkeypatch, capsys, error, code):
    def fail(words):
        raise error

    monkeypatch.setattr(cli_main, "_dispatch", fail)
    assert main(["distill", "--bank", "a b"]) == code
    err = capsys.readouterr().err
    assert err.startswith("synthkit distill: ")
    if code == 130:
        assert "synthkit distill --bank 'a b' --resume" in err


def test_unexpected_errors_keep_their_traceback(monkeypatch):
    def fail(words):
        raise ZeroDivisionError

    monkeypatch.setattr(cli_main, "_dispatch", fail)
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m synthkit list models | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
