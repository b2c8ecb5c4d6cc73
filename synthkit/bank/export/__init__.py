"""A bank as something else: ImageFolder, parquet, WebDataset, MDS, npz, .pt files, safetensors.

>>> from synthkit.bank.export import export
>>> export("banks/c10", "parquet", "c10-parquet")  # doctest: +SKIP

One file per format; another package adds formats through the entry-point group `synthkit.formats` (`name =
"module:Class"`, a subclass of `synthkit.bank.export.base.Format`).
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit.config.fields import Option, options_of
from synthkit.errors import ConfigError, StorageError, UsageError
from synthkit.tables import FORMATS, formats

if TYPE_CHECKING:
    from synthkit.bank.export.base import Format
    from synthkit.bank.export.source import Source
    from synthkit.bank.reader import Bank

__all__ = ["FORMATS", "Plan", "export", "format_class", "formats", "plan"]

MAX_WORKERS = 64


def format_class(name: str) -> type[Format]:
    """The class behind `name`. Raises `ConfigError` with the nearest name."""
    table = formats()
    if name not in table:
        raise ConfigError("export: not a known format", got=name, allowed=table, hint="synthkit list formats")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an export will do, before anything is written."""

    source: Source
    made: Format
    name: str
    """Of the format."""
    target: Path
    bytes: int
    """Estimate of what is written, rather too much than too little."""
    free: int
    """Bytes that are free there."""

    @property
    def steps(self) -> int:
        """What all calls of `advance` sum to: rows, times the arrays that are written one after the other."""
        return self.source.count * self.made.passes()

    @property
    def title(self) -> str:
        """Name of the progress line."""
        passes = self.made.passes()
        return f"export {self.name}" + (f", rows of {passes} arrays" if passes > 1 else "")

    def run(self, advance: Callable[[int], None] | None = None) -> Path:
        """Make the export. `advance` is told the steps done since its last call.

        Raises:
            OutputExistsError: the target exists. StorageError: no room, or writing failed; nothing is left then.
            BankError: a shard is damaged; nothing is left then.
        """
        from synthkit.bank.disk.storage import staged
        from synthkit.bank.export import provenance

        _require_room(self)
        source, made = self.source, self.made
        facts = provenance.provenance(source, self.name, made)
        with staged(self.target) as folder:
            files = made.write(folder, advance or (lambda _: None))
            (folder / "README.md").write_bytes(provenance.readme(source, made, facts))
            (folder / "synthkit.json").write_bytes(provenance.record_bytes(facts, files))
        return self.target


def plan(
    bank: Bank | str | Path, format: str, out: str | Path, *, labels_from: str | None = None, unfinished: bool = False,
    verify: bool = True, workers: int | None = None, **options: Any,
) -> Plan:  # fmt: skip
    """Check everything that can be checked beforehand, and estimate the size; arguments as `export`."""
    from synthkit.bank.disk.storage import require_free
    from synthkit.bank.export.source import Source
    from synthkit.bank.reader import Bank

    chosen, target = format_class(format), Path(out)
    settings = _settings(format, chosen, options)
    bank = bank if isinstance(bank, Bank) else Bank(bank)
    _require_outside(bank.path, target)
    require_free(target)
    source = Source(bank, labels_from=labels_from, unfinished=unfinished, verify=verify)
    made = chosen(source, settings, _workers(workers))
    if not source.complete:
        made.notes.append(f"unfinished bank: {source.count:,} of {source.spec.images:,} images, numbered without gaps")
    made.check()
    left = [c for c in source.columns if c not in made.columns]
    if left:
        made.notes.append(f"this export does not hold the bank's {', '.join(left)}")
    return Plan(source=source, made=made, name=format, target=target, bytes=made.estimate(), free=_free(target))


