"""Images that are bombs, broken, or not images, wherever synthkit decodes some: folders, parquet, tar."""

from __future__ import annotations

import io
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthkit.bank.imports import ImportOptions, import_bank
from synthkit.data.decode import decode_images
from synthkit.data.specs import load_data
from synthkit.errors import DataError, SynthkitError

from .forge import SECRET, memory_bounded, nothing_written, unread

pytest.importorskip("torch")
SIDE = 60_000


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", extra: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + extra + _chunk(b"IDAT", zlib.compress(data, 9))
            + _chunk(b"IEND", b""))  # fmt: skip


def encoded(kind: str, side: int = 8) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def jpeg_of(side: int) -> bytes:
    data = bytearray(encoded("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def gif_of(side: int) -> bytes:
    data = bytearray(encoded("GIF"))
    data[6:10] = struct.pack("<HH", side, side)
    at = data.index(b"\x2c\0\0\0\0", 13)
    data[at + 5 : at + 9] = struct.pack("<HH", side, side)
    return bytes(data)


def bmp_of(side: int) -> bytes:
    data = bytearray(encoded("BMP"))
    data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


def tiff_of(side: int) -> bytes:
    data = bytearray(encoded("TIFF"))
    for tag in (256, 257):
        at = next(i for kind in (3, 4) if (i := data.find(struct.pack("<HHI", tag, kind, 1))) >= 0)
        data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, side)
    return bytes(data)


BOMBS = {
    "png": png(SIDE, SIDE), "png with rows": png(SIDE, SIDE, bytes(50 << 20)), "jpg": jpeg_of(SIDE),
    "gif": gif_of(SIDE), "bmp": bmp_of(SIDE), "ppm": b"P6 60000 60000 255\n" + bytes(100), "tiff": tiff_of(SIDE),
    "png 2**31": png(2**31 - 1, 2**31 - 1), "png thin": png(2**31 - 1, 1),
}  # fmt: skip
_CUT = encoded("PNG")
BROKEN = {
    "empty": b"", "text": b"not an image", "magic alone": b"\x89PNG\r\n\x1a\n", "cut png": _CUT[: len(_CUT) // 2],
    "cut jpg": encoded("JPEG")[:300], "cut gif": encoded("GIF")[:-40], "no pixels": png(8, 8), "zero": png(0, 8),
    "negative bmp": bmp_of(-5), "html": b"<html><script>alert(1)</script></html>", "svg": b"<svg onload='x()'/>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/etc/passwd) (r) file\n", "pdf": b"%PDF-1.4\n",
    "elf": b"\x7fELF" + bytes(100), "checksum": _CUT[:-20] + bytes(20),
    "text bomb": png(8, 8, bytes(8 * 25), _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20), 9))),
    "icc bomb": png(8, 8, bytes(8 * 25), _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80 << 20), 9))),
}  # fmt: skip
HARMLESS = {"icc bomb", "checksum", "text bomb", "negative bmp"}  # may be read: then as 8 x 8 pixels, in bounded memory
SUFFIX = {"jpg": ".jpg", "cut jpg": ".jpg", "gif": ".gif", "bmp": ".bmp", "ppm": ".ppm", "tiff": ".tiff"}


@pytest.fixture(autouse=True)
def _warm():
    """What PIL and torch take once is not the attack's."""
    decode_images(
        [encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP")], str, (3, 8, 8), "warm"
    )


def folder_of(tmp_path: Path, name: str, data: bytes) -> Path:
    root = tmp_path / "folder"
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        (root / label / "0.png").write_bytes(_CUT)
    (root / "b" / f"1{SUFFIX.get(name, '.png')}").write_bytes(data)
    return root


def parquet_of(tmp_path: Path, data: bytes) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": b, "path": "/etc/passwd"} for b in (_CUT, data)]
    pq.write_table(pa.table({"image": rows, "label": [0, 1]}), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def tar_of(tmp_path: Path, data: bytes) -> Path:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number, content in enumerate((_CUT, data)):
            for ending, body in (("png", content), ("cls", b"0")):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
    return tmp_path / "x.tar"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", [*BOMBS, *BROKEN])
def test_every_way_in(tmp_path, name):
    data = BOMBS.get(name, BROKEN.get(name, b""))
    folder, parquet, tar = folder_of(tmp_path, name, data), parquet_of(tmp_path, data), tar_of(tmp_path, data)
    ways = {
        "load folder": lambda: load_data(f"imagefolder:{folder}", "all"),
        "load parquet": lambda: load_data(f"parquet:{parquet}", "all"),
        "resize": lambda: load_data(f"imagefolder:{folder}", "all", size=(3, 8, 8)),
        "import folder": lambda: import_bank(folder, tmp_path / "out"),
        "import parquet": lambda: import_bank(parquet, tmp_path / "out", options=ImportOptions(size=(3, 8, 8))),
        "import tar": lambda: import_bank(tar, tmp_path / "out", options=ImportOptions(size=(3, 8, 8))),
    }
    for way, act in ways.items():
        with memory_bounded(160 << 20):
            try:
                found = act()
            except DataError as error:
                assert len(str(error)) < 2000, way
                assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*tmp*")), way
            else:
                assert name in HARMLESS, f"{way} accepted it"
                assert len(found) in (2, 3)
        if (tmp_path / "out").exists():
            shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("make", ["file", "class", "device", "loop"])
def test_links_in_a_folder_of_images(tmp_path, make):
    """A link to another user's file: not imported. (A folder that the user loads as data may hold links of his own.)"""
    secret = tmp_path / "secret.png"
    secret.write_bytes(SECRET)
    root = folder_of(tmp_path, "png", _CUT)
    place = root / "b" / "9.png"
    link, goal = {
        "file": (place, secret), "class": (root / "c", "/etc"), "device": (place, "/dev/zero"),
        "loop": (root / "c", root),
    }[make]  # fmt: skip
    link.symlink_to(goal)
    with unread(secret), nothing_written(root), memory_bounded(), pytest.raises(SynthkitError, match="link"):
        import_bank(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")  # PIL warns of every oddity that it forgives
def test_flips_in_images_are_typed(tmp_path):
    """PIL raises many kinds of errors on damaged files; all of them become one."""
    rng = np.random.default_rng(0)
    refused = 0
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP"):
        honest = encoded(kind)
        for _ in range(150):
            data = bytearray(honest)
            for _ in range(rng.integers(1, 4)):
                data[rng.integers(0, min(len(data), 200))] ^= 1 << int(rng.integers(0, 8))
            try:
                with memory_bounded(512 << 20):
                    pixels, _ = decode_images([bytes(data)], str, (3, 8, 8), "x")
                assert pixels.shape == (1, 3, 8, 8)
            except DataError:
                refused += 1
    assert refused > 100
