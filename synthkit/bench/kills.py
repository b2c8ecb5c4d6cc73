"""`synthkit bench kills`: kill -9 everything that writes, at any moment, and count what was lost or wrong.

Writer, two claiming writers, label writer, sealer, repair, merger, exporter and importer are run in forked processes on
small banks whose every byte is known. Half of the kills come at a moment of time, spread evenly over the time that the
unbroken work takes; the other half right before or after a file operation (fsync, rename, link, unlink, ...), spread
evenly over their kinds. After every kill:

- each shard that a writer was told is committed is there, with the bytes that it must have, and verifies in depth;
- the target of merge, export and import is whole or absent, and no input has changed;
- a process that reads random rows of the bank all the while has never seen a wrong one.

Then the work is done again, perhaps killed again, and ends with the same bytes as unbroken.
"""

from __future__ import annotations

import collections
import contextlib
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthkit.bench.kill_probe import Order, Victim
from synthkit.cli.arguments import Arguments
from synthkit.errors import RequirementError, RunError, UsageError

if TYPE_CHECKING:
    from synthkit.bench.kill_stage import Finding, Stage

UNBROKEN = 3  # runs that measure the duration
AGAIN = 0.4  # chance that the work is killed again when it is repeated
GOOD = ("all_verified", "all_equal_in_the_end", "nothing_lost", "nothing_wrong", "no_leftovers")


