"""The one wrapper of accelerate: device, precision, ranks, progress, run directories.

Every loop of the house runs under a `Runtime`; nothing else imports accelerate.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit.bank.disk.storage import clean_stale_temps, host
from synthkit.config.schema import RuntimeConfig
from synthkit.errors import ConfigError, RunError, StorageError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


class Runtime:
    """Device, precision and ranks of a run, built on accelerate's `Accelerator`.

    CPU, one GPU, many GPUs and many nodes are the same code; start several processes with `torchrun`.
    """

    def __init__(self, accelerator: Accelerator, config: RuntimeConfig):
        self.accelerator = accelerator
        self.config = config
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process

    @classmethod
    def create(cls, config: RuntimeConfig | None = None, *, run_dir: Path | None = None) -> Runtime:
        """Set up device, threads and precision.

        Raises:
            ConfigError: the device does not exist, or precision is not available on it; a tracker is not known, or
                not installed.
            RunError: the number of processes differs from `config.world`.
        """
        import torch
        from accelerate import Accelerator

        config = config or RuntimeConfig()
        device = resolve_device(config.device)
        if config.threads is not None:
            if config.threads < 1:
                raise ConfigError("runtime.threads must be at least 1", got=config.threads)
            torch.set_num_threads(config.threads)
        bf16_ok = device == "cuda" and torch.cuda.is_bf16_supported()
        precision = config.precision if config.precision != "auto" else ("bf16" if bf16_ok else "fp32")
        trackers: list[Any] = _trackers(config.tracker)
        _forget_other_state(device == "cpu", "bf16" if precision == "bf16" else "no")
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision="bf16" if precision == "bf16" else "no",
            log_with=trackers or None,
            project_dir=str(run_dir) if run_dir else None,
        )
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
        if accelerator.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        if config.world is not None and accelerator.num_processes != config.world:
            raise RunError(
                f"{config.world} processes were asked for (--world)",
                got=accelerator.num_processes,
                hint=f"start with `torchrun --nproc_per_node {config.world} -m synthkit ...`; "
                "`accelerate launch --cpu` starts one",
            )
        if trackers:
            accelerator.init_trackers("synthkit")
        return cls(accelerator, config)

    def close_trackers(self) -> None:
        """Let the trackers write what they hold back. Nothing is logged after it."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed-precision context of this run (a no-op in fp32)."""
        return self.accelerator.autocast()

    def seed_modules(self, seed: int) -> None:
        """Seed torch's global generators of the CPU and of this run's device, which dropout and the like draw from.

        torch.manual_seed would reach every kind of accelerator that torch was built for (1 to 2 ms per call on a CPU).
        """
        import torch

        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    @contextlib.contextmanager
    def module_draws(self, seed: int) -> Iterator[None]:
        """Lend the modules the global generators, seeded, and put them back as they were."""
        import torch

        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self.seed_modules(seed)
            yield

    @property
    def channels_last(self) -> bool:
        """Whether convolutions run channels-last here (measured faster on CPU and CUDA, 1.1 to 2 x forward on CPU)."""
        return self.device.type != "mps"

    def lays_channels_last(self, shape: tuple[int, int, int]) -> bool:
        """Whether that pays for images of (C, H, W): not for grey ones on a CPU (a LeNet step is 12 % slower)."""
        return self.channels_last and (shape[0] > 1 or self.device.type != "cpu")

    def describe(self) -> str:
        """One line for the start of a run: device, precision, threads, world size."""
        import torch

        precision = self.accelerator.mixed_precision
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor() or "cpu"
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        kind = "fp32" if precision == "no" else precision
        return f"{self.device.type} ({name}), {kind}{threads}, {self.world} process(es)"

    def say(self, text: str) -> None:
        """Tell the user, once: the first rank, on standard error."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def progress(self, total: int, description: str, *, initial: int = 0) -> Progress:
        """A progress line with rate, ETA and figures; quiet on ranks other than the first."""
        return Progress(total, description, initial=initial, enabled=self.is_main)


def _trackers(asked: str | None) -> list[str]:
    """The names in `--tracker`; accelerate leaves out what is not installed without a word."""
    names = [name.strip() for name in (asked or "").split(",") if name.strip()]
    if not names:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    known = sorted({"all", *LOGGER_TYPE_TO_CLASS})
    registered = set(LOGGER_TYPE_TO_CLASS) - {str(kind) for kind in LoggerType}  # by code of the user
    here = {"all", *registered, *(str(kind) for kind in get_available_trackers())}
    for name in names:
        if name not in known:
            raise ConfigError("tracker: not one of accelerate's", got=name, allowed=known)
        if name not in here:
            raise ConfigError(f"tracker: {name} is not installed", hint=f"pip install {name}, or leave --tracker out")
    return names


def _forget_other_state(cpu: bool, precision: str) -> None:
    """Let a later run of this process choose anew: accelerate keeps one state and refuses another precision or device
    (or silently stays on the CPU)."""
    from accelerate.state import AcceleratorState

    known = AcceleratorState._shared_state
    if not known:
        return
    other_device = (known["device"].type == "cpu") != cpu
    if other_device or known.get("_mixed_precision") != precision:
        AcceleratorState._reset_state(reset_partial_state=other_device)


def resolve_device(name: str) -> str:
    """The torch device that `name` means: auto takes a GPU where there is one. Raises `ConfigError`."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.split(":")[0]
    if kind not in {"cpu", "cuda", "mps"}:
        raise ConfigError("runtime.device: no such device", got=name, allowed=["auto", "cpu", "cuda", "cuda:N", "mps"])
    if kind == "cuda" and not torch.cuda.is_available():
        hint = "use cpu, or install a CUDA build of torch"
        raise ConfigError("runtime.device: torch sees no CUDA device", got=name, hint=hint)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("runtime.device: torch sees no MPS device", got=name, hint="use cpu")
    return name


