"""What `bench kills` kills: writers, sealer, repair; and `kill_targets`: merger, exporter, importer, dedup.

Every stage works on the banks of `known_rows`, so that each byte on the disk can be told right or wrong.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
from pathlib import Path

import numpy as np

from synthkit.bank import Bank, BankWriter
from synthkit.bank.checking.repair import repair
from synthkit.bank.checking.verify import verify
from synthkit.bank.export import FORMATS
from synthkit.bank.imports import IMPORTERS
from synthkit.bank.labels.sets import LabelSpec
from synthkit.bank.labels.writer import LabelWriter
from synthkit.bank.seal import seal
from synthkit.bench.kill_probe import Shared
from synthkit.bench.kill_stage import Finding, Stage, bank_finding, content, tree
from synthkit.bench.kill_targets import targets
from synthkit.bench.known_rows import CLASSES, PER_SHARD, SHARDS, columns_of, make_bank, noise_bits, rows_of, spec_of
from synthkit.errors import RunError


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
        files = tree(folder / "bank", lambda name: content(name) and "quarantine" not in name)
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
        return tree(folder / "bank", content)


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
        return tree(folder / "bank" / "labels", content)


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
    return [
        (Writer(), 0.20), (Claims(), 0.12), (Synthesize(), 0.06), (Labels(), 0.05),
        (Sealer(False), 0.07), (Sealer(True), 0.05), (Repairer(), 0.04),
        *targets(),
    ]  # fmt: skip
