"""What the fuzzer throws its inputs at: every reader of a bank's files, on a small whole bank.

`Target.run(data)` puts `data` in the place of one file and reads it as a consumer would. True: accepted, and everything
that can be read from it was read, from inside of the file. False: refused with a `BankError` (or, for recipes, a
`ConfigError`). Any other exception is a finding.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.bench import fuzz_mutate as mutate
from synthkit.errors import BankError, ConfigError, SynthkitError

Mutator = Callable[[random.Random, Sequence[bytes]], bytes]

SHAPE, CLASSES, IMAGES, PER_SHARD = (1, 4, 4), 5, 8, 4


class Broken(AssertionError):
    """An input was accepted that is not harmless."""


@dataclass(frozen=True)
class Target:
    """One reader."""

    name: str
    share: float
    """Part of the inputs."""
    seeds: list[bytes]
    mutators: list[Mutator]
    run: Callable[[bytes], bool]
    is_json: bool = False


def build_bank(path: Path) -> None:
    """The bank that the targets stand on: every kind of part, all columns."""
    from synthkit.bank import BankSpec, BankWriter, state
    from synthkit.bank.labels.sets import LabelSpec
    from synthkit.bank.labels.topk import compress_topk
    from synthkit.bank.labels.views import ViewDraw, ViewPolicy
    from synthkit.bank.labels.writer import LabelWriter

    rng = np.random.default_rng(0)
    affine = {"scale": np.ones(1, "f4"), "shift": np.zeros(1, "f4")}
    spec = BankSpec(
        shape=SHAPE, num_classes=CLASSES, class_names=list("abcde"), mean=[0.5], std=[0.2], images=IMAGES,
        images_per_shard=PER_SHARD, seed=1, recipe={"method": {"name": "cudfkd"}}, top_k=2,
        teacher={"arch": "lenet5", "sha256": "ab" * 32}, transform=state.transform_entry("affine", affine),
    )  # fmt: skip
    writer = BankWriter.create(path, spec)
    writer.write_transform(affine)
    for index in range(spec.shards):
        logits = rng.normal(size=(PER_SHARD, CLASSES)).astype(np.float16)
        top = compress_topk(logits, 2)
        images = rng.integers(0, 256, (PER_SHARD, *SHAPE), dtype=np.uint8)
        writer.write_shard(index, {
            "images": images, "labels": logits.argmax(1), "logits": logits, "difficulty": rng.random(PER_SHARD),
            "origin_step": np.arange(PER_SHARD), "origin_seed": np.arange(PER_SHARD),
            "images_f16": images.astype(np.float16), "topk_index": top[0], "topk_logit": top[1],
            "tail_logsumexp": top[2],
        }, {})  # fmt: skip
    writer.save_state(1, {"w": np.arange(6.0).reshape(2, 3), "n": np.int64(3)}, {"rng": 2**100})
    writer.write_generator(0, {"w": np.ones((2, 2), "f4")}, {"arch": "dcgan"})
    base = {"bank": writer.record["uuid"], "images": IMAGES, "num_classes": CLASSES, "rows_per_shard": 8}
    size = (SHAPE[1], SHAPE[2])
    for name, spec_of in {
        "plain": LabelSpec(**base, kind="images", rows=IMAGES),
        "views": LabelSpec(**base, kind="views", rows=2 * IMAGES, size=size, top_k=2),
    }.items():
        labels = LabelWriter.create(path, name, spec_of)
        for index in range(spec_of.shards):
            count, start = spec_of.shard_size(index), index * spec_of.per_shard
            logits = rng.normal(size=(count, CLASSES)).astype(np.float16)
            columns: dict[str, Any] = {"logits": logits}
            if spec_of.kind == "views":
                draw = ViewDraw(ViewPolicy(epochs=2, mix="cutmix"), images=IMAGES, source=size, size=size, seed=1)
                columns = draw.rows(start, start + count)
                columns |= zip(("topk_index", "topk_logit", "tail_logsumexp"), compress_topk(logits, 2), strict=True)
            labels.write_shard(index, columns, {})


class Stage:
    """The bank of `build_bank` at `path`, and the targets on it. One process at a time uses it."""

    def __init__(self, path: Path):
        from synthkit.bank import Bank

        self.path = path
        self.bank = Bank(path)
        self.sidecar = self.bank.sidecars[0]
        self.shard = (path / "shards" / "00000.h5").read_bytes()
        self.scratch = path.parent / "scratch"
        self.scratch.mkdir(exist_ok=True)
        self._honest = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}

    def _swap(self, name: str, data: bytes) -> Path:
        file = self.path / name
        file.write_bytes(data)
        return file

    def restore(self) -> None:
        """Every file as it was."""
        for file, data in self._honest.items():
            file.write_bytes(data)

    def targets(self) -> list[Target]:
        """All of them; the shares add up to 1."""

        def seeds(*names: str) -> list[bytes]:
            return [self._honest[self.path / name] for name in names]

        text = [mutate.mutate_json] * 6 + [mutate.flip_bits, mutate.truncate, mutate.splice]
        first = min(p.offset for p in self.sidecar.datasets.values())
        header = mutate.edge_numbers(lambda data: [range(0, 96), range(96, min(first, len(data)))])
        shard_mutators: list[Mutator] = [header] * 6 + [mutate.flip_bits, mutate.truncate, mutate.splice]
        tensors = mutate.edge_numbers(lambda data: [range(0, 8), range(8, max(9, len(data) - 48))])
        return [
            Target("bank.json", 0.14, seeds("bank.json"), text, self._bank_json, True),
            Target("sidecar", 0.2, seeds("shards/00000.json"), text, self._sidecar, True),
            Target("offsets", 0.1, seeds("shards/00000.json"), [_move_columns], self._sidecar, True),
            Target("manifest", 0.1, seeds("manifest.json"), text, self._manifest, True),
            Target("labels.json", 0.08, seeds("labels/plain/labels.json", "labels/views/labels.json"), text,
                   self._labels, True),
            Target("state record", 0.06, seeds("state/00001.json"), text, self._state, True),
            Target("claim", 0.02, [_CLAIM], text, self._claim, True),
            Target("safetensors", 0.1, seeds("state/00001.safetensors"),
                   [tensors, _rewrite_header, mutate.flip_bits, mutate.truncate, mutate.splice], self._safetensors),
            Target("shard HDF5", 0.14, [self.shard], shard_mutators, self._structure),
            Target("recipe YAML", 0.06, [_RECIPE], [mutate.flip_bits, mutate.splice, _yaml_tricks], self._yaml),
        ]  # fmt: skip

    def _bank_json(self, data: bytes) -> bool:
        from synthkit.bank import Bank, card
        from synthkit.bank.spec import read_record

        self._swap("bank.json", data)
        try:
            spec, record = read_record(self.path)
        except BankError:
            return False
        card.render(spec, record, [self.sidecar], "0" * 64)
        if spec.shards * spec.per_shard < spec.images or (spec.shards - 1) * spec.per_shard >= spec.images:
            raise Broken("shards do not add up to the images")
        try:
            bank = Bank(self.path)
        except BankError:  # the record is good in itself, the shards are not its own
            return True
        _read_all(bank)
        return True

    def _sidecar(self, data: bytes) -> bool:
        from synthkit.bank import Bank

        self._swap("shards/00000.json", data)
        try:
            bank = Bank(self.path)
        except BankError:
            return False
        for place in bank.sidecars[0].datasets.values():
            if not 0 <= place.offset <= place.offset + _bytes(place) <= bank.sidecars[0].bytes:
                raise Broken(f"a column outside of the file: {place}")
        if bank.sidecars[0].bytes != len(self.shard):  # then the size decides, before a byte is read
            try:
                bank.column("images")
            except BankError:
                return True
            raise Broken("a shard of the wrong size was read")
        _read_all(bank)
        for name, place in bank.sidecars[0].datasets.items():
            wanted = self.shard[place.offset : place.offset + _bytes(place)]
            if name in bank.columns and bank.column(name)[:PER_SHARD].tobytes() != wanted:
                raise Broken(f"{name} is not what lies at its offset")
        return True

    def _manifest(self, data: bytes) -> bool:
        from synthkit.bank import seal

        self._swap("manifest.json", data)
        try:
            table = seal.read_manifest(self.path, self.bank.spec)
        except BankError:
            return False
        if table is None or sorted(table) != [0, 1]:
            raise Broken("other rows than planned")
        seal.check_manifest(self.path, self.bank.spec, self.bank.record)
        self.bank.info()
        return True

    def _labels(self, data: bytes) -> bool:
        from synthkit.bank.labels.sets import read_label_record

        name = "views" if b'"views"' in data else "plain"
        self._swap(f"labels/{name}/labels.json", data)
        try:
            spec, _ = read_label_record(self.path / "labels" / name)
        except BankError:
            return False
        if not 0 < spec.rows <= spec.shards * spec.per_shard:
            raise Broken("shards do not add up to the rows")
        try:
            found = self.bank.labels(name)
            rows = found.rows(np.arange(len(found)))
        except BankError:
            return True
        if any(len(values) != len(found) for values in rows.values()):
            raise Broken("rows are missing")
        return True

    def _state(self, data: bytes) -> bool:
        from synthkit.bank import state

        self._swap("state/00001.json", data)
        try:
            state.read_entry(self.path / "state", 1).load()
        except BankError:
            return False
        return True

    def _safetensors(self, data: bytes) -> bool:
        from synthkit.bank import state

        file = self._swap("state/00001.safetensors", data)
        try:
            arrays = state.read_arrays(file, hashlib.sha256(data).hexdigest())
        except BankError:
            return False
        if sum(a.nbytes for a in arrays.values()) > len(data):
            raise Broken("more bytes than the file has")
        for array in arrays.values():
            array.tobytes()
        return True

    def _structure(self, data: bytes) -> bool:
        import h5py

        from synthkit.bank.checking.structure import check_datasets

        file = self.scratch / "shard.h5"
        file.write_bytes(data)
        fits = max(p.offset + _bytes(p) for p in self.sidecar.datasets.values()) <= len(data)
        try:
            if not fits:  # as the record's size does in `verify`
                raise BankError("too short")
            check_datasets(file, self.sidecar.datasets)
        except BankError:
            return False
        with h5py.File(file, "r", locking=False) as opened:  # what any other HDF5 program then reads is what we read
            for name, place in self.sidecar.datasets.items():
                node = opened[name]
                assert isinstance(node, h5py.Dataset)
                if node[()].tobytes() != data[place.offset : place.offset + _bytes(place)]:
                    raise Broken(f"{name} is not what lies at its offset")
        return True

    def _claim(self, data: bytes) -> bool:
        from synthkit.bank.disk.lock import read_claims

        (self.path / "state" / "claims").mkdir(exist_ok=True)
        file = self._swap("state/claims/x.json", data)
        try:
            for holder in read_claims(self.path):
                _ = holder.name, holder.shards, holder.on_this_machine
        except SynthkitError:
            return False
        finally:
            os.unlink(file)
        return True

    def _yaml(self, data: bytes) -> bool:
        from synthkit.config import safe_yaml

        file = self.scratch / "recipe.yaml"
        file.write_bytes(data)
        try:
            value = safe_yaml.load(file)
        except ConfigError:
            return False
        if not isinstance(value, dict) or len(repr(value)) > 100 * len(data) + 100:
            raise Broken("the value is larger than its text")
        return True


def _bytes(place: Any) -> int:
    return math.prod(place.shape) * place.dtype.itemsize


def _read_all(bank: Any) -> None:
    """Every column, the facts, and what the commands print of them."""
    from synthkit.cli.bank.info import info_lines

    for name in bank.columns:
        if len(bank.column(name)) != len(bank):
            raise Broken(f"{name} lacks rows")
    try:
        facts = bank.info()
    except BankError:  # the manifest is not that of this bank
        return
    json.dumps(facts)
    "\n".join(info_lines(bank, facts)).encode()


def _move_columns(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A record that is right but for where its columns lie."""
    record = json.loads(rng.choice(seeds))
    for name in rng.sample(sorted(record["datasets"]), rng.choice((1, 1, 2, 10))):
        entry, near = record["datasets"][name], rng.random() < 0.7
        old = entry["offset"]
        entry["offset"] = old + rng.choice((-64, -8, -4, -2, -1, 1, 2, 4, 8, 64)) if near else rng.choice(mutate.EDGES)
        if rng.random() < 0.2:
            entry["offset"] = rng.randrange(record["bytes"])
    if rng.random() < 0.1:
        record["bytes"] += rng.choice((1, -1, 4096))
    return json.dumps(record).encode()


