"""MDS, read back with mosaicml-streaming, which lives in an environment of its own: SYNTHKIT_MDS_PYTHON names it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from synthkit.bank.export import export
from synthkit.errors import UsageError

from .exports import make, same, stored

PYTHON = sys.executable if importlib.util.find_spec("streaming") else os.environ.get("SYNTHKIT_MDS_PYTHON")
needs_streaming = pytest.mark.skipif(not PYTHON, reason="needs mosaicml-streaming, or SYNTHKIT_MDS_PYTHON naming one")


def read(folder: Path, check: str = "") -> dict[str, np.ndarray]:
    target = folder.parent / "seen.npz"
    script = Path(__file__).with_name("read_mds.py")
    command = [str(PYTHON), str(script), str(folder), str(target), check]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(target) as found:
        return dict(found)


@needs_streaming
@pytest.mark.parametrize("channels, raw", [(1, False), (3, False), (3, True), (1, True)])
def test_streaming_reads_the_same_rows(tmp_path, channels, raw):
    rows = stored(make(tmp_path / "b", shape=(channels, 6, 5), top_k=2))
    out = export(tmp_path / "b", "mds", tmp_path / "o", raw=raw, hashes=True, shard_bytes=1500)
    assert len(list(out.glob("shard.*.mds"))) > 2
    found = read(out, "sha1")
    same(found["image"], rows["images"])
    same(found["label"], rows["labels"], np.int64)
    assert found["index"].tolist() == list(range(23))
    for column in ("logits", "difficulty", "origin_step", "origin_seed", "topk_index", "topk_logit", "tail_logsumexp"):
        same(found[column], rows[column])


@needs_streaming
def test_one_image_without_labels(tmp_path):
    rows = stored(make(tmp_path / "b", images=1, labels=False, logits=False))
    found = read(export(tmp_path / "b", "mds", tmp_path / "o"))
    same(found["image"], rows["images"])
    assert set(found) == {"image", "index", "difficulty", "origin_step", "origin_seed"}


def parse(folder: Path) -> list[dict[str, bytes]]:
    """The samples by the written description of the format, sharing nothing with the writer."""
    index, samples = json.loads((folder / "index.json").read_text()), []
    assert index["version"] == 2
    for shard in index["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert len(data) == shard["raw_data"]["bytes"]
        (count,) = struct.unpack_from("<I", data)
        assert count == shard["samples"]
        ends = struct.unpack_from(f"<{count + 1}I", data, 4)
        assert json.loads(data[4 + 4 * (count + 1) : ends[0]])["column_names"] == shard["column_names"]
        for begin, end in zip(ends, ends[1:], strict=False):
            at, sizes = begin, []
            for size in shard["column_sizes"]:
                if size is None:
                    (size,) = struct.unpack_from("<I", data, at)
                    at += 4
                sizes.append(size)
            sample = {}
            for name, size in zip(shard["column_names"], sizes, strict=True):
                sample[name] = data[at : at + size]
                at += size
            assert at == end
            samples.append(sample)
    return samples


def test_the_bytes_are_as_described(tmp_path):
    rows = stored(make(tmp_path / "b"))
    out = export(tmp_path / "b", "mds", tmp_path / "o", raw=True, shard_bytes=1500)
    samples = parse(out)
    same(np.frombuffer(b"".join(s["image"] for s in samples), np.uint8).reshape(-1, 3, 6, 5), rows["images"])
    same(np.frombuffer(b"".join(s["label"] for s in samples), "<i8"), rows["labels"], np.int64)
    same(np.frombuffer(b"".join(s["logits"] for s in samples), "<f2").reshape(-1, 5), rows["logits"])


def test_hashes_are_of_the_files(tmp_path):
    make(tmp_path / "b")
    out = export(tmp_path / "b", "mds", tmp_path / "o", hashes=True)
    (shard,) = json.loads((out / "index.json").read_text())["shards"]
    data = (out / shard["raw_data"]["basename"]).read_bytes()
    assert shard["raw_data"]["hashes"] == {"sha1": hashlib.sha1(data).hexdigest()} and shard["hashes"] == ["sha1"]


def test_offsets_must_fit_32_bits(tmp_path):
    make(tmp_path / "b")
    with pytest.raises(UsageError, match="shard_bytes"):
        export(tmp_path / "b", "mds", tmp_path / "o", shard_bytes=1 << 32)
