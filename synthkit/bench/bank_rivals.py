"""The readers that `synthkit bench bank` compares, each in a process of its own.

This file is run as a script, possibly by another interpreter (`--mds-python`), so it imports nothing of synthkit but
for the bank itself. It takes one JSON object per line on stdin and answers with one per line:

    {"do": "prepare"}                      write the store of this reader from the raw arrays, unless it is there
    {"do": "open"}                         import what is needed, make the endless iterator of batches
    {"do": "check", "images": n}           read n images and compare each, and its label, with the raw arrays
    {"do": "run", "at": t, "seconds": s}   begin at time t, count the images read in s seconds

A reader yields (images, labels): a uint8 batch (B, C, H, W) or (B, H, W, C) and B integers, as numpy arrays or tensors.
Every reader draws its rows at random, in the way that its library offers for training.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Batch = tuple[Any, Any]
SHARD_BYTES = 64 << 20  # of the tar files and MDS shards: as large as the bank's


class Source:
    """The raw arrays in `folder`: images.raw (N,C,H,W), labels.raw, logits.raw, difficulty.raw, origin_step.raw."""

    def __init__(self, folder: Path):
        self.folder = folder
        meta = json.loads((folder / "source.json").read_text())
        self.count, self.shape = int(meta["images"]), tuple(meta["shape"])
        self.arrays = {
            name: np.memmap(folder / f"{name}.raw", np.dtype(dtype), "r", shape=(self.count, *row))
            for name, (dtype, row) in meta["columns"].items()
        }
        self.images, self.labels = self.arrays["images"], self.arrays["labels"]

    def pictures(self) -> Iterator[tuple[int, Any, int]]:
        """(index, PIL image, label) of every image."""
        from PIL import Image

        for i in range(self.count):
            yield i, Image.fromarray(np.ascontiguousarray(self.images[i].transpose(1, 2, 0))), int(self.labels[i])


# --- stores -----------------------------------------------------------------------------------------------------------


def write_bank(source: Source, folder: Path) -> None:
    from synthkit.bank.make import bank_from_arrays

    columns = {k: source.arrays[k] for k in ("logits", "difficulty", "origin_step")}
    bank_from_arrays(
        folder, source.images, source.labels, num_classes=10, mean=[0.5] * 3, std=[0.25] * 3, columns=columns,
        label_kind="target",
    )  # fmt: skip


def write_folder(source: Source, folder: Path) -> None:
    for label in np.unique(source.labels):
        (folder / str(label)).mkdir(parents=True)
    for i, picture, label in source.pictures():
        picture.save(folder / str(label) / f"{i:07d}.png")


def write_tar(source: Source, folder: Path, encoding: str) -> None:
    wds: Any = importlib.import_module("webdataset")  # its names are made at run time

    folder.mkdir()
    with wds.ShardWriter(str(folder / "%05d.tar"), maxsize=SHARD_BYTES, maxcount=10**9, verbose=0) as sink:
        if encoding == "png":
            for i, picture, label in source.pictures():
                sink.write({"__key__": f"{i:07d}", "png": picture, "cls": label})
        else:  # plain bytes: the cheapest thing to decode
            for i in range(source.count):
                label = int(source.labels[i])
                sink.write({"__key__": f"{i:07d}", "bin": source.images[i].tobytes(), "cls": label})


def write_mds(source: Source, folder: Path, encoding: str) -> None:
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    kind = "png" if encoding == "png" else "ndarray:uint8:" + ",".join(map(str, source.shape))
    with MDSWriter(out=str(folder), columns={"image": kind, "label": "int"}, size_limit=SHARD_BYTES) as sink:
        if encoding == "png":
            for _, picture, label in source.pictures():
                sink.write({"image": picture, "label": label})
        else:
            for i in range(source.count):
                sink.write({"image": np.array(source.images[i]), "label": int(source.labels[i])})


# --- readers ----------------------------------------------------------------------------------------------------------


def rows_of(count: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Random batches of row numbers: permutation after permutation."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]


def read_memmap(source: Source, _: Path, batch: int, __: int, seed: int, columns: tuple[str, ...]) -> Iterator[Batch]:
    images, labels, *others = (source.arrays[name] for name in columns)
    for rows in rows_of(source.count, batch, seed):
        found = images[rows], labels[rows]
        for array in others:
            array[rows]
        yield found


def read_bank(source: Source, folder: Path, batch: int, _: int, seed: int, **options: Any) -> Iterator[Batch]:
    from synthkit.bank import Bank

    columns = options.pop("columns", ("images", "labels"))
    bank = Bank(folder, **options)
    for rows in rows_of(source.count, batch, seed):
        found = bank.batch(rows, columns)
        yield found.images, found.labels


def stream_bank(source: Source, folder: Path, batch: int, _: int, seed: int, shuffle: str) -> Iterator[Batch]:
    from synthkit.bank import Bank

    bank = Bank(folder)
    for epoch in itertools.count():
        for found in bank.stream(batch, seed=seed, epoch=epoch, columns=("images", "labels"), shuffle=shuffle):  # type: ignore[arg-type]
            if len(found) == batch:
                yield found.images, found.labels


class BankDataset:
    """A map-style dataset that takes a whole batch of indices, as torch's DataLoader allows."""

    def __init__(self, folder: Path):
        from synthkit.bank import Bank

        self.bank = Bank(folder)

    def __len__(self) -> int:
        return len(self.bank)

    def __getitem__(self, rows: list[int]) -> Batch:
        import torch

        found = self.bank.batch(rows, ("images", "labels"))
        return torch.from_numpy(found.images), torch.from_numpy(found.labels)


