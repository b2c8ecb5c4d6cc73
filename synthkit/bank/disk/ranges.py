"""Sets of shard numbers as few ranges: short to store, quick to compare, readable in a message."""

from __future__ import annotations

from collections.abc import Sequence

from synthkit.errors import UsageError


def as_ranges(shards: Sequence[int]) -> tuple[range, ...]:
    """`shards` as few ranges. Raises `UsageError` for negative numbers."""
    if isinstance(shards, range):
        return (shards,) if len(shards) else ()
    numbers = sorted(set(shards))
    if numbers and numbers[0] < 0:
        raise UsageError("claim: shards are numbered from 0", got=numbers[0])
    steps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    if len(numbers) > 1 and len(steps) == 1:
        return (range(numbers[0], numbers[-1] + 1, steps.pop()),)
    rows: list[range] = []
    for number in numbers:
        if rows and rows[-1].stop == number:
            rows[-1] = range(rows[-1].start, number + 1)
        else:
            rows.append(range(number, number + 1))
    return tuple(rows)


def describe(parts: tuple[range, ...]) -> str:
    """ "shards 2, 10, ... (3/8)" or "shards 0-4, 7"."""
    if len(parts) == 1 and parts[0].step > 1 and len(parts[0]) > 1:
        first, step = parts[0].start, parts[0].step
        end = f" (that is {first + 1}/{step})" if first < step else ""
        return f"shards {first}, {first + step}, ... {parts[0][-1]}{end}"
    words = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in parts[:8]]
    return f"shards {', '.join(words) or '(none)'}" + (", ..." if len(parts) > 8 else "")


def overlap(a: tuple[range, ...] | None, b: tuple[range, ...] | None) -> bool:
    """Whether two claims share a shard; None is the whole bank, which meets everything."""
    if a is None or b is None:
        return True
    return any(_meet(x, y) for x in a for y in b)


def _meet(a: range, b: range) -> bool:
    small, large = (a, b) if len(a) <= len(b) else (b, a)
    return any(i in large for i in small)
