"""Wrong input, end to end through the command line: a clear typed error, the right exit code, and nothing written."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from workshop import MEAN, STD, config_words, save_teacher, shard_hashes, tree

from synthkit.bank import Bank, BankWriter
from synthkit.bank.make import bank_from_arrays
from synthkit.cli.main import main
from synthkit.models.build import build_model
from synthkit.models.card import ModelCard
from synthkit.runtime import RunDir

METHOD = {
    "student": "lenet5_half", "epochs": 4, "ep_steps": 4, "kd_steps": 1, "batch_size": 16, "nz": 8, "width": 4,
    "depth": 1, "lr_g": 0.02, "snapshots": 2,
}  # fmt: skip


@dataclass
class Shop:
    """What the commands are pointed at; nothing in it may ever change."""

    root: Path
    teacher: Path
    bank: Path
    labelled: Path


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    root = tmp_path_factory.mktemp("shop")
    teacher = save_teacher(root / "teacher")
    rng = np.random.default_rng(0)
    names = [f"class {i}" for i in range(10)]
    images = rng.integers(0, 256, (40, 1, 32, 32), dtype=np.uint8)
    bank_from_arrays(root / "real", images, np.arange(40) % 10, num_classes=10, mean=MEAN, std=STD, class_names=names)
    found = Shop(root, teacher, root / "bank", root / "real")
    assert main(synthesize_words(found, found.bank)) == 0
    return found


def synthesize_words(shop: Shop, out: Path | None, **changes: Any) -> list[str]:
    values: dict[str, Any] = {"teacher": shop.teacher, "images": 44, "images_per_shard": 10, "device": "cpu"}
    values |= {f"method.{key}": value for key, value in METHOD.items()} | ({"out": out} if out else {})
    return ["synthesize", *config_words({**values, **changes})]


def distill_words(shop: Shop, out: Path | None, **changes: Any) -> list[str]:
    values: dict[str, Any] = {
        "bank": shop.bank,
        "student": "lenet5_half",
        "epochs": 1,
        "batch_size": 8,
        "device": "cpu",
    }
    return ["distill", *config_words({**values, **({"out": out} if out else {}), **changes})]


@pytest.fixture
def refused(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`refused(words, code, *said)`: the command fails so, says so in one message, and writes nothing anywhere."""
    monkeypatch.chdir(tmp_path)

    def check(words: list[str], code: int, *said: str) -> str:
        before = tree(tmp_path), tree(shop.root), sorted(p.name for p in tmp_path.rglob("*"))
        capsys.readouterr()
        assert main(words) == code
        captured = capsys.readouterr()
        assert "error: " in captured.err and "Traceback" not in captured.err
        for text in said:
            assert text in captured.err, captured.err
        assert (tree(tmp_path), tree(shop.root), sorted(p.name for p in tmp_path.rglob("*"))) == before
        return captured.err

    return check


Refused = Callable[..., str]


