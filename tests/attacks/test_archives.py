"""Archives that synthkit reads: npz, tar, parquet, safetensors, MDS. Nothing is unpacked to disk, sizes are bounded."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from synthkit.bank.checking.verify import verify
from synthkit.bank.imports import import_bank
from synthkit.data.specs import load_data
from synthkit.errors import DataError, SynthkitError

from .forge import SECRET, memory_bounded, nothing_written, unread
from .test_images import encoded

pytest.importorskip("torch")
PNG = encoded("PNG")


def npy(array: np.ndarray, **changes: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    data = stream.getvalue()
    if not changes:
        return data
    head = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **changes}
    text = (repr(head) + "\n").encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + array.tobytes()


IMAGES, LABELS = np.zeros((4, 3, 8, 8), "u1"), np.arange(4)


def npz(path: Path, members: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def refused(tmp_path: Path, source: Path, *, load: str | None = None) -> None:
    """Import (and, where it exists, loading) refuses it in bounded memory and leaves nothing behind."""
    with nothing_written(tmp_path), memory_bounded(128 << 20):
        with pytest.raises(SynthkitError) as caught:
            import_bank(source, tmp_path / "out")
        assert len(str(caught.value)) < 2000
        if load:
            with pytest.raises(SynthkitError):
                load_data(f"{load}:{source}", "all")


GOOD = {"images.npy": npy(IMAGES), "labels.npy": npy(LABELS)}


def test_honest_npz(tmp_path):
    assert len(import_bank(npz(tmp_path / "x.npz", GOOD), tmp_path / "out")) == 4


@pytest.mark.parametrize("changes", [
    {"images.npy": npy(IMAGES, shape=(10**9, 3, 8, 8))}, {"images.npy": npy(IMAGES, shape=(2**62, 2**62))},
    {"images.npy": npy(IMAGES, shape=(-4, 3, 8, 8))}, {"images.npy": npy(IMAGES, descr="|O")},
    {"images.npy": npy(IMAGES, descr="|V4000000000")}, {"images.npy": npy(IMAGES, descr=[("a", "u1")])},
    {"images.npy": npy(IMAGES, shape="__import__('os').system('id')")}, {"images.npy": npy(IMAGES)[:60]},
    {"images.npy": npy(IMAGES)[:-9]}, {"images.npy": b"\x93NUMPY\x09\x00xx"}, {"images.npy": b""},
    {"images.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000},
    {"images.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{}"},
    {"labels.npy": npy(LABELS, shape=(10**12,))}, {"labels.npy": npy(np.arange(4) - 9)}, {"labels.npy": npy(IMAGES)},
    {"labels.npy": npy(np.full(4, 2**40))}, {"labels.npy": npy(np.full(4, np.nan))},
])  # fmt: skip
def test_npz_members(tmp_path, changes):
    refused(tmp_path, npz(tmp_path / "x.npz", {**GOOD, **changes}), load="npz")


def test_npz_ratio_bomb_in_the_small_parts(tmp_path):
    """What is read at once is capped; what is read as a stream is bounded by its pieces."""
    names = npy(np.zeros((300 << 20) // 400, "U100"))
    refused(tmp_path, npz(tmp_path / "x.npz", {**GOOD, "class_names.npy": names, "mean.npy": names}))


def test_npz_names_and_numbers(tmp_path):
    outside = {"../../evil.npy": npy(LABELS), "/tmp/evil.npy": npy(LABELS), "..\\evil.npy": npy(LABELS)}
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    file = npz(inner / "x.npz", {**GOOD, **outside})
    with nothing_written(tmp_path), contextlib.suppress(DataError):
        load_data(f"npz:{file}", "all")
    with contextlib.suppress(DataError):
        import_bank(file, inner / "out")
    assert not (tmp_path / "evil.npy").exists() and not Path("/tmp/evil.npy").exists()
    refused(tmp_path, npz(tmp_path / "many.npz", {f"a{i}.npy": b"" for i in range(3000)}))
    twice = tmp_path / "twice.npz"
    with pytest.warns(UserWarning), zipfile.ZipFile(twice, "w") as archive:
        for data in (npy(IMAGES), npy(IMAGES + 1)):
            archive.writestr("images.npy", data)
        archive.writestr("labels.npy", npy(LABELS))
    refused(tmp_path, twice)


def test_npz_of_another_zip(tmp_path):
    file = npz(tmp_path / "x.npz", GOOD, zipfile.ZIP_STORED)
    honest = file.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for number in range(150):
        data = bytearray(honest)
        spots = [*range(60), *range(len(data) - 200, len(data)), *range(len(data))]
        for at in rng.choice(len(spots), 3):
            data[spots[at]] ^= 1 << int(rng.integers(0, 8))
        file.write_bytes(data if number % 3 else honest[: rng.integers(0, len(honest))])
        with memory_bounded():
            try:
                load_data(f"npz:{file}", "all")
                import_bank(file, tmp_path / f"out{number}")
                outcomes[True] += 1
            except SynthkitError:
                outcomes[False] += 1
    assert outcomes[False] > 50, outcomes


# ---- tar ---------------------------------------------------------------------------------------------------------


def tar(path: Path, *members: tuple[str, bytes | dict], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, dict):
                for key, value in content.items():
                    setattr(info, key, value)
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "device", "fifo"])
def test_tar_links(tmp_path, kind):
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    facts = {
        "symlink": {"type": tarfile.SYMTYPE, "linkname": str(secret)},
        "hardlink": {"type": tarfile.LNKTYPE, "linkname": str(secret)},
        "device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
        "fifo": {"type": tarfile.FIFOTYPE},
    }
    file = tar(tmp_path / "x.tar", ("0.png", PNG), ("0.cls", b"0"), ("1.png", facts[kind]), ("1.cls", b"1"))
    with unread(secret), memory_bounded(), pytest.raises(DataError, match="link or a device"):
        import_bank(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tar_names_never_touch_the_disk(tmp_path):
    names = ("../../evil", "/tmp/evil", "a/../../../evil", "\x1b[31m", "C:\\evil", "x" * 300)
    members = [m for name in names for m in ((f"{name}.png", PNG), (f"{name}.cls", b"0"))]
    file = tar(tmp_path / "in.tar", *members)
    bank = import_bank(file, tmp_path / "out")
    assert len(bank) == len(names) and verify(tmp_path / "out", deep=True).ok
    assert not list(tmp_path.parent.glob("evil*")) and not Path("/tmp/evil.png").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.tar", "out"]


def test_tar_bombs(tmp_path):
    """Extended headers are read at once: those of a compressed tar could unfold to any size."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 600 << 20
    head = header.tobuf(tarfile.USTAR_FORMAT)
    with gzip.open(tmp_path / "gz.tar", "wb", 1) as stream:
        stream.write(head)
        for _ in range(600):
            stream.write(bytes(1 << 20))
    with open(tmp_path / "sparse.tar", "wb") as stream:
        stream.write(head)
        stream.truncate(700 << 20)
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
        header.type = kind
        (tmp_path / f"{kind.hex()}.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + bytes(2048))
    header.type, header.size = tarfile.REGTYPE, 1 << 40
    header.name = "0.png"
    (tmp_path / "size.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    for file in sorted(tmp_path.glob("*.tar")):
        with memory_bounded(), pytest.raises(DataError):
            import_bank(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [
    b"{", b"[1]", b'{"label": NaN}', b'{"label": 1e400}', b'{"label": ' + b"9" * 9000 + b"}", b'{"logits": "x"}',
    b'{"a": ' * 70 + b"1" + b"}" * 70, b'{"label": 1, "label": 2}', b'{"logits": [[1, 2], [3]]}',
    b'{"difficulty": {"a": 1}}', b'{"label": true}', b'{"label": -1}',
])  # fmt: skip
def test_tar_json(tmp_path, data):
    file = tar(tmp_path / "x.tar", ("0.png", PNG), ("0.json", data))
    with memory_bounded(), pytest.raises(SynthkitError):
        import_bank(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tar_flips_are_typed(tmp_path):
    honest = tar(
        tmp_path / "x.tar", *[m for i in range(4) for m in ((f"{i}.png", PNG), (f"{i}.cls", b"0"))]
    ).read_bytes()
    rng = np.random.default_rng(1)
    refusals = 0
    for number in range(120):
        data = bytearray(honest)
        block = 512 * int(rng.integers(0, 12))
        for _ in range(3):
            data[min(len(data) - 1, block + int(rng.integers(0, 512)))] ^= 1 << int(rng.integers(0, 8))
        (tmp_path / "x.tar").write_bytes(data if number % 4 else honest[: rng.integers(0, len(honest))])
        with memory_bounded():
            try:
                import_bank(tmp_path / "x.tar", tmp_path / f"out{number}")
            except SynthkitError:
                refusals += 1
    assert refusals > 20


# ---- parquet, safetensors, MDS ------------------------------------------------------------------------------------


def test_parquet_bombs_and_flips(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [{"bytes": PNG, "path": "p"}] * 20, "label": list(range(20))}), file)
    honest = file.read_bytes()
    rng = np.random.default_rng(2)
    refusals = 0
    for number in range(100):
        data = bytearray(honest)
        tail = number % 2
        for _ in range(3):
            at = len(data) - 1 - int(rng.integers(0, 900)) if tail else int(rng.integers(0, len(data)))
            data[max(0, at)] ^= 1 << int(rng.integers(0, 8))
        file.write_bytes(data)
        with memory_bounded(256 << 20):
            for act in (
                lambda: load_data(f"parquet:{file}", "all"),
                lambda n=number: import_bank(file, tmp_path / f"o{n}"),
            ):
                try:
                    act()
                except SynthkitError:
                    refusals += 1
    assert refusals > 50
    file.write_bytes(honest[:-1])
    refused(tmp_path, file, load="parquet")
    zeros = pa.array([bytes(1 << 20)] * 400)  # 400 MiB that compress to nothing
    pq.write_table(pa.table({"image": zeros, "label": list(range(400))}), file, compression="zstd", row_group_size=100)
    assert file.stat().st_size < 2 << 20
    with memory_bounded(900 << 20), pytest.raises(DataError):
        import_bank(file, tmp_path / "out")


@pytest.mark.parametrize("stored", [True, False])
def test_a_parquet_dictionary_that_names_one_huge_value_in_every_row(tmp_path, stored):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = 150  # unpacked: 4.7 GiB
    huge = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([PNG + bytes(32 << 20)]))
    image = pa.StructArray.from_arrays([huge, pa.array(["p"] * rows)], names=["bytes", "path"])
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": image, "label": [0] * rows}), file, store_schema=stored, compression="zstd")
    assert file.stat().st_size < 1 << 20
    with memory_bounded(1200 << 20):  # some batches of 256 MiB and the value itself
        data = load_data(f"parquet:{file}", "all")  # PIL ignores what follows the image
        bank = import_bank(file, tmp_path / "out")
    assert len(data) == len(bank) == rows


