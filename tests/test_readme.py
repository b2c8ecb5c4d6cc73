"""The README is executed: its set-up commands are those of CI, every command line in it parses, its Python compiles."""

from __future__ import annotations

import re
import shlex

import pytest
from conftest import ROOT

from synthkit.cli.main import COMMANDS, main
from synthkit.config.parse import COMMANDS as CONFIGURED
from synthkit.config.parse import parse_command_line

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    """Command lines of the shell blocks: prompts, comments and printed output removed, continuations joined."""
    lines = []
    for language, text in BLOCKS:
        if language not in ("sh", "bash", "shell", "console"):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            if language == "console" and not line.startswith("$ "):
                continue
            command = re.sub(r"\s+#.*$", "", line.removeprefix("$ ")).strip()
            if command and not command.startswith("#"):
                lines.append(command)
    return lines


# In running text a command may be named without its options (`synthkit evaluate`); whole ones carry flags.
INLINE = [code for code in re.findall(r"`(synthkit [a-z][^`]+)`", README) if " --" in code and "..." not in code]
SYNTHKIT = [part.strip() for line in shell_lines() for part in line.split("&&") if part.strip().startswith("synthkit ")]


def test_the_two_set_up_commands():
    first, second = shell_lines()[:2]
    assert first == "pip install . && synthkit demo"
    assert second == "pip install '.[test]' && pytest"
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert ci[-1] == second


def test_it_is_short():
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("command", [*SYNTHKIT, *INLINE])
def test_every_command_line_parses(command, capsys):
    words = shlex.split(re.split(r"\s[|>]\s", command)[0])[1:]
    words = [word for word in words if not (word.startswith("[") and word.endswith("]"))]
    assert words[0] in COMMANDS or words[0].startswith("-")
    if words[0] in CONFIGURED:
        parse_command_line(words[0], words[1:])
    elif words[0] in ("list", "recipes") or words[0].startswith("-"):
        assert main(words) == 0
    else:
        with pytest.raises(SystemExit) as stop:
            main([words[0], *(words[1:2] if words[0] in ("bench", "bank") else []), "--help"])
        assert stop.value.code == 0
        page = capsys.readouterr().out
        for word in words[1:]:
            if word.startswith("--"):
                assert word in page


def test_python_blocks_compile():
    for language, text in BLOCKS:
        if language == "python":
            compile(text, "README.md", "exec")