# ---- unknown names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "cudfdk"}, "did you mean 'cudfkd'?"),
        ({"curriculum": "easy2hart"}, "did you mean 'easy2hard'?"),
        ({"teacher": "lenet5_bnn"}, "did you mean 'lenet5_bn'?"),
        ({"teacher": "resnet20@nowhere.pt"}, "nowhere.pt"),
        ({"teacher": "nowhere.yaml"}, "nowhere.yaml"),
        ({"teacher": "no/such/run"}, "no/such/run"),
        ({"method.student": "lenet5_hafl"}, "did you mean 'lenet5_half'?"),
        ({"method.generator": "dcgam"}, "did you mean 'dcgan'?"),
        ({"method.lrg": 1}, "did you mean --method.lr_g?"),
        ({"imags": 1}, "did you mean --images?"),
        ({"method.loss": "kll"}, "did you mean 'kl'?"),
        ({"method.epochs": "many"}, "expected a whole number"),
        ({"images": 0}, "images: must be at least 1"),
        ({"images": -3}, "images: must be at least 1"),
        ({"seed": -1}, "seed"),
        ({"device": "cuda:x"}, "device"),
        ({"eval_data": "mnits:/data"}, "mnist"),
        ({"eval_data": "mnist:/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_synthesize_unknown_names(changes, said, shop, refused, tmp_path):
    words = synthesize_words(shop, tmp_path / "out", **changes)
    if changes.get("method"):  # the options of another method would be refused first
        words = ["synthesize", *config_words({"teacher": shop.teacher, "out": tmp_path / "out", **changes})]
    refused(words, 2, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": "kdd"}, "did you mean 'kd'?"),
        ({"student": "lenet5_hafl"}, "did you mean 'lenet5_half'?"),
        ({"teacher": "lenet5_bnn"}, "did you mean 'lenet5_bn'?"),
        ({"bank": "no_such_bank"}, "no_such_bank"),
        ({"protocol": "cifra"}, "cifar"),
        ({"augment": "crop_filp"}, "crop_flip"),
        ({"loss.temprature": 4}, "did you mean --loss.temperature?"),
        ({"epoch": 4}, "did you mean --epochs?"),
        ({"order": "easy2hart"}, "easy2hard"),
        ({"holdout": 1.5}, "holdout"),
        ({"fresh": -0.5}, "fresh"),
        ({"label_set": "fkd"}, "no such label set"),
        ({"seeds": 0}, "seeds"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": -1}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": -1.0}, "lr"),
        ({"control": "niose"}, "noise"),
        ({"eval_data": "mnits:/data"}, "mnist"),
    ],
)
def test_distill_unknown_names(changes, said, shop, refused, tmp_path):
    refused(distill_words(shop, tmp_path / "out", **changes), 2, said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["synthesise"], "did you mean 'synthesize'?"),
        (["bank", "verfy", "x"], "verify"),
        (["bank", "info", "no_such_bank"], "no_such_bank"),
        (["evaluate", "--model", "lenet5_bnn", "--data", "mnist:x"], "did you mean 'lenet5_bn'?"),
        (["evaluate", "--modle", "lenet5_bn"], "did you mean --model?"),
        (["teach", "--arch", "resnet21", "--data", "mnist:x"], "did you mean 'resnet"),
        (["teach", "--arch", "lenet5", "--data", "mnits:x"], "mnist"),
        (["list", "modles"], "models"),
        (["recipes", "show", "no-such-recipe"], "no-such-recipe"),
        (["bench", "stpes"], "did you mean 'steps'?"),
    ],
)
def test_other_commands_unknown_names(words, said, refused):
    refused(words, 2, said)


def test_unknown_keys_of_a_recipe(shop, refused, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"teacher: {shop.teacher}\nmethod: {{name: cudfkd, lr_gen: 0.1}}\nout: {tmp_path / 'out'}\n")
    refused(["synthesize", "--config", str(recipe)], 2, "method.lr_gen", "did you mean method.lr_g?", "mine.yaml")


# ---- weights ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(shop: Shop) -> dict[str, Path]:
    """Weights files of all sorts."""
    folder = shop.root / "files"
    folder.mkdir()
    network = build_model("lenet5_bn", num_classes=10, in_channels=1, image_size=32, seed=0)
    state = network.state_dict()
    found = {name: folder / f"{name}.pt" for name in ("plain", "whole", "nan", "cut", "text", "attack")}
    torch.save(state, found["plain"])
    torch.save(network, found["whole"])
    first = next(iter(state))
    torch.save({**state, first: state[first] * float("nan")}, found["nan"])
    found["cut"].write_bytes(found["plain"].read_bytes()[:5000])
    found["text"].write_text("not a weights file")
    found["attack"].write_bytes(pickle.dumps(_Attack(folder / "executed"), protocol=2))
    return found


