"""Data that others wrote: recognised where it is clear, asked for where it is not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from synthkit.bank.imports import ImportOptions, guess, import_bank
from synthkit.errors import DataError, OutputExistsError, UsageError

rng = np.random.default_rng(0)
PIXELS = rng.integers(0, 256, (23, 6, 5, 3), dtype=np.uint8)  # NHWC
LABELS = np.arange(23) % 4
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.2, 0.1]
NCHW = PIXELS.transpose(0, 3, 1, 2)


def normalised():
    return ((NCHW / 255 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]).astype(np.float32)


def folder(root, images=PIXELS, names=("ant", "bee", "cat", "dog"), suffix="png"):
    for i, image in enumerate(images):
        place = root / names[i % len(names)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:03d}.{suffix}")
    return root


# --- ImageFolder -------------------------------------------------------------------------------------------------


def test_image_folder(tmp_path):
    bank = import_bank(folder(tmp_path / "in"), tmp_path / "b")
    order = sorted(range(23), key=lambda i: (i % 4, i))
    assert np.array_equal(bank.column("images"), NCHW[order]) and bank.column("labels").tolist() == sorted(LABELS)
    assert bank.class_names == ["ant", "bee", "cat", "dog"] and bank.spec.label_kind == "real"
    assert bank.spec.contains_real and bank.spec.real_data_used and bank.spec.recipe["method"] == "import"
    assert str(tmp_path) not in (tmp_path / "b" / "bank.json").read_text()  # no path of this machine


def test_image_folder_with_splits_and_grey_images(tmp_path):
    folder(tmp_path / "in" / "train", PIXELS[:8, :, :, 0])
    folder(tmp_path / "in" / "test", PIXELS[8:12, :, :, 0])
    assert len(import_bank(tmp_path / "in", tmp_path / "all")) == 12
    test = import_bank(tmp_path / "in", tmp_path / "test", options=ImportOptions(split="test"))
    assert test.shape == (1, 6, 5) and len(test) == 4


def test_grey_and_colour_mixed_become_colour_whatever_the_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("synthkit.bank.imports.imagefolder.decode_rows", lambda shape: 2)
    folder(tmp_path / "in", [PIXELS[0, :, :, 0]] * 8 + [PIXELS[1]])
    bank = import_bank(tmp_path / "in", tmp_path / "b")
    assert bank.shape == (3, 6, 5) and len(bank) == 9
    assert np.array_equal(bank[0].images[0], np.repeat(PIXELS[0, :, :, 0][None], 3, axis=0))


def test_sizes_must_be_asked_for(tmp_path):
    folder(tmp_path / "in", [PIXELS[0], PIXELS[1, :5]])
    with pytest.raises(DataError, match=r"differ in size.*5x6.*5x5.*--size"):
        import_bank(tmp_path / "in", tmp_path / "b")
    bank = import_bank(tmp_path / "in", tmp_path / "b", options=ImportOptions(size=(1, 4, 4)))
    assert bank.shape == (1, 4, 4) and len(bank) == 2


def test_class_names_order_the_folders_by_name(tmp_path):
    names = ["dog", "cat", "bee", "ant"]
    bank = import_bank(folder(tmp_path / "in"), tmp_path / "b", options=ImportOptions(class_names=names))
    assert bank.class_names == names and np.bincount(bank.column("labels")).tolist() == [5, 6, 6, 6]
    assert bank[0].labels[0] == 3  # an ant
    with pytest.raises(DataError, match="not among --class-names"):
        import_bank(tmp_path / "in", tmp_path / "c", options=ImportOptions(class_names=["dog", "cat", "bee"]))


def test_a_table_of_files_and_labels(tmp_path):
    (tmp_path / "in" / "pics").mkdir(parents=True)
    lines = ["file,label,difficulty,logit_0,logit_1"]
    for i in range(3):
        Image.fromarray(PIXELS[i]).save(tmp_path / "in" / "pics" / f"{i}.png")
        lines.append(f"pics/{i}.png,{['no', 'yes'][i % 2]},{i / 2},{i},{-i}")
    (tmp_path / "in" / "labels.csv").write_text("\n".join(lines) + "\n")
    bank = import_bank(tmp_path / "in", tmp_path / "b")
    assert bank.class_names == ["no", "yes"] and bank.column("labels").tolist() == [0, 1, 0]
    assert bank.column("difficulty").tolist() == [0, 0.5, 1] and bank.column("logits")[2].tolist() == [2, -2]
    assert np.array_equal(bank.column("images"), NCHW[:3])


# --- arrays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y"), ("data", "targets")])
def test_npz(tmp_path, compressed, names):
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", **{names[0]: PIXELS, names[1]: LABELS})
    bank = import_bank(tmp_path / "a.npz", tmp_path / "b")
    assert np.array_equal(bank.column("images"), NCHW) and bank.column("labels").tolist() == LABELS.tolist()


def test_npz_with_parts_text_labels_and_grey_images(tmp_path):
    names = np.array(["d", "a", "b", "c"])
    np.savez(tmp_path / "a.npz", x_train=PIXELS[:9, :, :, 0], y_train=names[LABELS[:9]], x_test=PIXELS[9:, :, :, 0],
             y_test=names[LABELS[9:]])  # fmt: skip
    bank = import_bank(tmp_path / "a.npz", tmp_path / "b")
    assert bank.shape == (1, 6, 5) and len(bank) == 23 and bank.class_names == ["a", "b", "c", "d"]
    assert bank.column("labels")[:5].tolist() == [3, 0, 1, 2, 3]
    test = import_bank(tmp_path / "a.npz", tmp_path / "t", options=ImportOptions(split="test"))
    assert np.array_equal(test.column("images"), PIXELS[9:, None, :, :, 0])


def test_axes_are_asked_for_when_they_are_not_clear(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3, 9, 3), np.uint8), y=LABELS[:4])
    with pytest.raises(DataError, match="--layout"):
        import_bank(tmp_path / "a.npz", tmp_path / "b")
    assert import_bank(tmp_path / "a.npz", tmp_path / "b", options=ImportOptions(layout="nhwc")).shape == (3, 3, 9)
    np.savez(tmp_path / "c.npz", x=np.zeros((4, 6, 9, 4), np.uint8), y=LABELS[:4])
    with pytest.raises(DataError, match="neither axis"):
        import_bank(tmp_path / "c.npz", tmp_path / "d")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_unit_floats_from_bytes_become_the_bytes(tmp_path, dtype):
    np.savez(tmp_path / "a.npz", x=(NCHW / 255).astype(dtype), y=LABELS)
    bank = import_bank(tmp_path / "a.npz", tmp_path / "b")
    assert np.array_equal(bank.column("images"), NCHW) and not bank.has("images_f16")


def test_unit_floats_between_the_bytes_are_kept(tmp_path):
    x = rng.random((9, 3, 4, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=LABELS[:9])
    bank = import_bank(tmp_path / "a.npz", tmp_path / "b")
    assert np.array_equal(bank.column("images_f16"), x.astype(np.float16)) and bank.spec.transform == {}
    assert np.abs(bank.column("images") / 255 - x).max() <= 0.5 / 255 + 1e-6


def test_byte_floats_and_wide_integers(tmp_path):
    for number, dtype in enumerate([np.float32, np.int64, np.uint16]):
        np.savez(tmp_path / "a.npz", x=NCHW.astype(dtype), y=LABELS)
        assert np.array_equal(import_bank(tmp_path / "a.npz", tmp_path / f"b{number}").column("images"), NCHW)
    np.savez(tmp_path / "a.npz", x=NCHW.astype(np.int64) + 1000, y=LABELS)
    with pytest.raises(DataError, match="0 to 255"):
        import_bank(tmp_path / "a.npz", tmp_path / "c")


def test_normalised_floats_need_mean_and_std(tmp_path):
    np.savez(tmp_path / "a.npz", x=normalised(), y=LABELS)
    with pytest.raises(DataError, match="--mean and --std"):
        import_bank(tmp_path / "a.npz", tmp_path / "b")
    bank = import_bank(tmp_path / "a.npz", tmp_path / "b", options=ImportOptions(mean=MEAN, std=STD))
    assert np.array_equal(bank.column("images"), NCHW) and not bank.has("images_f16")
    assert bank.mean == MEAN and bank.std == STD


def test_normalised_floats_that_left_the_pixels_are_kept_with_their_transform(tmp_path):
    x = rng.normal(size=(9, 3, 4, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=LABELS[:9])
    bank = import_bank(tmp_path / "a.npz", tmp_path / "b", options=ImportOptions(mean=MEAN, std=STD))
    assert np.array_equal(bank.column("images_f16"), x.astype(np.float16)) and bank.spec.transform["kind"] == "affine"
    arrays, _ = bank.transform()
    pixels = x[3] * arrays["std"][:, None, None] + arrays["mean"][:, None, None]
    expected = np.rint(np.clip(pixels, 0, 1) * 255)
    assert np.array_equal(bank[3].images[0], expected) and bank.verify(deep=True).ok


def test_resized_floats_are_rounded(tmp_path):
    np.savez(tmp_path / "a.npz", x=rng.random((9, 3, 8, 8)), y=LABELS[:9])
    bank = import_bank(tmp_path / "a.npz", tmp_path / "b", options=ImportOptions(size=(3, 4, 4)))
    assert bank.shape == (3, 4, 4) and not bank.has("images_f16")


def test_soft_labels(tmp_path):
    logits = rng.normal(size=(23, 4)).astype(np.float32)
    odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for number, (given, exact) in enumerate([(logits, logits), (odds, np.log(odds)), (np.eye(4)[LABELS], None)]):
        np.savez(tmp_path / "a.npz", x=PIXELS, y=given)
        bank = import_bank(tmp_path / "a.npz", tmp_path / f"b{number}")
        if exact is None:
            assert bank.column("labels").tolist() == LABELS.tolist() and not bank.has("logits")
        else:
            assert np.abs(bank.column("logits") - exact).max() < 0.01 and bank.spec.label_kind == "argmax"
            assert bank.column("labels").tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("labels, say", [
    (np.full(23, -1), "not labelled"), (np.full(23, 0.5), "whole numbers"), (np.arange(22), "22"),
    (np.arange(23) * 10**6, "more than 65536 classes"), (np.array([f"f{i}" * 300 for i in range(23)]), "longer than"),
    (np.full(23, np.nan), "whole numbers"), (np.zeros((23, 2, 2)), "must be"),
    (np.arange(46).reshape(23, 2), "no labels"),
])  # fmt: skip
def test_labels_that_are_none(tmp_path, labels, say):
    np.savez(tmp_path / "a.npz", x=PIXELS, y=labels)
    with pytest.raises(DataError, match=say):
        import_bank(tmp_path / "a.npz", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_images_without_labels(tmp_path):
    np.savez(tmp_path / "a.npz", x=PIXELS)
    with pytest.raises(DataError, match="--unlabelled"):
        import_bank(tmp_path / "a.npz", tmp_path / "b")
    bank = import_bank(tmp_path / "a.npz", tmp_path / "b", options=ImportOptions(unlabelled=True, num_classes=7))
    assert bank.columns == ["images"] and bank.num_classes == 7 and bank.spec.label_kind == "none"
    np.savez(tmp_path / "test.npz", x=PIXELS, y=np.full(23, -1))  # the unlabelled test part of many data sets
    assert import_bank(tmp_path / "test.npz", tmp_path / "t", options=ImportOptions(unlabelled=True)).columns == [
        "images"
    ]


def test_class_counts_must_fit(tmp_path):
    np.savez(tmp_path / "a.npz", x=PIXELS, y=LABELS)
    with pytest.raises(DataError, match="labels run to 3"):
        import_bank(tmp_path / "a.npz", tmp_path / "b", options=ImportOptions(class_names=["a", "b"]))
    assert import_bank(tmp_path / "a.npz", tmp_path / "b", options=ImportOptions(num_classes=9)).num_classes == 9


# --- torch and safetensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dict", "tuple", "legacy", "condensation", "folder"])
def test_files_of_dataset_distillation(tmp_path, form):
    import torch

    images, labels, rate = torch.from_numpy(normalised()), torch.from_numpy(LABELS), torch.tensor(0.03)
    src = tmp_path / "a.pt"
    if form == "dict":
        torch.save({"images": images, "labels": labels, "lr": rate}, src)
    elif form == "tuple":
        torch.save((images, labels, rate), src)
    elif form == "legacy":
        torch.save({"images": images, "labels": labels, "lr": rate}, src, _use_new_zipfile_serialization=False)
    elif form == "condensation":
        torch.save({"data": [[images * 0, labels], [images, labels]], "accs_all_exps": {"ConvNet": [0.1]}}, src)
    else:
        src = tmp_path / "run"
        src.mkdir()
        for name, value in (("images", images), ("labels", labels), ("lr", rate)):
            torch.save(value, src / f"{name}_best.pt")
            torch.save(value * 0, src / f"{name}_last.pt")
    assert guess(src) == "pt"
    bank = import_bank(src, tmp_path / "b", options=ImportOptions(mean=MEAN, std=STD, real=False))
    assert np.array_equal(bank.column("images"), NCHW) and bank.column("labels").tolist() == LABELS.tolist()
    assert bank.spec.label_kind == "target" and not bank.spec.contains_real and bank.spec.real_data_used
    if form != "condensation":
        assert bank.sidecars[-1].raw["meta"]["learning_rate"] == pytest.approx(0.03)


def test_safetensors_with_names_in_the_metadata(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"images": torch.from_numpy(NCHW.copy()), "labels": torch.from_numpy(LABELS)}, tmp_path / "a.safetensors",
              metadata={"class_names": '["w", "x", "y", "z"]'})  # fmt: skip
    bank = import_bank(tmp_path / "a.safetensors", tmp_path / "b")
    assert np.array_equal(bank.column("images"), NCHW) and bank.class_names == ["w", "x", "y", "z"]


# --- parquet and tar ---------------------------------------------------------------------------------------------


def test_parquet_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["w", "x", "y", "z"])})
    rows = {"img": [Image.fromarray(p) for p in PIXELS], "label": LABELS.tolist()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train-00000.parquet")
    bank = import_bank(tmp_path, tmp_path / "b", "parquet")
    assert np.array_equal(bank.column("images"), NCHW) and bank.class_names == ["w", "x", "y", "z"]
    assert bank.column("labels").tolist() == LABELS.tolist()


def test_tar_of_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a-000.tar")) as sink:
        for i, image in enumerate(PIXELS):
            sink.write({"__key__": f"k{i:03d}", "png": Image.fromarray(image), "cls": int(LABELS[i]), "txt": "more"})
    bank = import_bank(tmp_path / "a-000.tar", tmp_path / "b")
    assert np.array_equal(bank.column("images"), NCHW) and bank.column("labels").tolist() == LABELS.tolist()


# --- the target --------------------------------------------------------------------------------------------------


def test_an_existing_target_is_never_touched(tmp_path):
    np.savez(tmp_path / "a.npz", x=PIXELS, y=LABELS)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        import_bank(tmp_path / "a.npz", tmp_path / "b")
    assert (tmp_path / "b" / "mine.txt").read_text() == "mine"


def test_contradictions_are_usage_errors():
    for options in ({"mean": [0.5]}, {"size": (4, 8, 8)}, {"data_free": True}, {"data_free": True, "real": True}):
        with pytest.raises(UsageError):
            ImportOptions(**options)


def test_many_shards_and_any_chunks_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr("synthkit.bank.imports.write.SHARD_BYTES", 90 * 4)
    monkeypatch.setattr("synthkit.bank.imports.arrays.chunk_rows", lambda row_bytes: 3)
    np.savez(tmp_path / "a.npz", x=PIXELS, y=LABELS)
    bank = import_bank(tmp_path / "a.npz", tmp_path / "b")
    assert len(bank.sidecars) == 6 and np.array_equal(bank.column("images"), NCHW)
