"""Files that a stranger made to hurt: typed errors, bounded memory, nothing left behind, no file outside read."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthkit.bank.imports import ImportOptions, import_bank
from synthkit.errors import DataError, SynthkitError

ROOT = str(Path(__file__).resolve().parents[3])


def png(size=(5, 6), mode="RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, "PNG")
    return stream.getvalue()


def refused(tmp_path, src, say=".", error=DataError, **options):
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(error, match=say):
        import_bank(src, tmp_path / "bank", options=ImportOptions(**options))
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # neither a bank nor a temporary


class Evil:
    def __reduce__(self):
        return (open, (str(Path("/tmp/synthkit-evil")), "w"))


# --- npz -----------------------------------------------------------------------------------------------------------


def npy_header(shape, descr="|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def npz(path, **members: bytes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def test_npz_with_pickles(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([Evil()], dtype=object), labels=np.zeros(1))
    refused(tmp_path, tmp_path / "a.npz", "pickled objects")
    assert not Path("/tmp/synthkit-evil").exists()


def test_npz_whose_header_claims_terabytes(tmp_path):
    images, labels = npy_header((10**9, 3, 32, 32)), npy_header((10**9,), "<i8")
    refused(tmp_path, npz(tmp_path / "a.npz", images=images, labels=labels), "claims shape")
    refused(tmp_path, npz(tmp_path / "a.npz", images=npy_header((2**62, 2**62)), labels=b""))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_npz_bombs_stay_in_bounds(tmp_path):
    """768 MiB of zeros in a small file are read as a stream, never held in memory."""
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
sys.path.insert(0, {ROOT!r})
from synthkit.bank.imports import ImportOptions, open_source
source = open_source({str(tmp_path / "a.npz")!r}, options=ImportOptions(unlabelled=True))
chunk = next(source.rows())
with open("/proc/self/status") as status:  # ru_maxrss would count the process that started this one
    peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
print(source.count, len(chunk["images"]), peak)
"""
    file = zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with file as archive, archive.open("images.npy", "w", force_zip64=True) as stream:
        stream.write(npy_header((1 << 18, 3, 32, 32)))
        for _ in range(48):
            stream.write(bytes(16 << 20))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    count, rows, peak = map(int, done.stdout.split())
    assert count == 1 << 18 and rows < 5000 and peak < 600_000  # KiB; the array alone has 786,432


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"not a zip" * 100])
def test_npz_that_is_none(tmp_path, data):
    (tmp_path / "a.npz").write_bytes(data)
    refused(tmp_path, tmp_path / "a.npz", "not a whole npz")


