"""What push and pull print while they run: lines on standard error, and one bar of bytes on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from synthkit.cli.bank.common import clean


@contextlib.contextmanager
def transfer(what: str) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """(said, progress) for `hub_push.push` and `hub_pull.pull`; the library's own bar per file is switched off."""
    from tqdm import tqdm

    with contextlib.suppress(ImportError):  # its absence is reported where it is needed
        from huggingface_hub.utils import disable_progress_bars  # pyright: ignore[reportMissingImports]  # optional

        disable_progress_bars()
    with tqdm(desc=what, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:

        def said(text: str) -> None:
            bar.write(clean(text), file=sys.stderr)

        def progress(count: int) -> None:
            bar.update(count)

        yield said, progress
