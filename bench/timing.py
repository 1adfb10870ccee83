"""Timing that survives a noisy machine: two things in turn in one run, medians and ratios pair by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cpu_seconds(run: Callable[[], object]) -> float:
    """Seconds of processor time that the calling thread spent in one call, whatever else the machine does."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def paired(first: Callable[[], object], second: Callable[[], object], *, rounds: int) -> tuple[float, float, float]:
    """(median seconds of `first`, of `second`, median of second/first pair by pair), in turn after one warm-up of each.

    The last is the speed of `first` relative to `second`: 1.0 means as fast.
    """
    first()
    second()
    firsts, seconds_, ratios = [], [], []
    for _ in range(rounds):
        a = seconds(first)
        b = seconds(second)
        firsts.append(a)
        seconds_.append(b)
        ratios.append(b / a)
    return statistics.median(firsts), statistics.median(seconds_), statistics.median(ratios)


def median(values: list[float]) -> float:
    """Median; 0.0 of nothing."""
    return statistics.median(values) if values else 0.0