@pytest.mark.parametrize("header", [
    b"{}", b"[]", b"{", b'{"images":{"dtype":"U8","shape":[1000000000000],"data_offsets":[0,1000000000000]}}',
    b'{"images":{"dtype":"U8","shape":[4,3,8,8],"data_offsets":[700,0]}}',
    b'{"images":{"dtype":"U8","shape":[-4,3,8,8],"data_offsets":[0,768]}}',
    b'{"images":{"dtype":"OBJ","shape":[4,3,8,8],"data_offsets":[0,768]}}',
    b'{"images":{"dtype":"U8","shape":[4,3,8,8],"data_offsets":[0,768]},"images2":{"dtype":"U8","shape":[4,3,8,8],'
    b'"data_offsets":[0,768]}}',
    b'{"__metadata__":{"class_names":"' + b"[" * 90000 + b'"},"images":{"dtype":"U8","shape":[4,3,8,8],'
    b'"data_offsets":[0,768]}}',
])  # fmt: skip
def test_safetensors(tmp_path, header):
    file = tmp_path / "x.safetensors"
    for length in (len(header), 2**63 - 1, len(header) + 1000):
        file.write_bytes(struct.pack("<Q", length) + header + bytes(768))
        refused(tmp_path, file)


@pytest.mark.parametrize("changes", [
    {"basename": "../../../etc/passwd"}, {"basename": "/etc/passwd"}, {"basename": "..\\x"}, {"basename": "\0"},
    {"bytes": -1}, {"bytes": 10**30}, {"bytes": True}, {"bytes": None},
])  # fmt: skip
def test_mds_paths(tmp_path, changes):
    (tmp_path / "in").mkdir()
    raw = {"basename": "shard.00000.mds", "bytes": 100, "hashes": {}, **changes}
    shard = {"column_encodings": ["png", "int"], "column_names": ["image", "label"], "column_sizes": [None, 8],
             "compression": None, "format": "mds", "hashes": [], "raw_data": raw, "samples": 1, "size_limit": None,
             "version": 2, "zip_data": None}  # fmt: skip
    (tmp_path / "in" / "index.json").write_text(json.dumps({"shards": [shard], "version": 2}))
    (tmp_path / "in" / "shard.00000.mds").write_bytes(bytes(100))
    with unread(Path("/etc/passwd")):
        refused(tmp_path, tmp_path / "in")