class _Attack:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    ("arch", "name", "said"),
    [
        ("resnet20", "plain", ("do not fit", "missing", "unexpected", "'lenet5_bn'")),
        ("lenet5", "plain", ("do not fit", "unexpected", "'lenet5_bn'")),
        ("lenet5_bn", "whole", ("pickled Python objects", "convert it once")),
        ("lenet5_bn", "attack", ("pickled Python objects",)),
        ("lenet5_bn", "nan", ("NaN or infinity",)),
        ("lenet5_bn", "cut", ("damaged",)),
        ("lenet5_bn", "text", ("damaged or not a torch file",)),
    ],
)
def test_weights_that_cannot_be_used(arch, name, said, shop, files, refused, tmp_path):
    spec = f"{arch}@{files[name]}"
    refused(synthesize_words(shop, tmp_path / "out", teacher=spec), 2, *said)
    if arch == "lenet5_bn":  # looking for the architecture that does fit takes seconds: once is enough
        refused(distill_words(shop, tmp_path / "out", teacher=spec), 2, *said)
        refused(["evaluate", "--model", spec, "--data", f"bank:{shop.labelled}"], 2, *said)
    assert not (shop.root / "files" / "executed").exists()


def test_weights_that_are_not_those_of_the_card(shop, refused, tmp_path):
    card = save_teacher(tmp_path / "other", seed=1)
    shutil.copy(shop.teacher.with_name("teacher.safetensors"), card.with_name("teacher.safetensors"))
    loaded = ModelCard.load(card)
    loaded.sha256 = "0" * 64
    loaded.save(card)
    refused(synthesize_words(shop, tmp_path / "out", teacher=card), 2, "not the file that the card describes")


# ---- classes and sizes -----------------------------------------------------------------------------------------


def test_a_teacher_with_another_number_of_classes(shop, refused, tmp_path):
    seven = save_teacher(tmp_path / "seven", classes=7)
    refused(distill_words(shop, tmp_path / "out", teacher=seven), 2, "7 classes", "10")
    refused(distill_words(shop, tmp_path / "out", student=seven), 2, "7 classes", "10")
    refused(["evaluate", "--model", str(seven), "--data", f"bank:{shop.labelled}"], 2, "7", "10")
    refused(["evaluate", "--model", str(seven), "--data", f"bank:{shop.bank}"], 2, "7", "10")
    words = ["evaluate", "--model", str(shop.teacher), "--teacher", str(seven), "--data", f"bank:{shop.labelled}"]
    refused(words, 2, "7", "10")
    refused(synthesize_words(shop, tmp_path / "out", teacher=seven, eval_data=f"bank:{shop.labelled}"), 2, "7", "10")


def test_a_card_that_says_other_classes_than_the_file(shop, refused, tmp_path):
    card = save_teacher(tmp_path / "seven", classes=7)
    told = ModelCard.load(card)
    told.num_classes, told.class_names, told.sha256 = 10, None, None
    told.save(card)
    refused(synthesize_words(shop, tmp_path / "out", teacher=card), 2, "7 classes", "10")


def test_an_image_size_that_the_teacher_refuses(shop, refused, tmp_path):
    """LeNet-5 takes 32 pixels; a colour teacher is not for a grey bank; depth 4 needs a multiple of 16."""
    card = save_teacher(tmp_path / "odd")
    told = ModelCard.load(card)
    told.input_size = (1, 20, 20)
    told.save(card)
    refused(synthesize_words(shop, tmp_path / "out", teacher=card), 2, "20")
    colour = save_teacher(tmp_path / "colour", channels=3)
    refused(distill_words(shop, tmp_path / "out", teacher=colour), 2, "(3, 32, 32)", "(1, 32, 32)")
    small = save_teacher(tmp_path / "small", "convnet_d2_w8_bn", side=24)
    refused(distill_words(shop, tmp_path / "out", teacher=small), 2, "(1, 24, 24)", "(1, 32, 32)")
    fitting = {"method.depth": 4, "method.student": "convnet_d2_w8_bn"}
    refused(synthesize_words(shop, tmp_path / "out", teacher=small, **fitting), 2, "multiple", "24")


