"""Data specs: every form that `load_data` reads, written here by hand, and what goes wrong."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit.data import real
from synthkit.data.specs import load_data, parse_spec
from synthkit.data.stats import CLASS_NAMES, STATS
from synthkit.errors import DataError, RequirementError

RNG = np.random.default_rng(7)


def pixels(n: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (n, *shape), dtype=np.uint8)


# --- the spec itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cifar10", "cifar10:DIR"),
        ("cifr10:x", "did you mean 'cifar10'"),
        ("zebra:x", "allowed: mnist"),
        ("mnist:", "needs a path"),
        ("/some/where", "KIND:PATH"),
        ("C:\\data", "KIND:PATH"),
    ],
)
def test_bad_spec(spec, words):
    with pytest.raises(DataError, match=words.replace("\\", r"\\")):
        parse_spec(spec)


def test_bad_split_and_size(tmp_path):
    with pytest.raises(DataError, match="did you mean 'test'"):
        load_data(f"cifar10:{tmp_path}", "tests")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="C 1 or 3"):
        load_data(f"cifar10:{tmp_path}", size=(2, 8, 8))


def test_path_that_is_not_there_names_its_neighbour(tmp_path):
    (tmp_path / "cifar").mkdir()
    with pytest.raises(DataError, match=r"did you mean 'cifar'"):
        load_data(f"cifar10:{tmp_path}/cifra/deeper")


def test_a_bare_path_gets_a_guess(tmp_path):
    write_mnist(tmp_path, "raw", "-", "")
    with pytest.raises(DataError, match=f"try mnist:{tmp_path}"):
        load_data(str(tmp_path))


def test_folder_with_nothing_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds notes.txt.*cifar-10-batches-py/; cifar-10-batches-bin/"):
        load_data(f"cifar10:{tmp_path}")


def test_tables_agree():
    assert [len(CLASS_NAMES[k]) for k in ("mnist", "cifar10", "cifar100")] == [10, 10, 100]
    assert CLASS_NAMES["cifar100"] == sorted(set(CLASS_NAMES["cifar100"]))
    assert all(len(mean) == len(std) for mean, std in STATS.values())
    assert STATS["cifar10"] == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


# --- mnist ------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(root: Path, below: str, separator: str, ending: str, n: int = 5) -> dict[str, np.ndarray]:
    folder = root / below
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, count in (("train", n), ("t10k", n - 2)):
        for kind, array in (("images", pixels(count, 28, 28)), ("labels", RNG.integers(0, 10, count, dtype=np.uint8))):
            arrays[f"{part}-{kind}"] = array
            rank = array.ndim
            data = idx(array)
            name = f"{part}-{kind}{separator}idx{rank}-ubyte{ending}"
            (folder / name).write_bytes(gzip.compress(data) if ending else data)
    return arrays


@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize(("separator", "ending"), [("-", ""), ("-", ".gz"), (".", "")])
def test_mnist(tmp_path, below, separator, ending):
    arrays = write_mnist(tmp_path, below, separator, ending)
    test, train, everything = (load_data(f"mnist:{tmp_path}", split) for split in ("test", "train", "all"))
    assert torch.equal(test.images[:, 0], torch.from_numpy(arrays["t10k-images"]))
    assert train.labels.tolist() == arrays["train-labels"].tolist()
    assert len(everything) == len(train) + len(test) and everything.split == "all"
    assert test.shape == (1, 28, 28) and test.class_names == list("0123456789") and test.notes == ()


def test_mnist_resized_and_in_colour(tmp_path):
    write_mnist(tmp_path, "", "-", "")
    data = load_data(f"mnist:{tmp_path}", size=(3, 32, 32))
    assert data.images.shape == (3, 3, 32, 32) and data.images.dtype == torch.uint8
    assert torch.equal(data.images[:, 0], data.images[:, 2])
    assert data.stored_shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x00\x00\x0d\x03" + b"\x00" * 40, "not an idx file"),
        (b"\x00\x00", "not an idx file"),
        (idx(np.zeros((3, 28, 28), np.uint8))[:-1], "get the file again"),
        (b"\x00\x00\x08\x03" + struct.pack(">3I", 2**31, 2**31, 2**31), "shorter than its header"),
        (idx(np.zeros((4, 28, 28), np.uint8)), "4 images but 3 labels"),
    ],
)
def test_damaged_idx(tmp_path, content, words):
    write_mnist(tmp_path, "", "-", "")
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_data(f"mnist:{tmp_path}")


def test_damaged_gzip(tmp_path):
    write_mnist(tmp_path, "", "-", ".gz")
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        load_data(f"mnist:{tmp_path}")
    huge = b"\x00\x00\x08\x03" + struct.pack(">3I", 2**31, 2**12, 2**12)
    file.write_bytes(gzip.compress(huge))
    with pytest.raises(DataError, match="free memory"):
        load_data(f"mnist:{tmp_path}")


def test_missing_mnist_part(tmp_path):
    write_mnist(tmp_path, "", "-", "")
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    assert len(load_data(f"mnist:{tmp_path}", "train")) == 5
    with pytest.raises(DataError, match="has no t10k-labels-idx1-ubyte"):
        load_data(f"mnist:{tmp_path}", "test")


# --- cifar ------------------------------------------------------------------------------------------------------------


def write_cifar10_python(folder: Path, protocol: int, key=str) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    arrays = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        data, labels = pixels(3, 3072), RNG.integers(0, 10, 3).tolist()
        arrays[name] = data
        batch = {key("data"): data, key("labels"): labels, key("filenames"): ["a.png", "b.png", "c.png"]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return arrays


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("key", [str, str.encode])
def test_cifar10_python_batches(tmp_path, protocol, key):
    arrays = write_cifar10_python(tmp_path / "cifar-10-batches-py", protocol, key)
    train = load_data(f"cifar10:{tmp_path}", "train")
    assert train.images.shape == (15, 3, 32, 32)
    assert torch.equal(train.images[3:6].flatten(1), torch.from_numpy(arrays["data_batch_2"]))
    assert len(load_data(f"cifar10:{tmp_path}/cifar-10-batches-py", "test")) == 3


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10_python(folder, 4)
    trap = tmp_path / "trap"
    (folder / "test_batch").write_bytes(pickle.dumps({"data": Evil(trap), "labels": []}))
    with pytest.raises(DataError, match=r"it asks for posix.mkdir|it asks for nt.mkdir"):
        load_data(f"cifar10:{tmp_path}")
    assert not trap.exists()
    # even the allowed names may only be used in the way numpy's own pickles use them
    (folder / "test_batch").write_bytes(b"cnumpy\ndtype\n(S'O8'\ntR.")
    with pytest.raises(DataError, match="array of type"):
        load_data(f"cifar10:{tmp_path}")
    (folder / "test_batch").write_bytes(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I999999\ntS'b'\ntR.")
    with pytest.raises(DataError, match="unusual way"):
        load_data(f"cifar10:{tmp_path}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"garbage", "refused|damaged"),
        (pickle.dumps([1, 2]), "instead of a dict"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}), "no 'labels' inside"),
        (pickle.dumps({"data": np.zeros((2, 7), np.uint8), "labels": [0, 1]}), r"not uint8 \(N, 3072\)"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "one label per image"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}), "labels run from 0 to 10"),
    ],
)
def test_damaged_cifar_batch(tmp_path, content, words):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10_python(folder, 4)
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_data(f"cifar10:{tmp_path}")


def test_missing_cifar_batch(tmp_path):
    write_cifar10_python(tmp_path / "cifar-10-batches-py", 4)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(DataError, match="has no data_batch_3"):
        load_data(f"cifar10:{tmp_path}", "train")


def test_cifar100_takes_the_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    data = pixels(2, 3072)
    for name in ("train", "test"):
        batch = {"data": data, "fine_labels": [99, 5], "coarse_labels": [1, 2]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    found = load_data(f"cifar100:{tmp_path}")
    assert found.labels.tolist() == [99, 5] and found.class_names[99] == "worm"


def test_cifar_binary(tmp_path):
    ten, hundred = tmp_path / "cifar-10-batches-bin", tmp_path / "cifar-100-binary"
    ten.mkdir()
    hundred.mkdir()
    image = pixels(2, 3072)
    rows = np.concatenate([np.array([[7], [2]], np.uint8), image], 1)
    (ten / "test_batch.bin").write_bytes(rows.tobytes())
    found = load_data(f"cifar10:{tmp_path}")
    assert found.labels.tolist() == [7, 2] and torch.equal(found.images.flatten(1), torch.from_numpy(image))
    rows = np.concatenate([np.array([[1, 77], [1, 3]], np.uint8), image], 1)
    (hundred / "test.bin").write_bytes(rows.tobytes())
    assert load_data(f"cifar100:{tmp_path}").labels.tolist() == [77, 3]
    (ten / "test_batch.bin").write_bytes(rows.tobytes()[:-5])
    with pytest.raises(DataError, match="not a multiple of 3073"):
        load_data(f"cifar10:{tmp_path}")


# --- npz, bank, hub ---------------------------------------------------------------------------------------------------


def test_npz_forms(tmp_path):
    images, labels = pixels(4, 8, 8, 3), np.array([0, 1, 2, 0])
    file = tmp_path / "a.npz"
    np.savez(file, images=images, labels=labels, class_names=np.array(["a", "b", "c"]))
    found = load_data(f"npz:{file}", "test")
    assert torch.equal(found.images, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert found.class_names == ["a", "b", "c"] and "not divided" in found.notes[0]
    np.savez(file, x_train=images, y_train=labels, x_test=images[:1, ..., 0], y_test=labels[:1])
    assert load_data(f"npz:{file}", "test").shape == (1, 8, 8)
    assert len(load_data(f"npz:{file}", "train")) == 4
    np.savez(file, train_images=images.transpose(0, 3, 1, 2), train_labels=labels[:, None])
    assert load_data(f"npz:{file}", "train").shape == (3, 8, 8)
    with pytest.raises(DataError, match="has no test part"):
        load_data(f"npz:{file}", "test")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": np.zeros(3)}, "expected images and labels"),
        ({"x": np.zeros((2, 4, 4, 3), np.float32), "y": np.zeros(2, int)}, "must be uint8"),
        ({"x": np.zeros((2, 4, 4, 5), np.uint8), "y": np.zeros(2, int)}, "neither axis"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": np.array([0.5, 1.5])}, "neither whole numbers"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": np.array([0, -1])}, "not labelled"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": np.zeros(3, int)}, "labels of shape"),
        ({"x": np.array([{}, {}], dtype=object), "y": np.zeros(2, int)}, "not a plain npz"),
    ],
)
def test_bad_npz(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=words):
        load_data(f"npz:{tmp_path}/a.npz", "all")


def test_a_file_that_is_no_npz(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match="not a plain npz"):
        load_data(f"npz:{tmp_path}/a.npz")


@pytest.mark.parametrize("kind", ["argmax", "real"])
def test_bank(tmp_path, kind):
    from synthkit.bank import BankSpec, BankWriter

    spec = BankSpec(
        shape=(3, 8, 8), num_classes=3, class_names=["a", "b", "c"], mean=[0.5] * 3, std=[0.5] * 3, images=6,
        images_per_shard=3, label_kind=kind,
    )  # fmt: skip
    writer = BankWriter.create(tmp_path / "bank", spec)
    images, labels = pixels(6, 3, 8, 8), np.array([0, 1, 2, 2, 1, 0], np.int32)
    for i in range(2):
        rows = slice(3 * i, 3 * i + 3)
        writer.write_shard(i, {"images": images[rows], "labels": labels[rows]}, {})
    found = load_data(f"bank:{tmp_path}/bank")
    assert torch.equal(found.images, torch.from_numpy(images)) and found.labels.tolist() == labels.tolist()
    assert found.label_source == kind and found.class_names == ["a", "b", "c"]
    assert ("not real labels" in " ".join(found.notes)) == (kind == "argmax")
    assert load_data(f"bank:{tmp_path}/bank", size=(1, 4, 4)).shape == (1, 4, 4)


def test_a_folder_that_is_no_bank(tmp_path):
    with pytest.raises(DataError, match=r"no bank.json"):
        load_data(f"bank:{tmp_path}")
    with pytest.raises(DataError, match="does not exist"):
        load_data(f"bank:{tmp_path}/nope")


def test_hub_needs_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequirementError, match="pip install datasets"):
        load_data("hf:cifar10")


def test_hub_through_a_stand_in(monkeypatch):
    import io

    from PIL import Image as Pillow

    def png(value: int) -> bytes:
        buffer = io.BytesIO()
        Pillow.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    class Image:
        def __init__(self, decode=True):
            self.decode = decode

    class ClassLabel:
        names = ["no", "yes"]

    class Part(dict):
        features = {"img": Image(), "label": ClassLabel()}

        def cast_column(self, name, kind):
            assert name == "img" and not kind.decode
            return self

    library = types.ModuleType("datasets")
    part = Part(img=[{"bytes": png(9), "path": None}, {"bytes": png(4), "path": None}], label=[1, 0])
    asked = {}

    def load_dataset(repo, revision):
        asked.update(repo=repo, revision=revision)
        if repo == "gone":
            raise FileNotFoundError("no such dataset")
        return {"train": part, "validation": part}

    library.Image, library.load_dataset = Image, load_dataset  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "datasets", library)
    found = load_data("hf:org/name@main", "test")
    assert asked == {"repo": "org/name", "revision": "main"}
    assert found.images[:, 0, 0, 0].tolist() == [9, 4] and found.labels.tolist() == [1, 0]
    assert found.class_names == ["no", "yes"] and found.split == "val"
    with pytest.raises(DataError, match="cannot be loaded"):
        load_data("hf:gone")


# --- memory -----------------------------------------------------------------------------------------------------------


def test_more_than_the_free_memory_is_refused(tmp_path, monkeypatch):
    write_mnist(tmp_path, "", "-", "")
    monkeypatch.setattr(real, "free_memory", lambda: 10_000)
    with pytest.raises(DataError, match=r"3 images of \(1, 100, 100\) need .* free memory"):
        load_data(f"mnist:{tmp_path}", size=(1, 100, 100))


def test_free_memory_is_a_number_of_bytes():
    assert 1 << 20 < real.free_memory() < 1 << 50