def test_npz_cut_and_flipped(tmp_path):
    np.savez(tmp_path / "whole.npz", images=np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), np.uint8),
             labels=np.arange(40))  # fmt: skip
    whole = (tmp_path / "whole.npz").read_bytes()
    for number, place in enumerate(range(0, len(whole), len(whole) // 60)):
        data = bytearray(whole)
        data[place] ^= 0xFF
        for version in (bytes(data), whole[:place]):
            (tmp_path / "a.npz").write_bytes(version)
            try:
                bank = import_bank(tmp_path / "a.npz", tmp_path / f"b{number}-{len(version)}")
            except SynthkitError:
                continue
            assert len(bank) == 40  # a byte that means nothing (a date) was flipped


def test_npz_in_fortran_order_and_negative_sides(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.asfortranarray(np.zeros((4, 5, 6, 3), np.uint8)), labels=np.zeros(4))
    refused(tmp_path, tmp_path / "a.npz", "Fortran")
    header = npy_header((1, 1)).replace(b"(1, 1)", b"(-1,1)")
    refused(tmp_path, npz(tmp_path / "b.npz", images=header, labels=b""))


# --- torch and safetensors -----------------------------------------------------------------------------------------


def test_pt_with_code(tmp_path):
    import torch

    torch.save({"images": Evil(), "labels": torch.zeros(3)}, tmp_path / "a.pt")
    refused(tmp_path, tmp_path / "a.pt", "could run any code")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    refused(tmp_path, tmp_path / "b.pt")
    assert not Path("/tmp/synthkit-evil").exists()


def test_pt_and_safetensors_that_are_damaged(tmp_path):
    import torch

    torch.save({"images": torch.zeros(9, 3, 4, 4), "labels": torch.arange(9)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for data in (b"", b"x" * 50, whole[:200], whole[: len(whole) // 2]):
        (tmp_path / "a.pt").write_bytes(data)
        refused(tmp_path, tmp_path / "a.pt", ".", SynthkitError)
    header = json.dumps({"images": {"dtype": "U8", "shape": [10**9, 3, 32, 32], "data_offsets": [0, 10**9 * 3072]}})
    for data in (b"", b"\xff" * 16, len(header).to_bytes(8, "little") + header.encode()):
        (tmp_path / "a.safetensors").write_bytes(data)
        refused(tmp_path, tmp_path / "a.safetensors", "safetensors")


def test_pt_tensors_of_strange_kinds(tmp_path):
    import torch

    for value in (torch.zeros(4, 3, 4, 4).to_sparse(), torch.zeros(4, 3, 4, 4, dtype=torch.complex64),
                  torch.zeros(0, 3, 4, 4), torch.full((4, 3, 4, 4), float("nan")), torch.tensor(3.0),
                  torch.zeros(1, device="meta")):  # fmt: skip
        torch.save({"images": value, "labels": torch.arange(4)}, tmp_path / "a.pt")
        refused(tmp_path, tmp_path / "a.pt")
    torch.save({"images": torch.zeros(4, 3, 4, 4), "labels": torch.arange(3)}, tmp_path / "b.pt")
    refused(tmp_path, tmp_path / "b.pt", "4 images, but labels")


# --- folders -------------------------------------------------------------------------------------------------------


def picture(path: Path, data: bytes | None = None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png() if data is None else data)


@pytest.mark.parametrize("kind", ["file", "folder", "root"])
def test_links_are_not_followed(tmp_path, kind):
    picture(tmp_path / "secret" / "a" / "x.png")
    picture(tmp_path / "in" / "a" / "x.png")
    src = tmp_path / "in"
    if kind == "file":
        (src / "a" / "y.png").symlink_to(tmp_path / "secret" / "a" / "x.png")
    elif kind == "folder":
        (src / "b").symlink_to(tmp_path / "secret" / "a")
    else:
        src = tmp_path / "link"
        src.symlink_to(tmp_path / "in")
    refused(tmp_path, src, "is a link")


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "C:/x.png", "a\\..\\x", "", "nope.png"]
)
def test_a_table_names_nothing_outside(tmp_path, name):
    picture(tmp_path / "secret.png")
    picture(tmp_path / "in" / "a" / "x.png")
    (tmp_path / "in" / "labels.csv").write_text(f'file,label\na/x.png,0\n"{name}",1\n')
    refused(tmp_path, tmp_path / "in", "outside the folder|not a file")


@pytest.mark.parametrize("text", [
    "", "label\n0\n", "file,file\na/x.png,a/x.png\n", "file,label\na/x.png\n", 'file,label\n"a/x.png,0\n',
    "file,label,logit_1\na/x.png,0,1\n", "file,label,logit_0\na/x.png,0,abc\n", "file,label,top1_class\na/x.png,0,0\n",
    "file,label\na/x.png,-1\n", "file,label,difficulty\na/x.png,0,nan\n", "file,label\n" + "x" * (9 << 20),
])  # fmt: skip
def test_malformed_tables(tmp_path, text):
    picture(tmp_path / "in" / "a" / "x.png")
    (tmp_path / "in" / "labels.csv").write_text(text)
    refused(tmp_path, tmp_path / "in", ".", SynthkitError)


def test_image_bombs(tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    picture(tmp_path / "in" / "a" / "x.png", bomb)
    refused(tmp_path, tmp_path / "in")
    for data in (b"", b"GIF89a", png()[:40], b"%PDF-1.4", b"\xff" * 999):
        picture(tmp_path / "in" / "a" / "x.png", data)
        refused(tmp_path, tmp_path / "in")


def test_class_names_cannot_break_the_bank(tmp_path):
    for i, name in enumerate(["<script>alert(1)<", "|x|", "a\nb", "\u202eevil", "=cmd()", "con", "'\"`$(rm)"]):
        picture(tmp_path / "in" / name / f"{i}.png")
    bank = import_bank(tmp_path / "in", tmp_path / "b")
    assert bank.num_classes == 7 and "<script>" not in bank._repr_html_()
    assert "<script>" not in (tmp_path / "b" / "README.md").read_text()


# --- tar -----------------------------------------------------------------------------------------------------------


def tar(path, *members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data or b""), "/etc/passwd"
            archive.addfile(info, io.BytesIO(data or b""))
    return path


FILE = tarfile.REGTYPE


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_tar_with_links_and_devices(tmp_path, kind):
    tar(tmp_path / "a.tar", ("a.png", png(), FILE), ("a.cls", b"0", FILE), ("b.png", None, kind))
    refused(tmp_path, tmp_path / "a.tar", "link or a device")


def test_tar_names_never_touch_the_disk(tmp_path):
    members = [m for key in ("../../evil", "/abs/evil", "dir/../evil") for m in (
        (f"{key}.png", png(), FILE), (f"{key}.cls", b"0", FILE))]  # fmt: skip
    tar(tmp_path / "a.tar", *members)
    bank = import_bank(tmp_path / "a.tar", tmp_path / "b")
    assert len(bank) == 3 and sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "b"]


@pytest.mark.parametrize("members, say", [
    ([("a.png", png(), FILE)], "no labels"), ([("a.cls", b"0", FILE)], "holds no images"),
    ([("a.png", png(), FILE), ("a.jpg", png(), FILE), ("a.cls", b"0", FILE)], "second image"),
    ([("a.png", png(), FILE), ("a.cls", b"-1", FILE)], "not labelled"),
    ([("a.png", png(), FILE), ("a.cls", b"0", FILE), ("a.json", b"[" * 10**5, FILE)], "JSON"),
    ([("a.png", png(), FILE), ("a.cls", b"0", FILE), ("a.logits.npy", b"\x93NUMPY", FILE)], "npy"),
    ([("a.png", png(), FILE), ("a.cls", b"0", FILE), ("a.json", b'{"difficulty": "x"}', FILE)], "must be numbers"),
    ([("a.png", png(), FILE), ("a.cls", b"9" * 900, FILE)], "."),
])  # fmt: skip
def test_malformed_samples(tmp_path, members, say):
    refused(tmp_path, tar(tmp_path / "a.tar", *members), say, SynthkitError)


def test_tar_cut_or_compressed(tmp_path):
    members = [m for i in range(30) for m in ((f"{i:02d}.png", png(), FILE), (f"{i:02d}.cls", b"0", FILE))]
    whole = tar(tmp_path / "a.tar", *members).read_bytes()
    for cut in (0, 100, 700, len(whole) // 2 + 100):
        (tmp_path / "c.tar").write_bytes(whole[:cut])
        refused(tmp_path, tmp_path / "c.tar", ".", SynthkitError)
    tar(tmp_path / "z.tar", *members, mode="w:gz")  # a compressed header could claim any size
    refused(tmp_path, tmp_path / "z.tar", "not a whole tar")


# --- parquet -------------------------------------------------------------------------------------------------------


def parquet(path, images, labels, image_type=None):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"image": pa.array(images, image_type or pa.binary()), "label": pa.array(labels)})
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize("images, labels, say", [
    ([png(), None], [0, 1], "no image bytes"), ([png(), png()], [0, None], "no label"),
    ([png(), png()], [0, -1], "not labelled"), ([png(), b"x"], [0, 1], "not a readable image"),
    ([png(), png((9, 9))], [0, 1], "--size"), ([png(), png()], [0.5, 1.5], "neither"),
    ([png(), png()], [0, 10**6], "more than 65536"), ([png(), png()], ["a" * 501, "b"], "more than"),
])  # fmt: skip
def test_parquet_rows(tmp_path, images, labels, say):
    refused(tmp_path, parquet(tmp_path / "a.parquet", images, labels), say)


def test_parquet_that_is_none(tmp_path):
    whole = parquet(tmp_path / "a.parquet", [png()] * 20, list(range(20))).read_bytes()
    for data in (b"", b"PAR1" * 9, whole[:-9], whole[: len(whole) // 2]):
        (tmp_path / "b.parquet").write_bytes(data)
        refused(tmp_path, tmp_path / "b.parquet", "parquet")


# --- MDS -----------------------------------------------------------------------------------------------------------


def mds(folder, **changes):
    from bank.banks import make_bank
    from synthkit.bank.export import export

    make_bank(folder.parent / "b0", images=8, images_per_shard=8)
    export(folder.parent / "b0", "mds", folder)
    (folder / "synthkit.json").unlink()
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0].update(changes)
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("changes", [
    {"raw_data": {"basename": "../../x"}}, {"raw_data": {"basename": "/etc/passwd"}}, {"raw_data": None},
    {"samples": 10**9}, {"samples": 9}, {"samples": -1}, {"compression": "zstd"}, {"format": "json"},
    {"column_names": ["a"]}, {"column_sizes": [1] * 7}, {"column_encodings": ["pkl"] * 7},
])  # fmt: skip
def test_mds_indices(tmp_path, changes):
    src = mds(tmp_path / "in", **changes)
    refused(tmp_path, src, ".", SynthkitError)


def test_mds_shards_cut_and_flipped(tmp_path):
    src = mds(tmp_path / "in")
    shard = next(src.glob("*.mds"))
    whole = shard.read_bytes()
    for place in range(0, 200, 9):
        data = bytearray(whole)
        data[place] ^= 0xFF
        shard.write_bytes(data)
        try:
            assert len(import_bank(src, tmp_path / f"x{place}")) == 8
        except SynthkitError:
            assert not (tmp_path / f"x{place}").exists()
    shard.write_bytes(whole[:-5])
    refused(tmp_path, src, "malformed")