def export(
    bank: Bank | str | Path, format: str, out: str | Path, *, labels_from: str | None = None, unfinished: bool = False,
    verify: bool = True, workers: int | None = None, progress: bool = False, **options: Any,
) -> Path:  # fmt: skip
    """Write `bank` in another format into the new folder `out`; it is there whole or not at all, also after a kill.

    Beside the files of the format the folder holds synthkit.json (provenance, see provenance.py) and README.md. The
    same bank and options give the same bytes.

    Args:
        bank: the bank, or its path.
        format: imagefolder, parquet, webdataset, mds, npz, pt, safetensors, or one of a plug-in.
        labels_from: label set that takes the place of the bank's labels and logits.
        unfinished: export what is committed of a bank that is not complete.
        verify: check the sha256 of every shard on the way.
        workers: threads that encode PNG; none takes the CPUs of this process.
        progress: show a progress line on standard error.
        **options: of the format, see its `Options`.

    Returns:
        `out`.

    Raises:
        ConfigError, UsageError: format, option or bank do not go together; nothing was written.
        OutputExistsError: `out` exists and is not an empty folder.
        BankError: the bank is unfinished or damaged. StorageError: no room, or writing failed. Nothing is left then.
    """
    planned = plan(bank, format, out, labels_from=labels_from, unfinished=unfinished, verify=verify, workers=workers,
                   **options)  # fmt: skip
    if not progress:
        return planned.run()
    from synthkit.runtime import Progress

    with Progress(planned.steps, planned.title) as line:
        return planned.run(line.update)


def _settings(name: str, chosen: type[Format], options: dict[str, Any]) -> Any:
    known = options_of(chosen.Options)
    for option, value in options.items():
        if option not in known:
            what = f"export: {name} has no option {option!r}"
            raise UsageError(what, allowed=known, hint=f"synthkit export --format {name} --help")
        if not _fits(value, known[option]):
            raise UsageError(f"export: {option} of {name} must be {known[option].expected}", got=value)
    return chosen.Options(**options)


def _fits(value: object, option: Option) -> bool:
    """Whether `value` has the annotated type of the option; types beyond the simple ones are the format's to check."""
    if value is None:
        return option.optional
    if option.boolean or isinstance(value, bool):
        return option.boolean and isinstance(value, bool)
    if option.choices:
        return value in option.choices
    kinds = {"a whole number": int, "a number": (int, float), "text": str}
    return isinstance(value, kinds.get(option.expected.removesuffix(" or none"), object))


def _workers(workers: int | None) -> int:
    if workers is None:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(count, MAX_WORKERS)
    if isinstance(workers, bool) or not isinstance(workers, int) or not 1 <= workers <= MAX_WORKERS:
        raise UsageError(f"export: workers must be 1 to {MAX_WORKERS}", got=workers)
    return workers


def _require_outside(bank: Path, target: Path) -> None:
    inside = os.path.realpath(target)
    root = os.path.realpath(bank)
    if inside == root or inside.startswith(root + os.sep):
        raise UsageError("export: --out lies inside the bank", got=str(target), hint="choose a folder outside it")


def _standing(target: Path) -> Path:
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _free(target: Path) -> int:
    try:
        return shutil.disk_usage(_standing(target)).free
    except OSError as error:
        raise StorageError(f"{target}: cannot be reached: {error.strerror}") from error


def _require_room(planned: Plan) -> None:
    needed, target = planned.bytes, planned.target
    if needed > planned.free:
        raise StorageError(f"{target}: the export needs about {needed / 1e6:,.1f} MB, {planned.free / 1e6:,.1f} MB are "
                           "free there", hint="choose another --out or format")  # fmt: skip
    if hasattr(os, "statvfs"):
        status = os.statvfs(_standing(target))
        if status.f_files and planned.made.file_count > status.f_favail:  # 0: the file system does not count
            what = f"{target}: the export makes {planned.made.file_count:,} files, {status.f_favail:,} are left there"
            raise StorageError(what, hint="choose a format with fewer files (webdataset, parquet, npz)")
