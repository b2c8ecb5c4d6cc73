"""`synthkit bench resume`: kill -9 a synthesize run at random moments, resume it, and compare it with an unbroken one.

One run is left alone. A second one of the same config is killed again and again: during start-up, at any time while it
works, while a file of a shard or state is being written, and between a state and its shard. After every kill each
committed shard is verified in depth and compared with the unbroken run; at the end all shards are.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import synthkit
from synthkit.bank import Bank
from synthkit.cli.arguments import Arguments
from synthkit.config.parse import config_to_dict, parse_command_line
from synthkit.errors import RunError, UsageError

KINDS = {"start-up": 0.2, "working": 0.4, "writing": 0.2, "between state and shard": 0.2}
"""Kinds of moments and how often each is drawn."""
DEFAULTS = (
    *("--images", "4000", "--images_per_shard", "200", "--threads", "1", "--device", "cpu"),
    *("--method.epochs", "20", "--method.ep_steps", "20", "--method.kd_steps", "5", "--method.batch_size", "64"),
    *("--method.nz", "64", "--method.width", "16", "--method.snapshots", "4"),
)
"""A run of about 20 seconds for a LeNet-5 teacher on one core; flags given by hand come after these and win."""
_POLL = 0.0005  # seconds between two looks at the folder


def main(argv: list[str]) -> int:
    """Parse, measure, print JSON; exit code 0 when every check held, else 1."""
    parser = Arguments(
        prog="synthkit bench resume",
        description="Kill a synthesize run at random moments, resume it, compare the shards with an unbroken run.",
        epilog="All other flags go to `synthkit synthesize` and win over: " + " ".join(DEFAULTS),
    )
    parser.add_argument("--teacher", required=True, help="model spec of the teacher")
    parser.add_argument("--kills", type=int, default=20, help="number of SIGKILLs")
    parser.add_argument("--kill-seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    parser.add_argument("--work", type=Path, default=None, help="folder for the banks (default: temporary, removed)")
    args, rest = parser.parse_known_args(argv)
    if args.kills < 1:
        raise UsageError("bench resume: --kills must be at least 1", got=args.kills)
    words = ["--teacher", args.teacher, *_with_defaults(rest)]
    work = args.work or Path(tempfile.mkdtemp(prefix="synthkit-kill-"))
    with _terminated():
        result = kill_and_resume(words, kills=args.kills, seed=args.kill_seed, work=work)
    if args.work is None and result["equal"] and result["all_verified"]:
        shutil.rmtree(work)
    if args.out:
        from synthkit.runtime import write_json

        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    if not (result["equal"] and result["all_verified"]):
        raise RunError("bench resume: a check failed", hint=f"the banks and logs are kept in {work}")
    return 0


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C does: the run that is being measured is not left behind."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _with_defaults(words: Sequence[str]) -> list[str]:
    """`words` after the defaults that they do not set themselves."""
    given = {word.split("=", 1)[0].replace("-", "_") for word in words if word.startswith("--")}
    kept: list[str] = []
    for flag, value in zip(DEFAULTS[::2], DEFAULTS[1::2], strict=True):
        if flag.replace("-", "_") not in given:
            kept += [flag, value]
    return [*kept, *words]


def kill_and_resume(words: Sequence[str], *, kills: int = 20, seed: int = 0, work: str | Path) -> dict[str, Any]:
    """Kill the run `synthkit synthesize WORDS...` at `kills` random moments and compare it with an unbroken run.

    Args:
        words: flags of synthesize without --out and --resume.
        kills: number of SIGKILLs.
        seed: of the moments.
        work: folder for banks and logs; must be empty or absent.

    Returns:
        Plain data: config, versions, hardware, seconds, one entry per kill (kind and second of the moment, shards
        committed, problems found), `all_verified`, `equal` (every shard sha256), `byproducts_equal` (student,
        generator snapshots), `leftovers` (temporary files at the end).

    Raises:
        UsageError: the flags are wrong or `work` is not empty. RunError: a run failed by itself.
    """
    parsed = parse_command_line("synthesize", list(words))
    if parsed.config is None or parsed.config.out is not None or parsed.config.resume:
        raise UsageError("bench resume: give the flags of a synthesize run without --out, --resume and --help")
    work = Path(work)
    if work.exists() and any(work.iterdir()):
        raise UsageError("bench resume: the work folder is not empty", got=str(work), hint="choose another --work")
    work.mkdir(parents=True, exist_ok=True)
    from synthkit.runtime import hardware, versions

    begun = time.monotonic()
    whole = _Leg(words, work / "whole", work / "whole.log")
    whole.wait_to_the_end()
    reference = _hashes(whole.bank)
    campaign = _Campaign(words, work, whole, reference, np.random.default_rng(seed))
    while len(campaign.moments) < kills:
        campaign.kill_once(kills - len(campaign.moments))
    campaign.finish()
    config = config_to_dict(parsed.config)
    return {
        "what": "SIGKILL at random moments of synthesize, each followed by --resume",
        "equal": all(found == reference for found in campaign.finished.values()) and bool(campaign.finished),
        "all_verified": all(not moment["problems"] for moment in campaign.moments) and not campaign.problems,
        "byproducts_equal": all(_byproducts(bank) == _byproducts(whole.bank) for bank in campaign.finished),
        "leftovers": sorted({name for bank in campaign.finished for name in _temporaries(bank)}),
        "kills": len(campaign.moments),
        "seed": seed,
        "kinds": {kind: sum(m["kind"] == kind for m in campaign.moments) for kind in KINDS},
        "runs": len(campaign.finished),
        "shards": len(reference),
        "uninterrupted_seconds": round(whole.seconds, 3),
        "startup_seconds": round(whole.startup, 3),
        "seconds": round(time.monotonic() - begun, 1),
        "moments": campaign.moments,
        "problems": campaign.problems,
        "shard_sha256": [reference[i] for i in sorted(reference)],
        "config": config,
        "versions": versions(),
        "hardware": hardware(),
    }


class _Leg:
    """One process of `synthkit synthesize`."""

    def __init__(self, words: Sequence[str], bank: Path, log: Path, *, resume: bool = False):
        package = Path(synthkit.__file__).resolve().parent.parent
        path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-m", "synthkit", "synthesize", *words, "--out", str(bank)]
        self.bank, self.log = bank, log
        self.begun = time.monotonic()
        self.startup = self.seconds = 0.0
        self._record = _written(bank / "run.json")
        with open(log, "ab") as stream:
            self.process = subprocess.Popen(
                [*command, "--resume"] if resume else command,
                stdout=stream,
                stderr=stream,
                env={**os.environ, "PYTHONPATH": path},
            )

    @property
    def age(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self.begun

    @property
    def over(self) -> bool:
        """Whether the process has ended by itself; raises when it failed."""
        code = self.process.poll()
        if code not in (None, 0):
            tail = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RunError(f"bench resume: a run ended with exit code {code}", got=tail, hint=f"see {self.log}")
        return code == 0

    @property
    def age_of_work(self) -> float:
        """Seconds since start-up was over (run.json is written anew then); 0 before."""
        if not self.startup and _written(self.bank / "run.json") != self._record:
            self.startup = self.age
        return self.age - self.startup if self.startup else 0.0

    def wait(self, happens: Callable[[], bool]) -> bool:
        """Wait until something happens; False when the process ended first."""
        try:
            while not self.over:
                if happens():
                    return True
                time.sleep(_POLL)
        except BaseException:  # Ctrl-C: no process is left behind
            self.process.kill()
            self.process.wait()
            raise
        return False

    def wait_to_the_end(self) -> None:
        """Wait until the run is complete."""
        self.wait(lambda: self.age_of_work < 0)
        self.seconds = self.age

    def kill(self) -> float:
        """SIGKILL; returns the second of its life at which it died."""
        at = self.age
        self.process.kill()
        self.process.wait()
        return at


@dataclass
class _Campaign:
    """Runs of one config, killed until all kills are spent; one that finishes first is followed by another."""

    words: Sequence[str]
    work: Path
    whole: _Leg
    reference: dict[int, str]
    rng: np.random.Generator
    moments: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    finished: dict[Path, dict[int, str]] = field(default_factory=dict)
    round: int = 0

    @property
    def bank(self) -> Path:
        """The bank of the present run."""
        return self.work / f"killed{self.round}"

    def start(self) -> _Leg:
        """Begin or resume the present run."""
        return _Leg(self.words, self.bank, self.work / f"killed{self.round}.log", resume=self.bank.exists())

    def kill_once(self, left: int) -> None:
        """Start the run, kill it at a random moment and verify what is there."""
        shards, before = len(self.reference), len(_committed(self.bank))
        kind = str(self.rng.choice(list(KINDS), p=list(KINDS.values())))
        # On average the shards that are left are spread over the kills that are left.
        skip = int(self.rng.uniform(0, 1 + 2 * (shards - before) / (left + 1)))
        moment = _Moment(kind, min(before + skip, shards - 1), float(self.rng.uniform()))
        leg = self.start()
        if not moment.wait(leg, self.whole, shards):
            self._close(leg.bank)
            return
        at = leg.kill()
        problems = self._check()
        after = len(_committed(self.bank))
        self.moments.append(
            {
                "kind": kind,
                "run": self.round,
                "second": round(at, 3),
                "second_of_work": round(leg.age_of_work, 3),
                "shards_before": before,
                "shards_committed": after,
                "problems": problems,
            }
        )
        text = f"kill {len(self.moments)}: {kind}, second {at:.2f}, {after} of {shards} shards, {problems or 'ok'}"
        print(text, file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Resume the last run and let it end."""
        if self.bank.exists() or not self.finished:
            self.start().wait_to_the_end()
            self._close(self.bank)

    def _close(self, bank: Path) -> None:
        self.problems += self._check()
        self.finished[bank] = _hashes(bank)
        self.round += 1

    def _check(self) -> list[str]:
        """Problems of the present bank: damage found in depth, or a shard with other bytes than the unbroken run."""
        if not (self.bank / "bank.json").exists():
            return []
        report = Bank(self.bank).verify(deep=True)
        found = [f"{part}: {text}" for part, texts in report.problems.items() for text in texts]
        other = [i for i, digest in _hashes(self.bank).items() if self.reference.get(i) != digest]
        return found + [f"shard {i}: other bytes than in the unbroken run" for i in other]


