"""`bank verify --untrusted`: all that parses a stranger's bytes runs in a child process that can do almost nothing.

Order. The child imports its libraries, gives up its rights (`confine`), and only then opens bank.json. Then, part by
part: record, size, sha256 against the record and the manifest, and last the parser (HDF5, safetensors). It reports
every part in one line of JSON over a pipe. The parent never parses a byte of the bank: it reads lines, capped in length
and number and checked for their form, and stops a child that is silent for too long. When a child dies, the part that
it had announced is damaged ("the file crashed the parser"), and a new child goes on with the next one.

The child has an empty environment but for a few fixed settings, no file descriptor of the parent but its ends of two
pipes, `/` as working folder, and a module path of absolute folders: it starts with `python -I`, so neither the current
folder nor the environment can put code in its way. What is in force on this machine stands in `VerifyReport.guards`.

What this does not do: a file that takes the child over (a memory error in a parser) cannot write, reach the network or
read other files (where the guards say so), but it can make the child report that the bank is whole.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthkit.bank.checking.confine import Limits, confine
from synthkit.bank.checking.verify import Context, Findings, VerifyReport, examine, finished
from synthkit.bank.disk.storage import parse_json, require_bank
from synthkit.bank.errors import BankNotFoundError
from synthkit.bank.spec import MAX_SHARDS
from synthkit.errors import BankError, UsageError

# What the child runs, "module:function" of (request, reporter); the tests put parsers that crash in its place.
WORK = "synthkit.bank.checking.sandbox:examine_bank"
MAX_LINE = 16 << 20
MAX_TEXT = 2000
MAX_CRASHES = 8
_BOOT = (
    "import json, sys; request = json.loads(sys.stdin.buffer.read()); sys.path[:] = request['sys_path'];"
    "from synthkit.bank.checking.sandbox import child; child(request)"
)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one child may use. `budget_of` makes one from the size of a bank."""

    limits: Limits
    silence: float
    """Seconds that a part may take."""
    crashes: int = MAX_CRASHES
    """Children that may die before the rest of the bank is left unchecked."""


