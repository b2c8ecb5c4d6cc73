"""Files that run code when they are unpickled: weights, whole models, npz object arrays, .pt banks, archives."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from synthkit.bank import Bank, state
from synthkit.bank.imports import import_bank
from synthkit.cli.main import main
from synthkit.data.specs import load_data
from synthkit.errors import DataError, SynthkitError, UsageError, WeightsError

from .forge import memory_bounded, nothing_written, small_bank

torch = pytest.importorskip("torch")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "executed"


def payloads(mark: Path) -> dict[str, bytes]:
    """The same evil in every container that looks like weights or tensors."""
    found = {f"protocol {n}": pickle.dumps(Evil(mark), protocol=n) for n in range(2, 6)}
    for name, value in {
        "in a dict": {"state_dict": {"w": Evil(mark)}}, "beside tensors": {"w": torch.zeros(2), "x": Evil(mark)},
        "in a tuple": (torch.zeros(4, 1, 8, 8), Evil(mark), 0.1),
    }.items():  # fmt: skip
        for zipped in (True, False):
            stream = io.BytesIO()
            torch.save(value, stream, _use_new_zipfile_serialization=zipped)
            found[f"{name}, {'zip' if zipped else 'old'}"] = stream.getvalue()
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Evil(mark)))
        archive.writestr("a/version", "3\n")
        archive.writestr("a/../../../escaped", "x")
    found["zip by hand"] = zipped.getvalue()
    found["by name"] = b"cos\nsystem\n(S'mkdir " + os.fsencode(mark) + b"'\ntR."
    found["build"] = b"\x80\x02cbuiltins\nexec\n(X\x09\x00\x00\x00import ostR."
    return found


NAMES = list(payloads(Path("x")))


def test_the_payloads_are_real(mark):
    """Proof that they would run: unpickled without care, they do."""
    pickle.loads(payloads(mark)["protocol 2"])
    assert mark.exists()


@pytest.mark.parametrize("name", NAMES)
def test_weights(tmp_path, mark, name):
    from synthkit.models.weights import read_state_dict

    data = payloads(mark)[name]
    for suffix in (".pt", ".pth", ".th", ".bin", ".ckpt", ".safetensors"):
        file = tmp_path / f"weights{suffix}"
        file.write_bytes(data)
        with nothing_written(tmp_path), pytest.raises(WeightsError):
            read_state_dict(file)
    assert main(["evaluate", "--model", f"lenet5@{tmp_path / 'weights.pt'}", "--data", "mnist:/nowhere"]) == 2
    assert not mark.exists() and not (tmp_path.parent / "escaped").exists()


@pytest.mark.parametrize("name", NAMES)
def test_pt_import(tmp_path, mark, name):
    for file in ("x.pt", "images_best.pt"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / file).write_bytes(payloads(mark)[name])
    for source in (tmp_path / "in" / "x.pt", tmp_path / "in"):
        with nothing_written(tmp_path), pytest.raises(DataError):
            import_bank(source, tmp_path / "out", "pt")
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_whole_model_gets_the_conversion(tmp_path):
    from synthkit.models.build import build_model
    from synthkit.models.weights import read_state_dict

    network = build_model("lenet5_bn", num_classes=10, in_channels=1, image_size=32, seed=0)
    evil_name = tmp_path / "a'; touch owned; '.pt"
    for file in (tmp_path / "model.pt", evil_name):
        torch.save(network, file)
        with pytest.raises(WeightsError, match="convert it once") as caught:
            read_state_dict(file)
    import shlex

    command = str(caught.value).splitlines()[-1]
    words = shlex.split(command)
    assert words[:2] == ["python", "-c"] and len(words) == 3  # the name of the file does not break out of its quotes
    compile(words[2], "x", "exec")


def _npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_npz_with_objects(tmp_path, mark):
    images = np.zeros((4, 1, 8, 8), "u1")
    evil = np.array([Evil(mark)] * 4, dtype=object)
    (tmp_path / "in").mkdir()
    for number, arrays in enumerate((
        {"images": images, "labels": evil}, {"images": evil, "labels": np.arange(4)},
        {"images": images, "labels": np.arange(4), "class_names": evil},
        {"images": images, "labels": np.arange(4), "logits": evil},
    )):  # fmt: skip
        file = _npz(tmp_path / "in" / f"{number}.npz", **arrays)
        with nothing_written(tmp_path), pytest.raises(SynthkitError):
            import_bank(file, tmp_path / "out")
        if number < 3:
            with nothing_written(tmp_path), pytest.raises(SynthkitError):
                load_data(f"npz:{file}", "all")
    assert not mark.exists()


def test_npy_in_a_tar(tmp_path, mark):
    stream = io.BytesIO()
    np.save(stream, np.array([Evil(mark)], dtype=object), allow_pickle=True)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (("0.npy", stream.getvalue()), ("0.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with nothing_written(tmp_path), pytest.raises(DataError):
        import_bank(tmp_path / "x.tar", tmp_path / "out")
    assert not mark.exists()


def test_pickles_in_a_bank_are_never_opened(tmp_path, mark):
    """Whatever lies in a bank's folder under whatever name: no reader of a bank unpickles."""
    writer = small_bank(tmp_path / "bank")
    writer.save_state(0, {"w": np.zeros(3)}, {})
    data = payloads(mark)["protocol 4"]
    for name in ("state.pkl", "generators.pt", "state/00000.pkl", "shards/00000.pkl", "x.npy"):
        (tmp_path / "bank" / name).write_bytes(data)
    (tmp_path / "bank" / "state" / "00000.safetensors").write_bytes(data)
    report = writer_verify(tmp_path / "bank")
    assert report.problems and not mark.exists()
    with pytest.warns(UserWarning, match="damaged"):
        assert state.newest_state(tmp_path / "bank" / "state", 9) is None
    assert len(Bank(tmp_path / "bank")) == 20


def writer_verify(path: Path):
    from synthkit.bank.checking.verify import verify

    return verify(path, deep=True)


def test_objects_are_not_written_either(tmp_path, mark):
    writer = small_bank(tmp_path / "bank")
    with pytest.raises(UsageError):
        writer.save_state(0, {"w": np.array([Evil(mark)], dtype=object)}, {})


def test_run_checkpoints(tmp_path, mark):
    """`--resume` of a run folder from somebody else."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("checkpoint.pt", "state.pt", "optimizer.bin", "random_states_0.pkl", "model.safetensors"):
        (run / name).write_bytes(payloads(mark)["protocol 4"])
    (run / "run.json").write_text("{}")
    with memory_bounded(900 << 20):
        for words in (["evaluate", "--model", str(run), "--data", "mnist:/nowhere"], ["report", str(run)]):
            main([*words, *(["--out", str(tmp_path / "r.html")] if words[0] == "report" else [])])
    assert not mark.exists()
