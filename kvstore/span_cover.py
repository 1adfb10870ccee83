"""The best set of intervals that do not overlap (weighted interval scheduling)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import msgspec


class Interval(msgspec.Struct, frozen=True):
    """Tokens start..stop of a prompt that could be had in one piece, and what that is worth. `name` orders equals."""

    start: int
    stop: int
    weight: float
    name: bytes = b""


def best_cover(intervals: Sequence[Interval]) -> list[int]:
    """Positions of the intervals of largest total weight that do not overlap, from left to right.

    Among equals the choice is the same whatever the order of `intervals`: of two covers of the same weight the one of
    fewer intervals, then the one that ends earlier. Intervals without weight are never chosen. Takes n log n.
    """
    order = sorted(
        (index for index, interval in enumerate(intervals) if interval.weight > 0),
        key=lambda index: (
            intervals[index].stop,
            intervals[index].start,
            -intervals[index].weight,
            intervals[index].name,
        ),
    )
    stops = [intervals[index].stop for index in order]
    # (weight, fewer is better) of the best cover among the first so many intervals.
    best: list[tuple[float, int]] = [(0.0, 0)]
    taken: list[int] = []  # how many intervals are left to choose from, if this one is chosen; -1 if it is not
    for place, index in enumerate(order):
        before = bisect_right(stops, intervals[index].start, 0, place)
        weight, count = best[before]
        candidate = (weight + intervals[index].weight, count - 1)
        taken.append(before if candidate > best[-1] else -1)
        best.append(max(candidate, best[-1]))
    chosen: list[int] = []
    left = len(order)
    while left:
        left -= 1
        if taken[left] >= 0:
            chosen.append(order[left])
            left = taken[left]
    return chosen[::-1]