def budget_of(path: Path) -> Budget:
    """Generous for an honest bank of the size of the one at `path`: 5 MB/s, and memory for its largest file.

    Counted by the bytes that the disk really holds, so that a sparse file of a terabyte buys no time. At most an hour
    per part and 6 GiB.
    """
    total = largest = 0
    for size in _disk_bytes(path):
        total, largest = total + size, max(largest, size)
    limits = Limits(memory=min(6 << 30, (1536 << 20) + 6 * largest), cpu_seconds=60 + total // 5_000_000)
    return Budget(limits=limits, silence=min(3600.0, 60 + largest / 5_000_000))


def _disk_bytes(path: Path, depth: int = 4) -> Iterator[int]:
    try:
        with os.scandir(path) as found:
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    if depth:
                        yield from _disk_bytes(Path(entry.path), depth - 1)
                elif entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    yield min(status.st_size, status.st_blocks * 512)
    except (OSError, ValueError):  # a folder that cannot be listed adds nothing; the child says what is wrong with it
        return


def verify_untrusted(path: str | Path, deep: bool = False, budget: Budget | None = None) -> VerifyReport:
    """`verify` of a bank from a stranger, in a child process with limits (see the module).

    Raises:
        BankNotFoundError: there is no bank. BankError: bank.json is unreadable, or crashes the parser.
        UsageError: this system has no such limits (Windows).
    """
    if os.name != "posix":
        raise UsageError("verify --untrusted: needs Linux or macOS", got=os.name, hint="use a container, or WSL")
    path = Path(path)
    require_bank(path)
    budget = budget or budget_of(path)
    report = VerifyReport(path=path, deep=deep)
    run = _Run(path=path, deep=deep, budget=budget, report=report)
    crashes = 0
    while not run.child():
        crashes += 1
        if crashes >= budget.crashes:
            report.problem("sandbox", f"{crashes} parts crashed the parser; the parts after them were not checked")
            break
    return finished(report)


@dataclass
class _Run:
    """The parent's side: starts children until one comes to the end."""

    path: Path
    deep: bool
    budget: Budget
    report: VerifyReport
    checked: list[str] = field(default_factory=list)
    part: str | None = None
    done: bool = False
    messages: int = 0

    def child(self) -> bool:
        """Run one child; True when it came to the end, False when it died in a part (which is recorded)."""
        self.part = None
        read_end, write_end = os.pipe()
        try:
            process = self._start(write_end)
        finally:
            os.close(write_end)
        try:
            why = self._follow(read_end)
        finally:
            os.close(read_end)
            process.kill()
            process.wait()
        if self.done:
            return True
        why = why or _cause(process.returncode, self.budget)
        if self.part is None:
            raise BankError(f"{self.path}: reading its records crashed the parser ({why})", hint="do not use this bank")
        self.report.problem(self.part, f"the file crashed the parser ({why}); do not open it with other programs")
        self.checked.append(self.part)
        return False

    def _start(self, write_end: int) -> subprocess.Popen[bytes]:
        here, bank = Path(__file__).resolve().parents[2], Path(os.path.realpath(self.path))
        trusted = [p for p in sys.path if os.path.isabs(p) and bank not in (q := Path(os.path.realpath(p)), *q.parents)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _BOOT],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(write_end,),
            close_fds=True, cwd="/", env=_environment(), start_new_session=True,
        )  # fmt: skip
        request = {
            "path": os.path.abspath(self.path), "deep": self.deep, "skip": self.checked, "fd": write_end, "work": WORK,
            "limits": vars(self.budget.limits), "sys_path": [str(here), *trusted],
        }  # fmt: skip
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode())
            process.stdin.close()
        except BrokenPipeError:  # it died before it read; the caller sees that it said nothing
            pass
        return process

    def _follow(self, read_end: int) -> str | None:
        """Take in what the child says until it ends; the reason for stopping it, if it had to be stopped."""
        buffer, deadline = b"", time.monotonic() + self.budget.silence
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([read_end], [], [], left)[0]:
                return f"no progress for {self.budget.silence:g} s"
            data = os.read(read_end, 1 << 16)
            if not data:
                return None
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                try:
                    message = parse_json(line, "its report")
                except BankError as error:
                    return str(error)
                try:
                    self._take(message)
                except _Garbage as error:
                    return str(error)
                deadline = time.monotonic() + self.budget.silence
            if len(buffer) > MAX_LINE:
                return "its report is too long"

    def _take(self, message: dict[str, Any]) -> None:
        """One message of the child, which may be in a stranger's hand."""
        self.messages += 1
        if self.messages > 4 * MAX_SHARDS:
            raise _Garbage("its report holds too many messages")
        kind = message.get("say")
        if kind == "guards":
            self.report.guards = _texts(message.get("guards"))
        elif kind == "opened":
            self._opened(message)
        elif kind == "begin":
            self.part = _text(message.get("part"))
        elif kind == "end":
            if self.part is None or message.get("part") != self.part:
                raise _Garbage("its report holds the end of a part that was not begun")
            self.report.take(_findings(message))
            self.checked.append(self.part)
            self.part = None
        elif kind == "done":
            self.done = True
        elif kind == "refused":
            error = BankNotFoundError if message.get("missing") is True else BankError
            raise error(_text(message.get("what")))
        elif kind == "failed":
            raise _Garbage(_text(message.get("what")))
        else:
            raise _Garbage("its report holds an unknown message")

    def _opened(self, message: dict[str, Any]) -> None:
        planned, spans = _count(message.get("planned"), MAX_SHARDS), message.get("committed")
        if not isinstance(spans, list):
            raise _Garbage("its report holds impossible ranges of shards")
        committed: list[int] = []
        for span in spans:
            low, high = (_count(v, planned) for v in (span if isinstance(span, list) and len(span) == 2 else (-1, -1)))
            if low >= high or (committed and committed[-1] >= low):
                raise _Garbage("its report holds impossible ranges of shards")
            committed.extend(range(low, high))
        self.report.planned, self.report.committed = planned, committed


class _Garbage(Exception):
    """The child failed, or sent a message that an honest one cannot send."""


