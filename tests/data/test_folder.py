"""ImageFolder: split rule, class order by name, mixed and bad images."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synthkit.data import decode
from synthkit.data.specs import load_data
from synthkit.errors import DataError


def picture(path: Path, value: int = 0, size: tuple[int, int] = (4, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, value, 0)).save(path)


def test_classes_are_the_sorted_folders(tmp_path):
    for i, name in enumerate(["zebra", "ant", "Bee"]):
        picture(tmp_path / name / "0.png", i)
    data = load_data(f"imagefolder:{tmp_path}", "all")
    assert data.class_names == ["Bee", "ant", "zebra"]
    assert {int(image[0, 0, 0]): int(label) for image, label in zip(data.images, data.labels, strict=True)} == {
        0: 2,
        1: 1,
        2: 0,
    }
    assert data.shape == (3, 4, 4) and data.notes == ()


def test_split_folders(tmp_path):
    for split, names in (("train", "ab"), ("val", "b"), ("test", "c")):
        for name in names:
            picture(tmp_path / split / name / "0.jpg")
    spec = f"imagefolder:{tmp_path}"
    assert [len(load_data(spec, s)) for s in ("train", "test", "all")] == [2, 1, 4]
    # the classes of one split are numbered like those of the other
    test = load_data(spec, "test")
    assert test.class_names == ["a", "b", "c"] and test.labels.tolist() == [2] and test.split == "test"


def test_val_stands_in_for_test_but_never_for_train(tmp_path):
    picture(tmp_path / "validation" / "a" / "0.png")
    assert load_data(f"imagefolder:{tmp_path}", "test").split == "val"
    with pytest.raises(DataError, match="has no train part; got .'val'."):
        load_data(f"imagefolder:{tmp_path}", "train")


def test_a_named_split_contradicting_the_one_asked_for(tmp_path):
    picture(tmp_path / "train" / "a" / "0.png")
    spec = f"imagefolder:{tmp_path}/train"
    assert load_data(spec, "train").split == "train"
    assert load_data(spec, "all").split == "train"
    with pytest.raises(DataError, match="is the train part, but split 'test' is asked for; use --split train"):
        load_data(spec, "test")


def test_a_folder_without_splits_is_used_whole_and_says_so(tmp_path):
    picture(tmp_path / "a" / "0.png")
    data = load_data(f"imagefolder:{tmp_path}", "test")
    assert data.split == "all" and "not divided" in data.notes[0]


def test_standard_classes_are_matched_by_name(tmp_path):
    # sorted: Car, ship, airplane-like names stand in another order than CIFAR-10's labels
    for value, name in enumerate(["Truck", "plane", "Car", "cat"]):
        picture(tmp_path / "test" / name / "0.png", value)
    data = load_data(f"cifar10:{tmp_path}")
    assert data.class_names[9] == "truck" and len(data.class_names) == 10
    found = {int(image[0, 0, 0]): int(label) for image, label in zip(data.images, data.labels, strict=True)}
    assert found == {0: 9, 1: 0, 2: 1, 3: 3}
    assert "no folder for bird, deer" in data.notes[0]


def test_numbered_folders_of_a_standard_set(tmp_path):
    for name in ("0", "9", "3"):
        picture(tmp_path / name / "x.png", int(name), mode="L")
    data = load_data(f"mnist:{tmp_path}", "all")
    assert data.shape == (1, 4, 4)
    assert data.labels.tolist() == data.images[:, 0, 0, 0].tolist() == [0, 3, 9]


def test_unknown_class_folder(tmp_path):
    picture(tmp_path / "hors" / "0.png")
    with pytest.raises(DataError, match="'hors' is not a class.*did you mean 'horse'"):
        load_data(f"cifar10:{tmp_path}")


def test_two_folders_of_one_class(tmp_path):
    picture(tmp_path / "car" / "0.png")
    picture(tmp_path / "automobile" / "0.png")
    with pytest.raises(DataError, match="same class"):
        load_data(f"cifar10:{tmp_path}", "all")


def test_different_sizes_need_a_size(tmp_path):
    picture(tmp_path / "a" / "0.png")
    picture(tmp_path / "a" / "1.png", size=(6, 4))
    with pytest.raises(DataError, match=r"differ in size: .*0.png is 4x4, .*1.png is 6x4; give size="):
        load_data(f"imagefolder:{tmp_path}", "all")
    assert load_data(f"imagefolder:{tmp_path}", "all", size=(3, 4, 4)).shape == (3, 4, 4)


def test_grey_stays_grey_unless_one_image_has_colour(tmp_path):
    picture(tmp_path / "a" / "0.png", 7, mode="L")
    picture(tmp_path / "a" / "1.png", 9, mode="L")
    assert load_data(f"imagefolder:{tmp_path}", "all").shape == (1, 4, 4)
    picture(tmp_path / "a" / "2.png", 200)
    data = load_data(f"imagefolder:{tmp_path}", "all")
    assert data.images[:, :, 0, 0].tolist() == [[7, 7, 7], [9, 9, 9], [200, 200, 0]]


def test_colour_to_grey_is_the_luma(tmp_path):
    picture(tmp_path / "a" / "0.png", 100)
    data = load_data(f"imagefolder:{tmp_path}", "all", size=(1, 4, 4))
    assert set(data.images.flatten().tolist()) == {round(100 * (0.299 + 0.587))}


def test_many_images_in_threads_keep_their_order(tmp_path):
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 256, (600, 5, 5, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    for i, array in enumerate(wanted):
        Image.fromarray(array).save(tmp_path / "a" / f"{i:04d}.png")
    data = load_data(f"imagefolder:{tmp_path}", "all")
    assert torch.equal(data.images, torch.from_numpy(wanted).permute(0, 3, 1, 2))


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_images(tmp_path):
    file = tmp_path / "a" / "0.png"
    picture(file, size=(64, 64))
    whole = file.read_bytes()
    file.write_bytes(b"not an image")
    with pytest.raises(DataError, match="0.png: not a readable image"):
        load_data(f"imagefolder:{tmp_path}", "all")
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="0.png: (cannot be decoded|not a readable)"):
        load_data(f"imagefolder:{tmp_path}", "all")
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(file)
    with pytest.raises(DataError, match="16 or 32 bit"):
        load_data(f"imagefolder:{tmp_path}", "all")


def test_a_decompression_bomb_is_refused_before_decoding(tmp_path, monkeypatch):
    file = tmp_path / "a" / "0.png"
    file.parent.mkdir()
    file.write_bytes(png_claiming(60_000, 60_000))
    with pytest.raises(DataError, match="0.png"):
        load_data(f"imagefolder:{tmp_path}", "all")
    file.write_bytes(png_claiming(9_000, 9_000))
    monkeypatch.setattr(decode, "_pixels", lambda *a: pytest.fail("decoded"))
    with pytest.raises(DataError, match="9000x9000 pixels are above the limit"):
        load_data(f"imagefolder:{tmp_path}", "all")


def test_folders_without_images(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="nothing that fits"):
        load_data(f"imagefolder:{tmp_path}", "all")
    picture(tmp_path / "b" / "0.png")
    data = load_data(f"imagefolder:{tmp_path}", "all")
    assert data.class_names == ["a", "b"] and "holds no image" in data.notes[0]
