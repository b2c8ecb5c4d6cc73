"""Which rows of which shards make which shard, when banks are put behind one another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of shard `at` of parent `parent`."""

    parent: int
    at: int
    start: int
    stop: int


def best_plan(sizes: list[list[int]], candidates: list[int]) -> tuple[list[list[Piece]], int]:
    """The plan with the largest of the parents' shard sizes; a smaller one only where it leaves more images where they
    are, and at least half of all."""
    largest = max(candidates)
    best, per_shard = plan_join(sizes, largest), largest
    most = max(_kept(best, sizes), sum(map(sum, sizes)) // 2)
    for smaller in sorted(set(candidates) - {largest}, reverse=True):
        plan = plan_join(sizes, smaller)
        if _kept(plan, sizes) > most:
            best, per_shard, most = plan, smaller, _kept(plan, sizes)
    return best, per_shard


def _kept(plan: list[list[Piece]], sizes: list[list[int]]) -> int:
    return sum(pieces[0].stop for pieces in plan if exact(pieces, sizes))


def plan_join(sizes: list[list[int]], per_shard: int) -> list[list[Piece]]:
    """For each shard of the result, the pieces it is made of, in order.

    Args:
        sizes: images in each shard of each parent.
        per_shard: images in every shard of the result but the last.
    """
    plan: list[list[Piece]] = [[]]
    room = per_shard
    for parent, shards in enumerate(sizes):
        for at, size in enumerate(shards):
            start = 0
            while start < size:
                if not room:
                    plan.append([])
                    room = per_shard
                stop = min(size, start + room)
                plan[-1].append(Piece(parent, at, start, stop))
                room -= stop - start
                start = stop
    return plan


def exact(pieces: list[Piece], sizes: list[list[int]]) -> bool:
    """Whether a shard of the result is one whole shard of a parent."""
    only = pieces[0]
    return len(pieces) == 1 and only.stop - only.start == sizes[only.parent][only.at]