def test_a_student_that_cannot_take_the_images(shop, refused, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    logits = np.random.default_rng(1).normal(size=(40, 10)).astype(np.float16)
    small = bank_from_arrays(
        tmp_path / "small", images, np.arange(40) % 10, num_classes=10, mean=MEAN * 3, std=STD * 3,
        columns={"logits": logits},
    )  # fmt: skip
    refused(distill_words(shop, tmp_path / "out", bank=small.path), 2, "lenet5_half", "8")


# ---- damaged banks ---------------------------------------------------------------------------------------------


def test_a_truncated_shard(shop, refused, tmp_path):
    bank = tmp_path / "bank"
    shutil.copytree(shop.bank, bank)
    shard = BankWriter(bank).shard_path(2)
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(distill_words(shop, tmp_path / "out", bank=bank), 3, "00002.h5", "repair")
    refused(["bank", "verify", str(bank)], 3, "shard 2", "repair")
    refused(["evaluate", "--model", str(shop.teacher), "--data", f"bank:{bank}"], 3, "00002.h5")


def test_a_flipped_bit_is_found_by_verify(shop, refused, tmp_path):
    bank = tmp_path / "bank"
    shutil.copytree(shop.bank, bank)
    shard = BankWriter(bank).shard_path(1)
    data = bytearray(shard.read_bytes())
    data[-200] ^= 4
    shard.write_bytes(bytes(data))
    refused(["bank", "verify", str(bank)], 3, "shard 1", "sha256")


def test_a_bank_without_images(shop, refused, tmp_path):
    bank = tmp_path / "bank"
    shutil.copytree(shop.bank, bank, ignore=shutil.ignore_patterns("shards", "manifest.json", "state"))
    refused(distill_words(shop, tmp_path / "out", bank=bank), 2, "no image yet")


# ---- existing output -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_an_existing_output(resume, shop, refused, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("all I have")
    more = {"resume": True} if resume else {}
    refused(synthesize_words(shop, out, **more), 2, str(out), "another --out")
    refused(distill_words(shop, out, **more), 2, str(out), "another --out")
    teach = ["teach", "--arch", "lenet5", "--data", f"bank:{shop.labelled}", "--out", str(out), "--device", "cpu"]
    refused([*teach, *(["--resume"] if resume else [])], 2, str(out), "another --out")


def test_an_output_that_is_a_file(shop, refused, tmp_path):
    out = tmp_path / "out"
    out.write_text("a file")
    refused(synthesize_words(shop, out), 2, str(out))
    refused(distill_words(shop, out), 2, str(out))
    refused(["bank", "show", str(shop.bank), "--out", str(out)], 2, str(out))


def test_an_existing_bank_without_resume(shop, refused):
    refused(synthesize_words(shop, shop.bank), 2, "--resume")
    refused(synthesize_words(shop, shop.bank, resume=True, seed=5), 2, "seed: 0 -> 5", "another --out")


# ---- NaN -------------------------------------------------------------------------------------------------------


def test_nan_in_training(shop, tmp_path, capsys):
    assert main(synthesize_words(shop, tmp_path / "bank", **{"method.lr": 1e20})) == 1
    said = capsys.readouterr().err
    assert "diverged" in said and "lower --method.lr" in said and "Traceback" not in said
    assert Bank(tmp_path / "bank").verify(deep=True).ok
    assert main(distill_words(shop, tmp_path / "run", lr=1e20, epochs=3)) == 1
    said = capsys.readouterr().err
    assert "not finite" in said and "lower lr" in said and "Traceback" not in said
    assert not list((tmp_path / "run").glob("*.safetensors")) and not (tmp_path / "run" / "card.yaml").exists()
    assert main(["evaluate", "--model", str(tmp_path / "run"), "--data", f"bank:{shop.labelled}"]) == 2
    teach = ["teach", "--arch", "lenet5", "--data", f"bank:{shop.labelled}", "--out", str(tmp_path / "taught")]
    assert main([*teach, "--device", "cpu", "--lr", "1e20", "--epochs", "9", "--batch_size", "8"]) == 1
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "taught" / "card.yaml").exists()