def _rewrite_header(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Safetensors with a mutated JSON header whose length fits."""
    data = rng.choice(seeds)
    length = int.from_bytes(data[:8], "little")
    header = mutate.mutate_json(rng, [data[8 : 8 + length]])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _yaml_tricks(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    lines = rng.choice(seeds).decode().splitlines()
    tricks = (
        "a: &x [1, 2]", "b: *x", "<<: {a: 1}", "c: !!python/object/apply:os.system ['id']", "? [a]\n: b", "%YAML 1.1",
        "d: " + "[" * 60 + "]" * 60, "e: " + "{a: " * 30 + "}" * 30, "---", "...", "\tf: 1", "g: |\n  x", "1: 2",
        "x: 0o17", "y: 1e400", "z: 2001-01-01", "u: \"\\ud800\"", "n: !!null", "b: !!binary aGk=", "s: !!set {a}",
        "o: " + "9" * 5000,
    )  # fmt: skip
    for _ in range(rng.choice((1, 2, 3))):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(tricks))
    return "\n".join(lines).encode()


_CLAIM = json.dumps({"pid": 1, "host": "h", "boot": "b", "namespace": "n", "shards": [[0, 4, 1]], "count": 3}).encode()
_RECIPE = b"method: cudfkd\nteacher: r34\nimages: 100\nmethod.lr: 1e-3\nlist: [1, 2.5, x]\nmap: {a: true, b: null}\n"
