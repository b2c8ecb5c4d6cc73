from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import synthkit
from synthkit.bank import Bank, BankNotFoundError, BankWriter
from synthkit.cli.bank import COMMANDS, main
from synthkit.cli.bank.common import clean
from synthkit.errors import BankError, OutputExistsError, UsageError

from .banks import fill, make_bank, make_spec


@pytest.fixture
def path(tmp_path):
    make_bank(tmp_path / "b")
    return str(tmp_path / "b")


def test_info(path, capsys):
    assert main(["info", path]) == 0
    text = capsys.readouterr().out
    for part in ("53 of 53", "6 of 6 (complete, sealed)", "method       cudfkd", "teacher      lenet5",
                 "Made without any real data.", "100.00% of the labels", "ant"):  # fmt: skip
        assert part in text, part
    assert main(["info", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 53 and sum(facts["label_histogram"]) == 53 and 0.9 < facts["balance"] <= 1
    assert facts == json.loads(json.dumps(Bank(path).info()))


def test_info_of_an_unfinished_bank(tmp_path, capsys):
    writer = BankWriter.create(tmp_path / "b", make_spec())
    assert main(["info", str(writer.path)]) == 0
    fill(writer, [0, 1])
    assert main(["info", str(writer.path)]) == 0
    assert "--resume" in capsys.readouterr().out


def test_text_from_a_bank_does_not_steer_the_terminal(tmp_path, capsys):
    names = ["\x1b[31mred", "b\nc", "\u202eevil", "d"]
    make_bank(tmp_path / "b", class_names=names, recipe={"method": {"name": "\x1b]0;title\x07"}})
    main(["info", str(tmp_path / "b")])
    assert not set(capsys.readouterr().out) & {"\x1b", "\x07", "\u202e"}
    assert clean("a" * 500).endswith("...") and len(clean("a" * 500)) == 200


def test_ls(path, tmp_path, capsys):
    assert main(["ls", path]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7
    assert main(["ls", str(tmp_path)]) == 0
    assert "53 images 3x6x5  4 classes  complete" in capsys.readouterr().out
    assert main(["ls", path, "--json"]) == 0
    assert [r["n"] for r in json.loads(capsys.readouterr().out)] == [10, 10, 10, 10, 10, 3]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="neither a bank"):
        main(["ls", str(tmp_path / "empty")])


def test_verify_repair_seal(path, capsys):
    assert main(["verify", path, "--deep"]) == 0
    assert "ok: 6 of 6 shards" in capsys.readouterr().out
    assert main(["repair", path]) == 0
    assert "nothing is damaged" in capsys.readouterr().out
    shard = Path(path) / "shards" / "00003.h5"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(BankError) as raised:
        main(["verify", path, "--json"])
    assert raised.value.exit_code == 3
    assert list(json.loads(capsys.readouterr().out)["problems"]) == ["shard 3"]
    with pytest.raises(BankError):
        main(["seal", path])
    assert main(["repair", path]) == 0
    assert "to be made: shards 3;" in capsys.readouterr().out
    with pytest.raises(BankError, match="1 of 6 shards are missing"):
        main(["seal", path])
    fill(BankWriter.open(path))
    assert main(["seal", path]) == 0
    assert Bank(path).info()["root"] in capsys.readouterr().out


def test_show(path, tmp_path, capsys, monkeypatch):
    out = tmp_path / "pictures" / "grid.png"
    assert main(["show", path, "--out", str(out), "--per-class", "3", "--classes", "0,2"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputExistsError):
        main(["show", path, "--out", str(out)])
    with pytest.raises(UsageError, match="classes 0 to 3"):
        main(["show", path, "--out", str(tmp_path / "x.png"), "--classes", "4"])
    with pytest.raises(UsageError, match="numbers like"):
        main(["show", path, "--out", str(tmp_path / "x.png"), "--classes", "ant"])
    with pytest.raises(UsageError, match=".png"):
        main(["show", path, "--out", str(tmp_path / "x.jpg")])
    monkeypatch.chdir(tmp_path)
    assert main(["show", path]) == 0
    assert (tmp_path / "b.png").exists() and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("argv, message", [
    (["inof", "b"], "did you mean 'info'"), (["info"], "BANK"), (["info", "b", "--jsn"], "--jsn"),
    (["show", "b", "--per-class", "many"], "many"), (["--wrong"], "--wrong|COMMAND"),
])  # fmt: skip
def test_wrong_usage(argv, message):
    with pytest.raises(UsageError, match=message) as raised:
        main(argv)
    assert raised.value.exit_code == 2


def test_missing_bank(tmp_path):
    none, out = str(tmp_path / "none"), str(tmp_path / "out")
    more = {
        "merge": [none, "--out", out], "dedup": ["--out", out], "audit": ["--real", f"npz:{out}"], "push": ["me/bank"],
    }  # fmt: skip
    for command in sorted(set(COMMANDS) - {"ls", "import", "pull"}):  # these two begin without a bank
        with pytest.raises(BankNotFoundError):
            main([command, none, *more.get(command, [])])
    assert not any(tmp_path.iterdir())


def test_no_arguments_prints_help(capsys):
    assert main([]) == 2
    assert "verify" in capsys.readouterr().out


def test_info_imports_neither_torch_nor_h5py(path):
    code = (
        "import sys; from synthkit.cli.bank import main; main(['info', sys.argv[1]]);"
        "print([m for m in ('torch', 'h5py', 'PIL', 'safetensors') if m in sys.modules], file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(synthkit.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code, path], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"