def load_bank(_: Source, folder: Path, batch: int, workers: int, seed: int) -> Iterator[Batch]:
    import torch
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    data = BankDataset(folder)
    order = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    sampler = BatchSampler(order, batch, drop_last=True)
    return _endless(DataLoader(data, sampler=sampler, batch_size=None, **_workers(workers)))  # type: ignore[arg-type]


def read_folder(source: Source, folder: Path, batch: int, _: int, seed: int) -> Iterator[Batch]:
    from PIL import Image

    files = sorted((p, int(p.parent.name)) for p in folder.glob("*/*.png"))
    for rows in rows_of(len(files), batch, seed):
        chosen = [files[i] for i in rows]
        yield np.stack([np.asarray(Image.open(p)) for p, _ in chosen]), np.array([label for _, label in chosen])


def load_folder(_: Source, folder: Path, batch: int, workers: int, seed: int) -> Iterator[Batch]:
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    order = torch.Generator().manual_seed(seed)
    return _endless(
        DataLoader(ImageFolder(folder, transform=pil_to_tensor), batch, shuffle=True, drop_last=True, generator=order,
                   **_workers(workers))
    )  # fmt: skip


def load_tar(source: Source, folder: Path, batch: int, workers: int, seed: int, encoding: str) -> Iterator[Batch]:
    wds: Any = importlib.import_module("webdataset")  # its names are made at run time

    shape = source.shape

    def plain(sample: dict[str, Any]) -> Batch:
        return np.frombuffer(sample["bin"], np.uint8).reshape(shape), int(sample["cls"])

    files = sorted(str(p) for p in folder.glob("*.tar"))
    data = wds.WebDataset(files, shardshuffle=len(files), seed=seed, workersplitter=_per_worker, empty_check=False)
    data = data.shuffle(1000)
    data = data.decode("rgb8").to_tuple("png", "cls") if encoding == "png" else data.map(plain)
    data = data.batched(batch, partial=False)
    return _endless(wds.WebLoader(data, batch_size=None, **_workers(workers)))


def _per_worker(files: Any) -> Any:
    """Split the files among the workers where there are enough of them; with one file all workers read it."""
    from webdataset.shardlists import split_by_worker  # pyright: ignore[reportMissingImports]

    files = list(files)
    return split_by_worker(files) if len(files) > 1 else files


def load_mds(_: Source, folder: Path, batch: int, workers: int, seed: int, encoding: str) -> Iterator[Batch]:
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader

    def collate(samples: list[dict[str, Any]]) -> Batch:
        return np.stack([np.asarray(s["image"]) for s in samples]), np.array([s["label"] for s in samples])

    data = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=seed, batch_size=batch)
    return _endless(DataLoader(data, batch, drop_last=True, collate_fn=collate, **_workers(workers)))


def read_mds(source: Source, folder: Path, batch: int, _: int, seed: int) -> Iterator[Batch]:
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]

    data = StreamingDataset(local=str(folder), batch_size=batch)
    for rows in rows_of(source.count, batch, seed):
        samples = [data[int(i)] for i in rows]
        yield np.stack([s["image"] for s in samples]), np.array([s["label"] for s in samples])


def _workers(count: int) -> dict[str, Any]:
    if not count:
        return {"num_workers": 0}
    # fork: what is read must not have to be pickled for the comparison
    return {"num_workers": count, "persistent_workers": True, "multiprocessing_context": "fork"}


def _endless(loader: Any) -> Iterator[Batch]:
    while True:
        for found in loader:
            yield found[0], found[1]