@dataclass
class _Moment:
    """When a leg is killed."""

    kind: str
    shards: int
    """Number of shards that must be committed before (except during start-up)."""
    share: float
    """Position in [0, 1] within the start-up, or within the time that one shard takes."""

    def wait(self, leg: _Leg, whole: _Leg, shards: int) -> bool:
        """Wait for it; False when the run ended first."""
        if self.kind == "start-up":
            return leg.wait(lambda: leg.age >= self.share * whole.startup)
        if not leg.wait(lambda: leg.age_of_work > 0 and len(_committed(leg.bank)) >= self.shards):
            return False
        if self.kind == "writing":
            return leg.wait(lambda: bool(_temporaries(leg.bank, ("shards", "state"))))
        if self.kind == "between state and shard":
            return leg.wait(lambda: _newest_state(leg.bank) > len(_committed(leg.bank)))
        end = leg.age + self.share * (whole.seconds - whole.startup) / shards
        return leg.wait(lambda: leg.age >= end)


def _written(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _committed(bank: Path) -> list[str]:
    return [name for name in _names(bank / "shards") if name.endswith(".json")]


def _newest_state(bank: Path) -> int:
    numbers = [int(name[:-5]) for name in _names(bank / "state") if name.endswith(".json") and name[:-5].isdigit()]
    return max(numbers, default=0)


def _temporaries(bank: Path, folders: Sequence[str] = ("", "shards", "state", "generators", "student")) -> list[str]:
    """Relative names of files that are being written (or were left by a kill)."""
    return [f"{folder}/{name}" for folder in folders for name in _names(bank / folder) if ".tmp-" in name]


def _hashes(bank: Path) -> dict[int, str]:
    return {sidecar.index: sidecar.sha256 for sidecar in Bank(bank).sidecars}


def _byproducts(bank: Path) -> dict[str, Any]:
    """sha256 of the generator snapshots and of the co-trained student."""
    import hashlib

    student = bank / "student" / "student.safetensors"
    return {
        "generators": [record.sha256 for record in Bank(bank).generators()],
        "student": hashlib.sha256(student.read_bytes()).hexdigest() if student.exists() else None,
    }
