"""What `bench kills` kills: writer, claims, labels, sealer, repair, merger, exporter, importer.

Every stage works on the banks of `known_rows`, so that each byte on the disk can be told right or wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from synthkit.bank import Bank, BankWriter
from synthkit.bank.export import FORMATS, export
from synthkit.bank.imports import IMPORTERS, import_bank
from synthkit.bank.label_writer import LabelWriter
from synthkit.bank.labels import LabelSpec
from synthkit.bank.merge import merge
from synthkit.bank.repair import repair
from synthkit.bank.seal import seal
from synthkit.bank.verify import verify
from synthkit.bench.kill_probe import Shared
from synthkit.bench.known_rows import (
    CLASSES,
    PER_SHARD,
    SHARDS,
    columns_of,
    make_bank,
    noise_bits,
    numbers_in,
    rows_of,
    spec_of,
    wrong_rows,
)
from synthkit.errors import RunError


@dataclass
class Finding:
    """What is true of a folder at one moment."""

    problems: list[str] = field(default_factory=list)
    committed: set[int] = field(default_factory=set)
    """Shards that are there and whole."""
    images: int = 0
    """Images of these shards, each of which was compared with what it must be."""
    wrong: int = 0
    """Images that are not what they must be."""
    state: str = ""
    """For a target that is whole or absent: which."""


def bank_finding(path: Path) -> Finding:
    """Verify a bank of `columns_of` rows in depth, and compare every row."""
    found = Finding()
    if not (path / "bank.json").exists():
        return found
    report = verify(path, deep=True)
    found.problems = [f"{part}: {text}" for part, texts in report.problems.items() for text in texts]
    found.committed = set(report.committed) - set(report.damaged_shards)
    if found.committed and not found.problems:
        bank = Bank(path)
        found.images = len(bank)
        found.wrong = wrong_rows(bank, np.arange(len(bank)), numbers_in(bank))
    return found


def tree(folder: Path, keep: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """Relative name -> sha256 of every file below `folder` that is kept."""
    if not folder.exists():
        return {}
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if keep(name)}


def _content(name: str) -> bool:
    """Files of a bank whose bytes depend on the content alone (records and card tell of times and hosts)."""
    return name.endswith((".h5", ".safetensors"))


class Stage:
    """One kind of work that is killed. A folder belongs to one trial; `setup` is made once and read by all."""

    name = ""
    roles: tuple[int, ...] = (0,)
    """Processes that work at the same time."""
    pieces = 1
    """What can be acknowledged."""
    watched = False
    """Whether a reader looks at `folder / "bank"` all the while."""

    def setup(self, shared: Path) -> None:
        """Make, once, what `prepare` copies."""

    def prepare(self, folder: Path) -> None:
        """Make the inputs of a trial."""
        folder.mkdir()

    def operate(self, folder: Path, role: int, shared: Shared) -> None:
        """The work; done again after a kill, it goes on or begins anew. Runs in a child."""
        raise NotImplementedError

    def check(self, folder: Path) -> Finding:
        """Look at everything after a kill."""
        raise NotImplementedError

    def result(self, folder: Path) -> dict[str, str]:
        """What the work has made, as name -> sha256; equal for equal results."""
        raise NotImplementedError


class Writer(Stage):
    """One process fills a bank: states before shards, snapshots, pruning, the seal at the end."""

    name, pieces, watched = "writer", SHARDS, True

    def operate(self, folder: Path, role: int, shared: Shared) -> None:
        writer = BankWriter.open_or_create(folder / "bank", spec_of(1))
        with writer.lock():
            found = writer.load_state()
            index, chain = (found[0], found[1]["chain"]) if found else (0, np.array([1], np.uint64))
            while index < SHARDS:
                chain = noise_bits(chain, 1, index)[:, 0]
                writer.save_state(index + 1, {"chain": chain}, {"plain": {"step": index}})
                if index % 3 == 2:
                    writer.write_generator(index, {"chain": chain}, {"step": index})
                writer.write_shard(index, columns_of(rows_of(writer.spec, index), 1), {"step": index})
                shared.acknowledge(index)
                writer.prune_states(keep=1)
                index += 1
            writer.prune_states(keep=1)  # a run that was killed after its last shard has not come to it

    def check(self, folder: Path) -> Finding:
        return bank_finding(folder / "bank")

    def result(self, folder: Path) -> dict[str, str]:
        files = tree(folder / "bank", lambda name: _content(name) and "quarantine" not in name)
        return {**files, "root": str(Bank(folder / "bank").info()["root"])}


class Claims(Writer):
    """Two processes fill one bank, each the shards that it claims; one or both are killed."""

    name, roles = "claims", (0, 1)

    def operate(self, folder: Path, role: int, shared: Shared) -> None:
        writer = BankWriter.open_or_create(folder / "bank", spec_of(2))
        mine = list(range(role, SHARDS, 2))
        with writer.claim(mine):
            for index in mine:
                writer.write_shard(index, columns_of(rows_of(writer.spec, index), 2))
                shared.acknowledge(index)
        if not writer.missing():
            writer.finish()


class Synthesize(Stage):
    """The command `synthesize` itself, as two workers of one bank: `--shards 1/2` and `--shards 2/2`."""

    name, roles, pieces = "synthesize", (1, 2), SHARDS

    def setup(self, shared: Path) -> None:
        self.data = make_bank(shared / "data", 6, images=3 * SHARDS * PER_SHARD)

    def operate(self, folder: Path, role: int, shared: Shared) -> None:
        from synthkit.cli.main import main

        words = ("--method", "random_real", "--data", f"bank:{self.data}", "--images", str(SHARDS * PER_SHARD),
                 "--images_per_shard", str(PER_SHARD), "--device", "cpu", "--threads", "1", "--seed", "3")  # fmt: skip
        with (
            open(folder / f"worker{role}.log", "a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            code = main(["synthesize", *words, "--shards", f"{role}/2", "--out", str(folder / "bank")])
        if code:
            raise RunError("bench kills: synthesize failed", got=code, hint=f"see {folder}/worker{role}.log")

    def check(self, folder: Path) -> Finding:
        found = Finding()
        if (folder / "bank" / "bank.json").exists():
            report = verify(folder / "bank", deep=True)
            found.problems = [f"{part}: {texts[0]}" for part, texts in report.problems.items()]
            found.committed = set(report.committed) - set(report.damaged_shards)
        return found

    def result(self, folder: Path) -> dict[str, str]:
        return tree(folder / "bank", _content)


class Labels(Stage):
    """A label set beside a finished bank."""

    name, pieces = "labels", SHARDS

    def setup(self, shared: Path) -> None:
        self.base = make_bank(shared / "base", 3)

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self.base, folder / "bank")

    def _spec(self, bank: Bank) -> LabelSpec:
        return LabelSpec(kind="images", bank=bank.record["uuid"], images=len(bank), rows=len(bank),
                         num_classes=CLASSES, rows_per_shard=PER_SHARD)  # fmt: skip

    def operate(self, folder: Path, role: int, shared: Shared) -> None:
        writer = LabelWriter.open_or_create(folder / "bank", "other", self._spec(Bank(folder / "bank")))
        with writer.claim():
            for index in writer.missing():
                rows = np.arange(index * PER_SHARD, (index + 1) * PER_SHARD)
                writer.write_shard(index, {"logits": columns_of(rows, 77)["logits"]})
                shared.acknowledge(index)

    def check(self, folder: Path) -> Finding:
        found = bank_finding(folder / "bank")
        place = folder / "bank" / "labels" / "other"
        if not (place / "labels.json").exists():
            found.committed = set()
            return found
        found.committed = {int(p.stem) for p in place.glob("[0-9]*.json")}  # verify has read each of them
        for index in found.committed if not found.problems else ():
            rows = np.arange(index * PER_SHARD, (index + 1) * PER_SHARD)
            data = (place / f"{index:05d}.h5").read_bytes()
            found.images += len(rows)
            found.wrong += 0 if columns_of(rows, 77)["logits"].tobytes() in data else len(rows)
        return found

    def result(self, folder: Path) -> dict[str, str]:
        return tree(folder / "bank" / "labels", _content)


class Sealer(Stage):
    """Sealing a finished bank: for the first time, or over a manifest of schema 1."""

    name = "sealer"

    def __init__(self, renew: bool):
        self.renew = renew
        self.name = "sealer, of an old seal" if renew else "sealer"

    def setup(self, shared: Path) -> None:
        self.base = make_bank(shared / f"base-{self.renew}", 4, generators=True)
        manifest = json.loads((self.base / "manifest.json").read_text())
        for name in ("manifest.json", "README.md"):
            (self.base / name).unlink()
        if self.renew:
            old = {key: manifest[key] for key in ("uuid", "root", "shards")}
            (self.base / "manifest.json").write_text(json.dumps({**old, "schema": 1}))
            record = json.loads((self.base / "bank.json").read_text())
            lowered = {k: v for k, v in record.items() if k not in ("top_k", "transform")}
            (self.base / "bank.json").write_text(json.dumps({**lowered, "schema": 1, "min_reader": 1}))

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self.base, folder / "bank")

    def operate(self, folder: Path, role: int, shared: Shared) -> None:
        seal(folder / "bank", renew=self.renew)

    def check(self, folder: Path) -> Finding:
        found = bank_finding(folder / "bank")
        where = folder / "bank" / "manifest.json"
        found.state = "absent" if not where.exists() else f"schema {json.loads(where.read_text())['schema']}"
        return found

    def result(self, folder: Path) -> dict[str, str]:
        return tree(folder / "bank")


class Repairer(Stage):
    """Setting two damaged shards, a lost record and a snapshot aside. Nothing may vanish."""

    name = "repair"

    def setup(self, shared: Path) -> None:
        self.base = make_bank(shared / "base", 5, generators=True)
        for name in ("shards/00002.h5", "generators/00000.safetensors"):
            data = bytearray((self.base / name).read_bytes())
            data[-1] ^= 1
            (self.base / name).write_bytes(data)
        (self.base / "shards/00004.json").write_text("{")
        self.bytes = sorted(tree(self.base).values())

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self.base, folder / "bank")

    def operate(self, folder: Path, role: int, shared: Shared) -> None:
        repair(folder / "bank")

    def check(self, folder: Path) -> Finding:
        report = verify(folder / "bank", deep=True)
        whole = set(report.committed) - set(report.damaged_shards)
        found = Finding(committed=whole, images=PER_SHARD * len(whole))
        allowed = {"shard 2", "shard 4", "generators 0", "manifest"}
        found.problems = [f"{part}: {texts[0]}" for part, texts in report.problems.items() if part not in allowed]
        lost = set(self.bytes) - set(tree(folder / "bank").values())
        found.problems += [f"{len(lost)} files are gone"] if lost else []
        if {0, 1, 3, 5, 6, 7} - whole:
            found.problems.append("a whole shard is gone")
        return found

    def result(self, folder: Path) -> dict[str, str]:
        report = verify(folder / "bank")
        return {"problems": str(report.problems), "committed": str(report.committed), **tree(folder / "bank" / "shards",
                lambda name: int(name[:5]) not in (2, 4))}  # fmt: skip


class Target(Stage):
    """A target that is whole or absent; the inputs are read in place and must not change."""

    def __init__(self, name: str, inputs: Callable[[Path], list[Path]], run: Callable[[list[Path], Path], object],
                 keep: Callable[[str], bool], bank: bool):  # fmt: skip
        self.name, self._inputs, self._run, self._keep, self._bank = name, inputs, run, keep, bank

    def setup(self, shared: Path) -> None:
        self.inputs = self._inputs(shared)
        self.before = [tree(path) if path.is_dir() else _one(path) for path in self.inputs]
        self.reference: dict[str, str] | None = None

    def operate(self, folder: Path, role: int, shared: Shared) -> None:
        if not (folder / "out").exists():  # a kill may come after the rename
            self._run(self.inputs, folder / "out")
        shared.acknowledge(0)

    def check(self, folder: Path) -> Finding:
        found = Finding(state="whole" if (folder / "out").exists() else "absent")
        if [tree(path) if path.is_dir() else _one(path) for path in self.inputs] != self.before:
            found.problems.append("an input was changed")
        strange = [p.name for p in folder.iterdir() if p.name != "out" and not p.name.startswith(".out.tmp-")]
        found.problems += [f"{strange[0]} was left there"] if strange else []
        if found.state == "whole":
            found.committed = {0}
            if self.reference is not None and self.result(folder) != self.reference:
                found.problems.append("the target is there, but it is not whole")
            if self._bank:
                report = verify(folder / "out", deep=True)
                found.problems += [f"{part}: {texts[0]}" for part, texts in report.problems.items()]
                found.images = len(Bank(folder / "out"))
        return found

    def result(self, folder: Path) -> dict[str, str]:
        files = tree(folder / "out", self._keep)
        if self.reference is None:
            self.reference = files
        return files


def _one(path: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}


def _join(shared: Path) -> list[Path]:
    return [make_bank(shared / "a", 11, shards=None), make_bank(shared / "b", 12)]


def _ragged(shared: Path) -> list[Path]:
    return [make_bank(shared / "a", 13, images=90), make_bank(shared / "b", 14, images=100, images_per_shard=30)]


def _hosts(shared: Path) -> list[Path]:
    return [make_bank(shared / f"host{i}", 15, shards=list(range(i, SHARDS, 3))) for i in range(3)]


def _single(shared: Path) -> list[Path]:
    return [make_bank(shared / "a", 16, images=96, images_per_shard=24)]


def _exported(shared: Path) -> list[Path]:
    return [export(_single(shared)[0], "npz", shared / "npz") / "bank.npz"]


def _merge(inputs: list[Path], out: Path) -> None:
    merge(inputs, out)


def _import(inputs: list[Path], out: Path) -> None:
    import_bank(inputs[0], out, "npz")


def _exporter(format: str) -> Callable[[list[Path], Path], object]:
    return lambda inputs, out: export(inputs[0], format, out)


def warm() -> None:
    """Import what the work imports when it first needs it: a child must not spend its life on imports."""
    engine = (
        "synthkit.cli.synthesize",
        "synthkit.synthesis.engine",
        "synthkit.synthesis.selection.random_real",
        "torch",
    )
    for name in ("h5py", "safetensors.numpy", "PIL.Image", "PIL.PngImagePlugin", *engine, *FORMATS.values()):
        importlib.import_module(name.partition(":")[0])
    for module, _ in IMPORTERS.values():
        importlib.import_module(f"synthkit.bank.imports.{module}")


def stages() -> list[tuple[Stage, float]]:
    """All stages, and the share of the kills that each gets."""
    banks = [("merger, joins", _join, 0.08), ("merger, packs anew", _ragged, 0.06), ("merger, unites", _hosts, 0.06)]
    formats = ("imagefolder", "parquet", "webdataset", "npz")
    return [
        (Writer(), 0.22), (Claims(), 0.12), (Synthesize(), 0.06), (Labels(), 0.05),
        (Sealer(False), 0.07), (Sealer(True), 0.05), (Repairer(), 0.04),
        *((Target(name, inputs, _merge, _content, True), share) for name, inputs, share in banks),
        *((Target(f"exporter, {f}", _single, _exporter(f), lambda name: True, False), 0.04) for f in formats),
        (Target("importer, npz", _exported, _import, _content, True), 0.03),
    ]  # fmt: skip
