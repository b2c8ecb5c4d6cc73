"""Parquet in the Hugging Face layout."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from synthkit.data.specs import load_data
from synthkit.errors import DataError, RequirementError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(value: int, size: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, labels: list, image: str = "img", label: str = "label", metadata: dict | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.array([{"bytes": png(i), "path": None} for i in range(len(labels))])
    table = pa.table({image: struct, label: pa.array(labels)})
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)


def hf(names: list[str], label: str = "label") -> dict[str, str]:
    features = {"img": {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def test_one_file(tmp_path):
    write(tmp_path / "any.parquet", [1, 0, 2], metadata=hf(["x", "y", "z"]))
    data = load_data(f"parquet:{tmp_path}/any.parquet", "all")
    assert data.images[:, :, 0, 0].tolist() == [[0, 2, 3], [1, 2, 3], [2, 2, 3]]
    assert data.labels.tolist() == [1, 0, 2] and data.class_names == ["x", "y", "z"] and data.notes == ()
    assert "tells no split" in load_data(f"parquet:{tmp_path}/any.parquet", "test").notes[0]


def test_splits_by_file_name_and_glob(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", [1])
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", [0, 0, 0, 1])
    spec = f"parquet:{tmp_path}"
    assert [len(load_data(spec, s)) for s in ("train", "test", "all")] == [3, 4, 7]
    assert load_data(spec, "train").labels.tolist() == [0, 1, 1]
    assert len(load_data(f"parquet:{tmp_path}/data/*.parquet", "test")) == 4
    only_train = f"parquet:{tmp_path}/data/train-*.parquet"
    assert load_data(only_train, "train").split == "train"
    with pytest.raises(DataError, match="is the train part"):
        load_data(only_train, "test")
    with pytest.raises(DataError, match="is the train part"):
        load_data(f"parquet:{tmp_path}/data/train-00001-of-00002.parquet", "test")


def test_splits_by_folder_name(tmp_path):
    write(tmp_path / "plain_text" / "train" / "0000.parquet", [0, 1, 1])
    write(tmp_path / "plain_text" / "test" / "0000.parquet", [0])
    assert [len(load_data(f"parquet:{tmp_path}", s)) for s in ("train", "test")] == [3, 1]


def test_a_standard_set_brings_its_names(tmp_path):
    write(tmp_path / "test.parquet", [3, 9])
    data = load_data(f"cifar10:{tmp_path}")
    assert [data.class_names[i] for i in data.labels] == ["cat", "truck"]
    assert load_data(f"cifar10:{tmp_path}/test.parquet").name == "cifar10"
    write(tmp_path / "test.parquet", [3, 10])
    with pytest.raises(DataError, match="labels run from 3 to 10, but there are 10 classes"):
        load_data(f"cifar10:{tmp_path}")


def test_names_from_the_schema_or_beside(tmp_path):
    write(tmp_path / "a" / "x.parquet", [0, 1], metadata={"class_names": "red,blue"})
    assert load_data(f"parquet:{tmp_path}/a", "all").class_names == ["red", "blue"]
    write(tmp_path / "b" / "x.parquet", [0, 1])
    (tmp_path / "b" / "classes.txt").write_text("n01\tcat fish\nn02\tdog\n")
    assert load_data(f"parquet:{tmp_path}/b", "all").class_names == ["cat fish", "dog"]
    write(tmp_path / "c" / "x.parquet", [0, 2])
    assert load_data(f"parquet:{tmp_path}/c", "all").class_names == ["0", "1", "2"]
    write(tmp_path / "d" / "x.parquet", [1], metadata={"huggingface": '{"info": 3}'})
    assert load_data(f"parquet:{tmp_path}/d", "all").class_names == ["0", "1"]


def test_text_labels(tmp_path):
    write(tmp_path / "x.parquet", ["pear", "apple", "pear"])
    data = load_data(f"parquet:{tmp_path}", "all")
    assert data.class_names == ["apple", "pear"] and data.labels.tolist() == [1, 0, 1]


def test_other_columns(tmp_path):
    write(tmp_path / "x.parquet", [1, 0], image="image", label="fine_label")
    assert load_data(f"parquet:{tmp_path}", "all").labels.tolist() == [1, 0]
    table = pa.table({"jpg": [png(8)], "cls": [0]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert load_data(f"parquet:{tmp_path}", "all").images[0, 0, 0, 0] == 8


def test_resize_at_loading(tmp_path):
    write(tmp_path / "x.parquet", [0, 0])
    data = load_data(f"parquet:{tmp_path}", "all", size=(3, 2, 2))
    assert data.shape == (3, 2, 2) and data.stored_shape == (3, 4, 4)
    assert torch.equal(data.images[:, 1], torch.full((2, 2, 2), 2, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["a"], "label": [0]}, "no image column .text: string"),
        ({"img": [{"bytes": b"x", "path": None}], "caption": ["a"]}, "no label column"),
        ({"img": [{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": "a.png"}], "label": [0, 0]}, "row 1 holds"),
        ({"img": [{"bytes": b"x", "path": None}], "label": [0]}, "row 0: not a readable image"),
        ({"img": [{"bytes": b"x", "path": None}], "label": [-1]}, "not labelled"),
        ({"img": [{"bytes": b"x", "path": None}], "label": [0.5]}, "neither whole numbers"),
        ({"img": [{"bytes": b"x", "path": None}] * 2, "label": [0, None]}, "row 1 has no label"),
    ],
)
def test_bad_content(tmp_path, columns, words):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=words):
        load_data(f"parquet:{tmp_path}", "all")


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="nothing that fits"):
        load_data(f"parquet:{tmp_path}", "all")
    with pytest.raises(DataError, match="does not exist"):
        load_data(f"parquet:{tmp_path}/no*.parquet", "all")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="not a readable parquet file"):
        load_data(f"parquet:{tmp_path}", "all")


def test_without_pyarrow(tmp_path, monkeypatch):
    write(tmp_path / "x.parquet", [0])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(RequirementError, match=r"synthkit\[parquet\]"):
        load_data(f"parquet:{tmp_path}", "all")