class Progress:
    """One bar with rate and ETA on a terminal; a plain log line every 15 seconds elsewhere."""

    def __init__(self, total: int, description: str, *, initial: int = 0, enabled: bool = True):
        self.total, self.description, self.done = total, description, initial
        self._initial, self._start, self._last = initial, time.monotonic(), time.monotonic()
        self._enabled = enabled
        self._figures: dict[str, float] = {}
        self._shown = -1  # the last state that a line told
        self._bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, desc=description, dynamic_ncols=True, smoothing=0.1)

    def update(self, n: int = 1, **figures: float) -> None:
        """Advance by `n`; `figures` are shown beside the bar."""
        self.done += n
        self._figures.update(figures)
        if not self._enabled:
            return
        if self._bar is not None:
            if figures:
                self._bar.set_postfix({k: f"{v:.4g}" for k, v in figures.items()}, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._last > 15:
            self._last = time.monotonic()
            self._line()

    def _line(self) -> None:
        self._shown = self.done
        elapsed = time.monotonic() - self._start
        rate = (self.done - self._initial) / max(elapsed, 1e-9)
        eta = (self.total - self.done) / rate if rate > 0 else float("nan")
        figures = " ".join(f"{k}={v:.4g}" for k, v in self._figures.items())
        print(
            f"{self.description}: {self.done}/{self.total} ({100 * self.done / max(self.total, 1):.0f} %) "
            f"{rate:.2f}/s ETA {format_seconds(eta)} {figures}".rstrip(),
            file=sys.stderr,
            flush=True,
        )

    def write(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Finish the line."""
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and self._shown != self.done:
            self._line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RunDir:
    """A run directory: `run.json` (config, versions, hardware, timings) and `metrics.jsonl`, written atomically."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def create(self) -> RunDir:
        """Make the directory (parents too), without the temporaries of killed runs."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            clean_stale_temps(self.path)
        return self

    def write_json(self, name: str, value: object) -> None:
        """Write `value` as JSON under `name`, whole or not at all."""
        write_json(self.path / name, value)

    def read_json(self, name: str) -> Any:
        """The JSON under `name`, or None where there is none."""
        file = self.path / name
        return json.loads(file.read_text()) if file.is_file() else None

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to `metrics.jsonl`."""
        with storage_errors(self.path), open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=_plain) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All records logged so far; a torn last line (killed run) is dropped."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        records = []
        for line in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def truncate_metrics(self, keep: Any) -> None:
        """Keep only the records for which `keep(record)` holds (after a resume from an earlier state)."""
        records = [r for r in self.metrics() if keep(r)]
        atomic_write(self.path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records).encode())


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or missing permission into a `StorageError` that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(f"no space left for {path}", hint="free space, then go on with --resume") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StorageError(f"cannot write {path}", got=error.strerror, hint="choose another --out") from error
        raise


def atomic_write(path: Path, data: bytes) -> None:
    """Write bytes so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.tmp-{host()}-{os.getpid()}")
    with storage_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: object) -> None:
    """Write JSON atomically (parents are made)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(value, indent=1, default=_plain) + "\n").encode())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("synthkit", "torch", "torchvision", "accelerate", "kornia", "h5py", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def hardware() -> dict[str, Any]:
    """What this machine is: processor, cores, memory, accelerator."""
    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    facts: dict[str, Any] = {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["gpu_memory"] = torch.cuda.get_device_properties(0).total_memory
    return facts


def peak_memory() -> int:
    """Peak memory of this process in bytes (on the GPU where there is one, else resident)."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def format_seconds(seconds: float) -> str:
    """Seconds as `1h02m`, `3m20s` or `12s`."""
    if seconds != seconds or seconds == float("inf"):
        return "?"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def format_bytes(n: float) -> str:
    """Bytes as `1.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"