def main(argv: list[str]) -> int:
    """Parse, kill, print JSON; exit code 0 when every check held, else 1."""
    parser = Arguments(
        prog="synthkit bench kills",
        description="Kill -9 writers, sealers, mergers, exporters at any moment; count lost images and wrong bytes.",
    )
    parser.add_argument("--kills", type=int, default=200, help="number of SIGKILLs (200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    parser.add_argument("--work", type=Path, default=None, help="folder for the banks (default: temporary, removed)")
    args = parser.parse(argv)
    if args.kills < 1:
        raise UsageError("bench kills: --kills must be at least 1", got=args.kills)
    work = args.work or Path(tempfile.mkdtemp(prefix="synthkit-kills-"))
    result = kill_everything(kills=args.kills, seed=args.seed, work=work, say=_say)
    good = all(result[name] for name in GOOD)
    if args.work is None and good:
        shutil.rmtree(work)
    if args.out:
        from synthkit.runtime import write_json

        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    if not good:
        raise RunError("bench kills: a check failed", hint=f"the banks and logs are kept in {work}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def kill_everything(
    *,
    kills: int = 200,
    seed: int = 0,
    work: str | Path,
    say: Any = lambda text: None,
    table: Sequence[tuple[Stage, float]] | None = None,
) -> dict[str, Any]:
    """Kill every stage, together `kills` times (each stage at least once), and return what was found, as plain data.

    Args:
        kills: SIGKILLs, spread over the stages.
        seed: of the moments.
        work: an empty or absent folder on the file system that is to be tested.
        say: is told a line per stage.
        table: stages and their shares of the kills; none takes all (`kill_stages.stages`).

    Raises:
        RequirementError: the system has no fork. UsageError: `work` is not empty.
        RunError: some work failed by itself, without a kill.
    """
    if not hasattr(os, "fork"):
        raise RequirementError("bench kills: needs an operating system with fork", hint="run it on Linux or macOS")
    work = Path(work)
    if work.exists() and any(work.iterdir()):
        raise UsageError("bench kills: the work folder is not empty", got=str(work), hint="choose another --work")
    from synthkit.bench.kill_stages import stages, warm

    if table is None:
        warm()
        table = stages()
    begun, chance = time.monotonic(), np.random.default_rng(seed)
    counts = _shares(kills, [share for _, share in table])
    results = []
    for (stage, _), count in zip(table, counts, strict=True):
        campaign = _Campaign(stage, work / stage.name.replace(", ", "-").replace(" ", "-"), chance)
        campaign.measure()
        campaign.run(count)
        results.append(campaign.tally)
        say(f"{stage.name}: {campaign.tally.line()}")
    return {**_summary(results, seed), "seconds": round(time.monotonic() - begun, 1), "work": _file_system(work)}


def _shares(kills: int, weights: list[float]) -> list[int]:
    """`kills` spread like `weights`, at least one each."""
    exact = np.array(weights) / sum(weights) * kills
    counts = np.maximum(1, np.floor(exact).astype(int))
    for at in np.argsort(-(exact - np.floor(exact)), kind="stable"):
        if counts.sum() < kills:
            counts[at] += 1
    return counts.tolist()


def _file_system(work: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"free_bytes": shutil.disk_usage(work).free}
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        inside = [row for row in mounts if os.path.realpath(work).startswith(row[1])]
        facts["type"] = max(inside, key=lambda row: len(row[1]))[2]
    return facts


@dataclass
class _Tally:
    """What is counted in one stage."""

    stage: str
    kills: int = 0
    by_time: int = 0
    by_operation: int = 0
    survived: int = 0
    """Attempts in which the work was done before its moment came."""
    trials: int = 0
    killed_again: int = 0
    unbroken_seconds: float = 0.0
    unbroken_operations: int = 0
    operation_kinds: int = 0
    """Different file operations of the unbroken work ("fsync shard", "rename manifest", ...)."""
    tenths: dict[str, int] = field(default_factory=dict)
    """Kills by tenth of the unbroken duration at which they came."""
    phases: dict[str, int] = field(default_factory=dict)
    """Kills by the file operation that they came in or after."""
    states: dict[str, int] = field(default_factory=dict)
    """Kills by what there was afterwards, for targets that are whole or absent."""
    images_acknowledged: int = 0
    """Images that had been acknowledged when a kill came, summed over the kills."""
    images_lost: int = 0
    images_compared: int = 0
    images_wrong: int = 0
    reader_banks: int = 0
    reader_images: int = 0
    reader_wrong: int = 0
    unequal_in_the_end: int = 0
    leftovers: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        """One line for people."""
        bad = self.problems or ("ok" if not (self.images_lost or self.images_wrong or self.reader_wrong) else "WRONG")
        return (f"{self.kills} kills in {self.trials} trials, {self.unbroken_seconds * 1e3:.0f} ms unbroken, "
                f"{self.unbroken_operations} file operations, {bad}")  # fmt: skip


def _summary(tallies: list[_Tally], seed: int) -> dict[str, Any]:
    from synthkit.runtime import hardware, versions

    def total(name: str) -> int:
        return sum(getattr(tally, name) for tally in tallies)

    names = ("kills", "by_time", "by_operation", "survived", "trials", "killed_again", "images_acknowledged",
             "images_lost", "images_compared", "images_wrong", "reader_banks", "reader_images", "reader_wrong",
             "unequal_in_the_end")  # fmt: skip
    phases: collections.Counter[str] = collections.Counter()
    for tally in tallies:
        phases.update(tally.phases)
    totals = {name: total(name) for name in names}
    return {
        "what": "SIGKILL at moments spread over time and over file operations, each followed by a check of everything",
        "seed": seed,
        **totals,
        "all_verified": not any(t.problems for t in tallies),
        "all_equal_in_the_end": not totals["unequal_in_the_end"],
        "nothing_lost": not totals["images_lost"],
        "nothing_wrong": not totals["images_wrong"] and not totals["reader_wrong"],
        "no_leftovers": not any(t.leftovers for t in tallies),
        "phases": dict(phases.most_common()),
        "stages": [{**vars(t), "tenths": dict(sorted(t.tenths.items()))} for t in tallies],
        "versions": versions(),
        "hardware": hardware(),
    }


class _Campaign:
    """The kills of one stage."""

    def __init__(self, stage: Stage, work: Path, chance: np.random.Generator):
        self.stage, self.work, self.chance = stage, work, chance
        self.tally = _Tally(stage=stage.name)
        self.reference: dict[str, str] = {}
        self.operations: dict[str, list[int]] = {}
        self.seconds: list[float] = []  # of whole unbroken work; the machine may become faster or slower meanwhile
        self.number = 0

    def measure(self) -> None:
        """Do the work unbroken, to know how long it takes, how many file operations it needs and what it makes."""
        (self.work / "shared").mkdir(parents=True)
        self.stage.setup(self.work / "shared")
        trace: list[str] = []
        for _ in range(UNBROKEN):
            folder = self._fresh()
            victims = self._start(folder, self.stage.roles, None)
            self._let_end(victims)
            self.seconds.append(max(v.seconds for v in victims))
            trace = victims[0].log.read_text().splitlines()
            found, result = self.stage.check(folder), self.stage.result(folder)
            if found.problems or result != (self.reference or result):
                raise RunError(
                    f"bench kills: unbroken work of {self.stage.name} failed", got=found.problems or "other bytes"
                )
            self.reference = result
            shutil.rmtree(folder)
        self.tally.unbroken_seconds = round(statistics.median(self.seconds), 5)
        self.operations = {kind: [i for i, k in enumerate(trace, 1) if k == kind] for kind in sorted(set(trace))}
        self.tally.unbroken_operations, self.tally.operation_kinds = len(trace), len(self.operations)

    def run(self, kills: int) -> None:
        """Trials until there were `kills` kills."""
        moments = self._moments(kills)
        while self.tally.kills < kills:
            self._trial(moments, kills)

    def _moments(self, kills: int) -> Iterator[float | Order]:
        """Moments in random order: shares of the unbroken time, evenly spread, and as many orders, over all kinds of
        operations in turn. More of them if needed."""
        while True:
            half = -(-kills // 2)
            both: list[float | Order] = [float(at) for at in (np.arange(half) + self.chance.uniform(size=half)) / half]
            kinds = self.chance.permutation(sorted(self.operations))
            for number in range(half if len(kinds) else 0):
                calls = self.operations[kinds[number % len(kinds)]]
                both.append(Order(int(self.chance.choice(calls)), after=bool(self.chance.integers(2))))
            yield from (both[i] for i in self.chance.permutation(len(both)))

    def _trial(self, moments: Iterator[float | Order], kills: int) -> None:
        folder, acknowledged = self._fresh(), set()
        self.tally.trials += 1
        with self._reader(folder):
            again = False
            while self.tally.kills < kills:
                acknowledged |= self._kill(folder, next(moments), again, acknowledged)
                if self.chance.uniform() > AGAIN:
                    break
                again = True
            for role in self.stage.roles:
                self._let_end(self._start(folder, (role,), None))
        self._count(self.stage.check(folder), set(range(self.stage.pieces)), killed=False)
        if self.stage.result(folder) != self.reference:
            self.tally.unequal_in_the_end += 1
            self.tally.problems.append(f"trial {self.number}: other bytes than unbroken")
            return  # the folder stays, to be looked at
        left = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if ".tmp-" in p.name]
        self.tally.leftovers += left
        if not left and not self.tally.problems:
            shutil.rmtree(folder)

    def _kill(self, folder: Path, moment: float | Order, again: bool, before: set[int]) -> set[int]:
        """Start the work, kill one or more of its processes, check.

        Returns what must be there from now on: what they had acknowledged, and what was seen.
        """
        order = moment if isinstance(moment, Order) else None
        victims = self._start(folder, self.stage.roles, order)
        doomed = victims
        if len(victims) > 1 and order is None and self.chance.uniform() < 0.7:  # the others work on
            doomed = [victims[int(self.chance.integers(len(victims)))]]
        died, expected = [], statistics.median(self.seconds[-UNBROKEN:])
        for victim in doomed:
            at = expected * moment if not isinstance(moment, Order) else 0.0
            if victim.wait() if order else victim.kill_after(at):
                died.append(victim)
        done = before.union(*(v.shared.acknowledged for v in victims))
        found = self.stage.check(folder)  # while the others still work
        if not died:
            self.tally.survived += 1
            self.seconds += [] if again else [max(v.seconds for v in doomed)]
        else:
            tally = self.tally
            tally.kills += 1
            tally.killed_again += again
            tally.by_time += order is None
            tally.by_operation += order is not None
            tenth = f"{min(9, int(10 * died[0].seconds / expected)) * 10} %"
            tally.tenths[tenth] = tally.tenths.get(tenth, 0) + 1
            phase = died[0].shared.place[1]
            tally.phases[phase] = tally.phases.get(phase, 0) + 1
            if found.state:
                tally.states[found.state] = tally.states.get(found.state, 0) + 1
        self._count(found, done, killed=bool(died))
        self._let_end([v for v in victims if v not in doomed])
        for victim in victims:
            if victim.failure:
                self.tally.problems.append(f"trial {self.number}: {victim.failure}")
        return found.committed.union(*(v.shared.acknowledged for v in victims))

    def _count(self, found: Finding, acknowledged: set[int], *, killed: bool) -> None:
        tally, per_piece = self.tally, _images_of(self.stage)
        lost = acknowledged - found.committed if self.stage.pieces > 1 else set()
        tally.images_lost += per_piece * len(lost)
        tally.images_acknowledged += per_piece * len(acknowledged) if killed and self.stage.pieces > 1 else 0
        tally.images_compared += found.images
        tally.images_wrong += found.wrong
        tally.problems += [f"trial {self.number}: {text}" for text in found.problems]
        if lost:
            tally.problems.append(f"trial {self.number}: shards {sorted(lost)} were acknowledged and are gone")

    def _fresh(self) -> Path:
        self.number += 1
        folder = self.work / f"trial{self.number}"
        self.stage.prepare(folder)
        return folder

    def _start(self, folder: Path, roles: tuple[int, ...], order: Order | None) -> list[Victim]:
        log = f"trial{self.number}-{{}}.log"
        return [
            Victim(lambda shared, role=role: self.stage.operate(folder, role, shared), self.work / log.format(role),
                   pieces=self.stage.pieces, order=order) for role in roles
        ]  # fmt: skip

    def _let_end(self, victims: list[Victim]) -> None:
        for victim in victims:
            victim.wait()
            if victim.failure:
                raise RunError(f"bench kills: {self.stage.name} failed without a kill: {victim.failure}",
                               hint=f"see {victim.log}")  # fmt: skip

    @contextlib.contextmanager
    def _reader(self, folder: Path) -> Iterator[None]:
        """A process that reads `folder / "bank"` during the block, where the stage has one."""
        if not self.stage.watched:
            yield
            return
        from synthkit.bench.known_rows import read_for_ever

        counts = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64, 4)
        log = self.work / f"reader{self.number}.log"
        reader = Victim(lambda _: read_for_ever(folder / "bank", counts, log), self.work / "reader.log")
        try:
            yield
        finally:
            counts[3] = 1
            reader.wait()
            self.tally.reader_banks += int(counts[0])
            self.tally.reader_images += int(counts[1])
            self.tally.reader_wrong += int(counts[2])
            said = log.read_text().splitlines() if log.exists() else []
            self.tally.problems += [
                f"reader: {text}" for text in [*said, *([reader.failure] if reader.failure else [])]
            ]


def _images_of(stage: Stage) -> int:
    from synthkit.bench.known_rows import PER_SHARD

    return PER_SHARD if stage.pieces > 1 else 0
