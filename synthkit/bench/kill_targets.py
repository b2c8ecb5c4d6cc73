"""Stages of `bench kills` whose target is whole or absent: merge, export, import, dedup."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from synthkit.bank import Bank, BankWriter
from synthkit.bank.checking.verify import verify
from synthkit.bank.export import export
from synthkit.bank.imports import import_bank
from synthkit.bank.joining.dedup import only_exact, write_kept
from synthkit.bank.joining.merge import merge
from synthkit.bench.kill_probe import Shared
from synthkit.bench.kill_stage import Finding, Stage, content, tree
from synthkit.bench.known_rows import SHARDS, columns_of, make_bank, spec_of


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


def _twins(shared: Path) -> list[Path]:
    """A bank in which some images stand twice."""
    spec, chance = spec_of(17), np.random.default_rng(0)
    writer = BankWriter.create(shared / "twins", spec)
    for index in range(writer.shards):
        writer.write_shard(index, columns_of(chance.integers(0, spec.images // 2, spec.per_shard), 17))
    return [writer.path]


def _dedup(inputs: list[Path], out: Path) -> None:
    bank = Bank(inputs[0])
    write_kept(bank, only_exact(bank), out)


def _import(inputs: list[Path], out: Path) -> None:
    import_bank(inputs[0], out, "npz")


def _exporter(format: str) -> Callable[[list[Path], Path], object]:
    return lambda inputs, out: export(inputs[0], format, out)


def targets() -> list[tuple[Stage, float]]:
    """These stages, and the share of the kills that each gets."""
    banks = [("merger, joins", _join, 0.08), ("merger, packs anew", _ragged, 0.06), ("merger, unites", _hosts, 0.06)]
    formats = ("imagefolder", "parquet", "webdataset", "npz")
    return [
        *((Target(name, inputs, _merge, content, True), share) for name, inputs, share in banks),
        *((Target(f"exporter, {f}", _single, _exporter(f), lambda name: True, False), 0.04) for f in formats),
        (Target("importer, npz", _exported, _import, content, True), 0.03),
        (Target("dedup", _twins, _dedup, content, True), 0.02),
    ]