ALL = ("images", "labels", "logits", "difficulty", "origin_step")
# name -> (folder of the store or None for the raw arrays, how it is written, how it is read)
READERS: dict[str, tuple[str | None, Callable[..., None] | None, Callable[..., Iterator[Batch]]]] = {
    "memmap": (None, None, lambda *a: read_memmap(*a, columns=("images", "labels"))),
    "memmap_all": (None, None, lambda *a: read_memmap(*a, columns=ALL)),
    "bank": ("bank", write_bank, read_bank),
    "bank_all": ("bank", write_bank, lambda *a: read_bank(*a, columns=None)),
    "bank_unmapped": ("bank", write_bank, lambda *a: read_bank(*a, mapped=False)),
    "bank_stream": ("bank", write_bank, lambda *a: stream_bank(*a, shuffle="random")),
    "bank_blocks": ("bank", write_bank, lambda *a: stream_bank(*a, shuffle="blocks")),
    "bank_loader": ("bank", write_bank, load_bank),
    "imagefolder_pil": ("folder", write_folder, read_folder),
    "imagefolder_loader": ("folder", write_folder, load_folder),
    "webdataset_raw": ("tar-raw", lambda s, f: write_tar(s, f, "raw"), lambda *a: load_tar(*a, encoding="raw")),
    "webdataset_png": ("tar-png", lambda s, f: write_tar(s, f, "png"), lambda *a: load_tar(*a, encoding="png")),
    "mds_raw": ("mds-raw", lambda s, f: write_mds(s, f, "raw"), lambda *a: load_mds(*a, encoding="raw")),
    "mds_png": ("mds-png", lambda s, f: write_mds(s, f, "png"), lambda *a: load_mds(*a, encoding="png")),
    "mds_raw_index": ("mds-raw", lambda s, f: write_mds(s, f, "raw"), read_mds),
}
THROUGH_WORKERS = ("bank_loader", "imagefolder_loader", "webdataset_raw", "webdataset_png", "mds_raw", "mds_png")
"""Read by worker processes of a torch DataLoader; the others by independent processes."""


ALONE = ("mds_raw_index",)
"""Measured with one process only: two StreamingDatasets on one folder need a distributed run."""


# --- the process ------------------------------------------------------------------------------------------------------


class Worker:
    """Answers the commands of the parent for one reader."""

    def __init__(self, reader: str, folder: Path, batch: int, workers: int, seed: int):
        self.source, self.batch, self.workers, self.seed = Source(folder), batch, workers, seed
        store, self.write, self.read = READERS[reader]
        self.store = folder if store is None else folder / store
        self.batches: Iterator[Batch] | None = None

    def prepare(self, _: dict[str, Any]) -> dict[str, Any]:
        done = self.store.with_name(self.store.name + ".done")
        started = time.perf_counter()
        if self.write is not None and not done.exists():
            self.write(self.source, self.store)
            done.touch()
        return {"seconds": round(time.perf_counter() - started, 3)}

    def open(self, _: dict[str, Any]) -> dict[str, Any]:
        self.batches = self.read(self.source, self.store, self.batch, self.workers, self.seed)
        next(self.batches)
        return {}

    def check(self, command: dict[str, Any]) -> dict[str, Any]:
        """Every image read must be one of the source (by checksum), with its label."""
        assert self.batches is not None
        known = {
            _checksum(image): int(label) for image, label in zip(self.source.images, self.source.labels, strict=True)
        }
        seen, wrong, distinct = 0, 0, set()
        for images, labels in self.batches:
            images, labels = np.asarray(images), np.asarray(labels)
            if images.dtype != np.uint8 or len(images) != self.batch:
                return {"error": f"a batch is {images.dtype} {images.shape}"}
            if images.shape[1:] != self.source.shape:
                images = images.transpose(0, 3, 1, 2)
            for image, label in zip(images, labels, strict=True):
                checksum = _checksum(image)
                wrong += known.get(checksum) != int(label)
                distinct.add(checksum)
            seen += len(images)
            if seen >= command["images"]:
                break
        return {"checked": seen, "wrong": wrong, "distinct": len(distinct)}

    def run(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.batches is not None
        time.sleep(max(0.0, command["at"] - time.time()))
        for _ in range(1 + 2 * self.workers):  # what the workers had ready (prefetch_factor is 2) is not counted
            next(self.batches)
        images, started, used = 0, time.perf_counter(), time.process_time()
        while (now := time.perf_counter()) - started < command["seconds"]:
            found = next(self.batches)
            images += len(found[0])
        return {"rate": images / (now - started), "cpu_seconds": round(time.process_time() - used, 3)}


def _checksum(image: np.ndarray) -> bytes:
    """128 bits: 32 collide among 50,000 images in one set of four (and did)."""
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()


def main() -> int:
    """Serve commands until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=list(READERS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to stderr, not between the answers
    worker: Worker | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if worker is None:
                worker = Worker(args.reader, args.folder, args.batch, args.workers, args.seed)
            answer = getattr(worker, command["do"])(command)
        except Exception as error:  # the parent decides: a missing module is reported, everything else ends the bench
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            answer = {"error": f"{type(error).__name__}: {error}", "missing": missing}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    # run as a script: this folder's own modules (bank.py) must not hide others of their name
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]
    sys.exit(main())