# ---- full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """`file_limit(n)`: from now on the kernel refuses to let any file grow over n bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_synthesize_when_files_cannot_grow(shop, tmp_path, capsys, file_limit):
    big = {"images": 500, "images_per_shard": 400}  # a shard of 400 kB
    file_limit(300_000)
    assert main(synthesize_words(shop, tmp_path / "bank", **big)) == 1
    said = capsys.readouterr().err
    assert "cannot write" in said and "--resume" in said and "Traceback" not in said
    assert_whole_and_clean(tmp_path / "bank")


def test_distill_when_files_cannot_grow(shop, tmp_path, capsys, file_limit):
    file_limit(30_000)
    assert main(distill_words(shop, tmp_path / "run")) == 1
    said = capsys.readouterr().err
    assert "error: " in said and "Traceback" not in said
    assert not temporaries(tmp_path / "run") and not (tmp_path / "run" / "card.yaml").exists()


def assert_whole_and_clean(bank: Path) -> None:
    assert Bank(bank).verify(deep=True).ok
    assert not temporaries(bank)


def temporaries(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if ".tmp-" in p.name]


@pytest.mark.parametrize("nth", range(1, 40, 6))
def test_a_disk_that_fills_up_at_any_write(nth, shop, tmp_path, monkeypatch, capsys):
    """fsync is where a disk with delayed allocation says that it is full."""
    out = tmp_path / "bank"
    calls, honest = 0, os.fsync

    def full(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(synthesize_words(shop, out)) == 1
    said = capsys.readouterr().err
    assert "full" in said or "no space" in said, said
    assert "Traceback" not in said
    if (out / "bank.json").exists():
        assert_whole_and_clean(out)
    assert main(synthesize_words(shop, out, resume=True)) == 0
    assert shard_hashes(out) == shard_hashes(shop.bank)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(kib)`: a file system of that size (where this user may mount one, else an empty folder with a quota
    kept by hand: writes fail with ENOSPC once that much has been synced)."""
    mounted: list[Path] = []
    patch = pytest.MonkeyPatch()

    def make(kib: int) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
        if shutil.which("mount") and subprocess.run(command, capture_output=True, check=False).returncode == 0:
            mounted.append(place)
            return place
        honest = os.fsync

        def fsync(fd: int) -> None:
            used = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
            if used > kib * 1024:
                raise OSError(errno.ENOSPC, "No space left on device")
            honest(fd)

        patch.setattr(os, "fsync", fsync)
        return place

    yield make
    patch.undo()
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_synthesize_on_a_small_disk(shop, small_disk, capsys):
    """Room for the images but not for the states: shards that made it are whole."""
    disk = small_disk(700)
    assert main(synthesize_words(shop, disk / "bank")) == 1
    said = capsys.readouterr().err
    assert ("full" in said or "no space" in said) and "Traceback" not in said
    assert_whole_and_clean(disk / "bank")


def test_distill_on_a_small_disk(shop, small_disk, capsys):
    disk = small_disk(60)
    assert main(distill_words(shop, disk / "run")) == 1
    said = capsys.readouterr().err
    assert ("space" in said or "full" in said) and "Traceback" not in said, said
    assert not temporaries(disk / "run") and not (disk / "run" / "card.yaml").exists()


def test_no_room_for_the_plan_is_known_before_any_work(shop, refused, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    refused(synthesize_words(shop, tmp_path / "bank"), 1, "are free there", "fewer images")


def test_a_folder_that_cannot_be_made(shop, refused, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(synthesize_words(shop, tmp_path / "file" / "bank"), 1, "cannot write")


def test_run_record_of_a_failed_run_says_so(shop, tmp_path):
    assert main(synthesize_words(shop, tmp_path / "bank", **{"method.lr": 1e20})) == 1
    assert RunDir(tmp_path / "bank").read_json("run.json")["status"] == "failed"