def _count(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise _Garbage("its report holds an impossible number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 10 * MAX_TEXT:
        raise _Garbage("its report lacks a text")
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or len(value) > 1000:
        raise _Garbage("its report lacks a list of texts")
    return [_text(v) for v in value]


def _findings(message: dict[str, Any]) -> Findings:
    problems = message.get("problems")
    if not isinstance(problems, dict) or len(problems) > 10_000:
        raise _Garbage("its report holds impossible findings")
    named = {_text(part): _texts(what) or ["damaged"] for part, what in problems.items()}
    return Findings(named, _texts(message.get("notes")), _count(message.get("bytes_read"), 1 << 60))


def _environment() -> dict[str, str]:
    """The child's whole environment: no tokens, no proxies, no PYTHON*, no plugin paths; one thread."""
    fixed = {
        "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1", "HDF5_USE_FILE_LOCKING": "FALSE", "HDF5_PLUGIN_PATH": "/nonexistent",
    }  # fmt: skip
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    return {**fixed, **kept}


def _cause(code: int, budget: Budget) -> str:
    if code == -signal.SIGXCPU:
        return f"more than {budget.limits.cpu_seconds} s of processor time"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"{name}{', perhaps out of memory' if code == -signal.SIGKILL else ''}"
    return f"it ended with exit code {code} in the middle of it"


class Reporter:
    """The child's side of the pipe; also the `Watch` of its examination."""

    def __init__(self, fd: int, skip: list[str]):
        self._stream = os.fdopen(fd, "wb", buffering=0)
        self._skip = set(skip)

    def say(self, kind: str, **facts: Any) -> None:
        """One line."""
        self._stream.write(json.dumps({"say": kind, **facts}).encode() + b"\n")

    def opened(self, context: Context) -> None:
        """bank.json was read."""
        self.say("opened", planned=context.spec.shards, committed=_spans(context.committed))

    def begin(self, part: str) -> bool:
        """A part comes next; False when an earlier child has dealt with it."""
        if part in self._skip:
            return False
        self.say("begin", part=part)
        return True

    def end(self, part: str, findings: Findings) -> None:
        """The part was checked."""
        problems = {_cut(k): [_cut(w) for w in what[:20]] for k, what in list(findings.problems.items())[:1000]}
        self.say("end", part=part, problems=problems, notes=[_cut(n) for n in findings.notes],
                 bytes_read=findings.bytes_read)  # fmt: skip


def _cut(text: str) -> str:
    """`text` short enough for a message, and with nothing that cannot be written as UTF-8."""
    return text[:MAX_TEXT].encode("utf-8", "backslashreplace").decode()


def _spans(numbers: list[int]) -> list[list[int]]:
    """Ascending numbers as half-open ranges."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1]:
            spans[-1][1] = number + 1
        else:
            spans.append([number, number + 1])
    return spans


def child(request: dict[str, Any]) -> None:
    """The child's main function. Ends the process."""
    reporter = Reporter(request["fd"], request["skip"])
    module, _, function = request["work"].partition(":")
    work = getattr(importlib.import_module(module), function)
    for name in ("h5py", "numpy", "safetensors.numpy"):  # what the parts import late; afterwards there may be no way
        importlib.import_module(name)
    readable = [request["path"], *request["sys_path"], sys.prefix, sys.base_prefix]
    reporter.say("guards", guards=confine(Limits(**request["limits"]), readable))
    try:
        work(request, reporter)
    except BankError as error:
        reporter.say("refused", what=_cut(str(error)), missing=isinstance(error, BankNotFoundError))
    # Not hidden: the parent reports it as a crash of the part in hand.
    except Exception as error:  # noqa: BLE001
        reporter.say("failed", what=_cut(f"{type(error).__name__}: {error}"))
    else:
        reporter.say("done")
    os._exit(0)  # no exit handlers: whatever a parser left behind is not touched again


def examine_bank(request: dict[str, Any], reporter: Reporter) -> None:
    """What the child does: the whole examination."""
    examine(Path(request["path"]), request["deep"], reporter)
