"""Shards that are valid HDF5 and mean harm. Their records vouch for every byte: only the structure gives them away."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from bank.banks import SHAPE, shard_arrays

from synthkit.bank import Bank
from synthkit.bank.checking.sandbox import verify_untrusted
from synthkit.bank.checking.verify import verify
from synthkit.errors import BankError

from .forge import SECRET, assert_damaged, memory_bounded, nothing_written, read_all, small_bank, unread, vouch

ROWS = (10, *SHAPE)
BYTES = int(np.prod(ROWS))

Attack = Callable[[h5py.File, np.ndarray, Path], Any]


def _external(file: h5py.File, images: np.ndarray, secret: Path) -> None:
    file.create_dataset("images", ROWS, "u1", external=[(str(secret), 0, BYTES)])


def _virtual(file: h5py.File, images: np.ndarray, secret: Path) -> None:
    layout = h5py.VirtualLayout(ROWS, "u1")
    layout[:] = h5py.VirtualSource(str(secret), "images", ROWS)
    file.create_virtual_dataset("images", layout)


def _of_type(kind: Any, shape: tuple[int, ...] = ROWS) -> Attack:
    def attack(file: h5py.File, images: np.ndarray, secret: Path) -> None:
        file.create_dataset("images", shape, dtype=kind)
        if h5py.check_vlen_dtype(np.dtype(kind)) is not None or np.dtype(kind).kind == "V":
            return
        if h5py.check_ref_dtype(np.dtype(kind)) is None:
            file["images"][...] = np.zeros((), kind)

    return attack


def _odd_integer(file: h5py.File, images: np.ndarray, secret: Path) -> None:
    kind = h5py.h5t.NATIVE_UINT8.copy()
    kind.set_precision(5)  # five bits of a byte: numpy shows uint8 all the same
    space = h5py.h5s.create_simple(ROWS)
    h5py.h5d.create(file.id, b"images", kind, space)


def _unallocated(file: h5py.File, images: np.ndarray, secret: Path) -> None:
    file.create_dataset("images", ROWS, "u1")


def _huge(file: h5py.File, images: np.ndarray, secret: Path) -> None:
    file.create_dataset("images", (1_500_000_000_000 // 1000, 10, 10, 10), "u1")  # 1.5 TB in a file of some kB


def _compact(file: h5py.File, images: np.ndarray, secret: Path) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, h5py.h5s.create_simple(ROWS), plist).write(
        h5py.h5s.ALL, h5py.h5s.ALL, images)  # fmt: skip


def _chunked(**options: Any) -> Attack:
    def attack(file: h5py.File, images: np.ndarray, secret: Path) -> None:
        file.create_dataset("images", data=images, chunks=(5, *SHAPE), **options)

    return attack


def _link(link: Callable[[Path], Any]) -> Attack:
    def attack(file: h5py.File, images: np.ndarray, secret: Path) -> None:
        file["images"] = link(secret)

    return attack


def _twins(file: h5py.File, images: np.ndarray, secret: Path) -> None:
    file["difficulty"] = np.zeros(10, "<f4")
    file["images"] = file["difficulty"]


def _plain_and(more: Callable[[h5py.File], Any]) -> Attack:
    def attack(file: h5py.File, images: np.ndarray, secret: Path) -> None:
        file["images"] = images
        more(file)

    return attack


def _attribute(file: h5py.File) -> None:
    file["images"].attrs["x"] = "y" * 1000


def _root_attribute(file: h5py.File) -> None:
    file.attrs["x"] = np.zeros(1000)


def _loop(file: h5py.File, images: np.ndarray, secret: Path) -> None:
    file["images"] = file["/"]  # a hard link from the root group to itself


def _named_type(file: h5py.File, images: np.ndarray, secret: Path) -> None:
    file["images"] = np.dtype("u1")


def _many(file: h5py.File) -> None:
    for i in range(2000):
        file[f"x{i}"] = h5py.SoftLink("/" + "a" * 200)


def _many_links(file: h5py.File) -> None:
    for i in range(50):
        file[f"x{i}"] = file["images"]


ATTACKS: dict[str, tuple[Attack, str]] = {
    "external storage": (_external, "in another file"),
    "virtual dataset": (_virtual, "in another file"),
    "external link": (_link(lambda s: h5py.ExternalLink(str(s), "/images")), "hard links only"),
    "external link to a device": (_link(lambda s: h5py.ExternalLink("/dev/zero", "/x")), "hard links only"),
    "soft link": (_link(lambda s: h5py.SoftLink("/labels")), "hard links only"),
    "soft link to itself": (_link(lambda s: h5py.SoftLink("/images")), "hard links only"),
    "dangling soft link": (_link(lambda s: h5py.SoftLink("/nowhere")), "hard links only"),
    "chunks": (_chunked(), "not contiguous"),
    "gzip": (_chunked(compression="gzip"), "not contiguous"),
    "lzf": (_chunked(compression="lzf"), "not contiguous"),
    "shuffle": (_chunked(shuffle=True), "not contiguous"),
    "checksum filter": (_chunked(fletcher32=True), "not contiguous"),
    "scale-offset filter": (_chunked(scaleoffset=4), "not contiguous"),
    "growing": (_chunked(maxshape=(None, *SHAPE)), "not contiguous"),
    "compact": (_compact, "not contiguous"),
    "huge shape": (_huge, "has shape"),
    "unallocated": (_unallocated, "lies at byte"),
    "other shape": (lambda f, i, s: f.create_dataset("images", data=i.reshape(10, -1)), "has shape"),
    "big-endian": (_of_type(">u2"), "is stored as"),
    "signed": (_of_type("i1"), "is stored as"),
    "float": (_of_type("<f4"), "is stored as"),
    "five bits": (_odd_integer, "is stored as"),
    "enum": (_of_type(h5py.enum_dtype({"a": 0, "b": 1}, "u1")), "is stored as"),
    "bool": (_of_type("?"), "is stored as"),
    "compound": (_of_type(np.dtype([("a", "u1"), ("b", "<f8", (3,))])), "is stored as"),
    "vlen": (_of_type(h5py.vlen_dtype(np.uint8)), "is stored as"),
    "vlen text": (_of_type(h5py.string_dtype()), "is stored as"),
    "fixed text": (_of_type("S1"), "is stored as"),
    "opaque": (_of_type(np.dtype("V1")), "is stored as"),
    "array": (_of_type(np.dtype(("u1", (2,))), ROWS), "is stored as"),
    "object reference": (_of_type(h5py.ref_dtype), "is stored as"),
    "region reference": (_of_type(h5py.regionref_dtype), "is stored as"),
    "scalar": (_of_type("u1", ()), "has shape"),
    "no dataspace": (lambda f, i, s: f.create_dataset("images", data=h5py.Empty("u1")), "has shape"),
    "group for a dataset": (lambda f, i, s: f.create_group("images/images"), "not a dataset"),
    "named type for a dataset": (_named_type, "not a dataset"),
    "loop of groups": (_loop, "not a dataset"),
    "attribute": (_plain_and(_attribute), "attributes"),
    "root attribute": (_plain_and(_root_attribute), "attributes"),
    "further dataset": (_plain_and(lambda f: f.create_dataset("payload", data=np.zeros(3))), "other datasets"),
    "further group": (_plain_and(lambda f: f.create_group("a/b/c")), "other datasets"),
    "further link": (_plain_and(lambda f: f.__setitem__("x", h5py.SoftLink("/y"))), "other datasets"),
    "thousands of names": (_plain_and(_many), "other datasets"),
    "many names for one": (_plain_and(_many_links), "other datasets"),
    "renamed": (lambda f, i, s: f.create_dataset("Images", data=i), "other datasets"),
    "nothing in it": (lambda f, i, s: None, "other datasets"),
}  # fmt: skip


BOXED = {"external storage", "virtual dataset", "external link", "huge shape", "compound", "vlen", "loop of groups"}
assert set(ATTACKS) >= BOXED  # a child process costs 0.2 s: some of each kind


def place_of(file: Path, name: str) -> int | None:
    with h5py.File(file, "r") as opened:
        if opened.get(name, getlink=True).__class__ is not h5py.HardLink or not isinstance(opened[name], h5py.Dataset):
            return None
        return opened[name].id.get_offset()


def build(tmp_path: Path, attack: Attack, **options: Any) -> Path:
    """A bank whose shard 0 is the attack, with a record that claims an honest file."""
    writer = small_bank(tmp_path / "bank")
    arrays = shard_arrays(writer.spec, 0)
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET * 100)
    evil = tmp_path / "evil.h5"
    with h5py.File(evil, "w", **options) as file:
        file["labels"] = arrays["labels"].astype("<i4")
        attack(file, arrays["images"], secret)
    record = {"labels": {"offset": place_of(evil, "labels"), "shape": [10], "dtype": "<i4"}}
    with h5py.File(evil, "r") as file:
        known = isinstance(file.get("images", getlink=True), h5py.HardLink)
    offset = (place_of(evil, "images") if known else None) or record["labels"]["offset"] + 64
    record["images"] = {"offset": offset, "shape": list(ROWS), "dtype": "|u1"}
    data = evil.read_bytes()
    data += bytes(max(0, offset + BYTES - len(data)))  # long enough for what the record claims
    summary = {k: ... for k in ("argmax_matches", "step_range", "difficulty_range", "teacher_agreement",
                                "mean_confidence", "mean_difficulty")}  # fmt: skip
    vouch(writer, 0, data, datasets=record, **summary)
    evil.unlink()
    return tmp_path / "bank"


@pytest.mark.parametrize("name", ATTACKS)
def test_structure(tmp_path, name):
    attack, message = ATTACKS[name]
    bank = build(tmp_path, attack)
    secret = tmp_path / "secret"
    with unread(secret):
        assert_damaged(bank, "shard 0", message, sandbox=name in BOXED)
        read_all(bank)  # reading goes by the record: inside of the file, whatever the HDF5 structure says
    assert secret.read_bytes() == SECRET * 100


def test_the_builder_itself_is_honest(tmp_path):
    """Without an attack the same builder makes a bank that is whole: the refusals above have one reason each."""
    bank = build(tmp_path, _plain_and(lambda f: None))
    assert verify(bank, deep=True).ok and verify_untrusted(bank, deep=True).ok


def test_what_the_reader_reads_is_never_the_external_file(tmp_path):
    bank = build(tmp_path, _external)
    with unread(tmp_path / "secret"):
        assert SECRET[:10] not in Bank(bank).column("images").tobytes()


def test_two_links_to_one_dataset(tmp_path):
    """Both names are in the record, so the record itself must give it away: their bytes overlap."""
    writer = small_bank(tmp_path / "bank")
    evil = tmp_path / "evil.h5"
    with h5py.File(evil, "w") as file:
        file["difficulty"] = np.zeros(10, "<f4")
        file["labels"] = np.zeros(10, "<i4")
        file["images"] = np.zeros(ROWS, "u1")
        file["origin_step"] = file["labels"]
    place = {"offset": place_of(evil, "labels"), "shape": [10], "dtype": "<i4"}
    record = {
        "images": {"offset": place_of(evil, "images"), "shape": list(ROWS), "dtype": "|u1"},
        "difficulty": {"offset": place_of(evil, "difficulty"), "shape": [10], "dtype": "<f4"},
        "labels": place, "origin_step": {**place, "dtype": "<u4"},
    }  # fmt: skip
    vouch(writer, 0, evil.read_bytes(), datasets=record)
    assert_damaged(tmp_path / "bank", "shard 0", "overlap")


def test_user_block(tmp_path):
    """A script before the HDF5 signature: the file would be a program to a shell."""
    bank = build(tmp_path, _plain_and(lambda f: None), userblock_size=512)
    assert_damaged(bank, "shard 0", "user block")


@pytest.mark.parametrize("libver", ["earliest", "latest", ("v110", "v110")])
def test_other_library_versions_are_read_or_refused(tmp_path, libver):
    """A valid file of another HDF5 release is no attack; what it holds is checked all the same."""
    bank = build(tmp_path, _plain_and(lambda f: None), libver=libver)
    assert verify(bank, deep=True).ok
    read_all(bank)


@pytest.mark.parametrize("attack, message", [
    ({"offset": 1 << 40}, "outside the file"), ({"offset": -8}, "malformed"), ({"offset": 2**62}, "outside the file"),
    ({"offset": 10**30}, "outside the file"), ({"offset": True}, "malformed"), ({"offset": 1.0}, "malformed"),
    ({"offset": None}, "malformed"), ({"offset": "0"}, "malformed"), ({"shape": [10**12]}, "must have shape"),
    ({"shape": [-1]}, "must have shape"), ({"shape": []}, "must have shape"), ({"shape": None}, "must have shape"),
    ({"dtype": "O"}, "stored as"), ({"dtype": "|V4"}, "stored as"), ({"dtype": ">i4"}, "stored as"),
    ({"dtype": ["<i4"]}, "stored as"), ({"offset": 1}, "malformed"),
])  # fmt: skip
def test_record_points_elsewhere(tmp_path, attack, message):
    writer = small_bank(tmp_path / "bank")
    datasets = Bank(tmp_path / "bank").sidecars[0].raw["datasets"]
    datasets["labels"] = {**datasets["labels"], **attack}
    vouch(writer, 0, writer.shard_path(0).read_bytes(), datasets=datasets)
    assert_damaged(tmp_path / "bank", "shard 0", message)
    with nothing_written(tmp_path), memory_bounded(), pytest.raises(BankError, match="verify"):
        Bank(tmp_path / "bank")


@pytest.mark.parametrize("column, offset", [("images", 0), ("labels", 0), ("labels", 64), ("origin_seed", 2048)])
def test_record_points_into_the_header_or_a_neighbour(tmp_path, column, offset):
    """Inside of the file, so reading is harmless; verification still finds it."""
    writer = small_bank(tmp_path / "bank")
    datasets = Bank(tmp_path / "bank").sidecars[0].raw["datasets"]
    datasets[column] = {**datasets[column], "offset": offset}
    vouch(writer, 0, writer.shard_path(0).read_bytes(), datasets=datasets)
    problems = verify(tmp_path / "bank").problems["shard 0"][0]
    assert "overlap" in problems or "lies at byte" in problems


def test_megabytes_of_padding_are_inside_the_record(tmp_path):
    """Bytes after the last dataset do nothing: they are hashed, and never read."""
    writer = small_bank(tmp_path / "bank")
    vouch(writer, 0, writer.shard_path(0).read_bytes() + bytes(1 << 20))
    assert verify(tmp_path / "bank", deep=True).ok
    read_all(tmp_path / "bank")


def test_sparse_terabyte(tmp_path):
    """A file of 1 TiB that holds no data: the record can vouch for its size, but its hash would take hours."""
    writer = small_bank(tmp_path / "bank")
    with open(writer.shard_path(0), "r+b") as file:
        file.truncate(1 << 40)
    with memory_bounded():
        assert "bytes, its record says" in verify(tmp_path / "bank").problems["shard 0"][0]
    with memory_bounded(), pytest.raises(BankError, match="bytes"):
        Bank(tmp_path / "bank").column("labels")


@pytest.mark.parametrize("changes", [
    {}, {"images": 1, "images_per_shard": 1}, {"shape": (1, 1, 1), "mean": [0.5], "std": [0.2]}, {"label_kind": "real"},
])  # fmt: skip
def test_honest_banks_pass(tmp_path, changes):
    """The checks refuse nothing that the writer writes."""
    small_bank(tmp_path / "bank", **changes)
    assert verify(tmp_path / "bank", deep=True, untrusted=True).ok


def test_the_witnesses_can_tell(tmp_path):
    """`unread`, `memory_bounded` and `nothing_written` fail when they should, also for what another process does."""
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    for read in (secret.read_bytes, lambda: subprocess.run(["cat", str(secret)], check=True, capture_output=True)):
        with pytest.raises(AssertionError, match="opened"), unread(secret):
            read()
    with pytest.raises(AssertionError, match="memory grew"), memory_bounded():
        np.ones(200 << 20, "u1")
    with pytest.raises(AssertionError, match="changed"), nothing_written(tmp_path):
        secret.write_bytes(b"")
