"""Numbers from files: checked, gathered over seeds, and written for people."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

LARGEST, SMALLEST = 1e30, 1e-30  # beyond them a figure from a file is nonsense, and axes would overflow


def number(value: object) -> float | None:
    """`value` where it is a finite number of a sane size (below 1e-30 it is 0), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    if not math.isfinite(found) or abs(found) > LARGEST:
        return None
    return found if abs(found) > SMALLEST else 0.0


@dataclass(frozen=True)
class Figure:
    """A measured value: the mean over `n` runs and, from two runs on, their sample standard deviation."""

    mean: float
    std: float | None = None
    n: int = 1

    @classmethod
    def of(cls, value: Any) -> Figure | None:
        """The figure in a number, or in `{"mean", "std", "n"}` as a summary stores it; else None."""
        if isinstance(value, dict):
            mean, std, n = number(value.get("mean")), number(value.get("std")), number(value.get("n"))
            if mean is None:
                return None
            count = int(n) if n is not None and n >= 1 else 1
            return cls(mean, std if count > 1 else None, count)
        mean = number(value)
        return None if mean is None else cls(mean)

    @classmethod
    def over(cls, values: Iterable[object]) -> Figure | None:
        """Mean and standard deviation of the numbers among `values`."""
        found = [v for v in map(number, values) if v is not None]
        if not found:
            return None
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))

    def percent(self) -> str:
        """`72.05 %`, over several seeds `72.05 ± 0.31 %`."""
        spread = f" ± {100 * self.std:.2f}" if self.std is not None else ""
        return f"{100 * self.mean:.2f}{spread} %"

    def plain(self) -> str:
        """`0.5617`, over several seeds `0.5617 ± 0.0206`."""
        if self.std is None or not self.std > 0:
            return short(self.mean)
        digits = min(6, max(0, 1 - math.floor(math.log10(self.std))))  # two significant digits of the spread
        return f"{self.mean:.{digits}f} ± {self.std:.{digits}f}"

    def without_spread(self) -> Figure:
        """The mean alone: for what does not change from seed to seed, such as the teacher."""
        return Figure(self.mean)


def short(value: float) -> str:
    """A number in at most four significant digits."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    if 1e4 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
