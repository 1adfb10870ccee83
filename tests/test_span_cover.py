"""The best cover is the best there is, and the same whatever the order it is asked in."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.span_cover import Interval, best_cover

INTERVALS = st.lists(
    st.builds(
        lambda start, length, weight, name: Interval(start, start + length, weight, name),
        st.integers(0, 12),
        st.integers(1, 6),
        st.integers(-1, 5).map(float),
        st.binary(max_size=1),
    ),
    max_size=8,
)


def overlap(intervals: list[Interval]) -> bool:
    ordered = sorted(intervals, key=lambda interval: interval.start)
    return any(one.stop > two.start for one, two in pairwise(ordered))


@settings(max_examples=300)
@given(INTERVALS, st.randoms())
def test_no_other_choice_weighs_more(intervals: list[Interval], random: object) -> None:
    chosen = [intervals[index] for index in best_cover(intervals)]
    assert not overlap(chosen)
    assert [interval.start for interval in chosen] == sorted(interval.start for interval in chosen)
    assert all(interval.weight > 0 for interval in chosen)
    choices = [
        list(some)
        for count in range(len(intervals) + 1)
        for some in combinations([interval for interval in intervals if interval.weight > 0], count)
        if not overlap(list(some))
    ]
    best = max(sum(interval.weight for interval in choice) for choice in choices)
    assert sum(interval.weight for interval in chosen) == best
    assert len(chosen) == min(len(some) for some in choices if sum(interval.weight for interval in some) == best)
    shuffled = intervals[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert [shuffled[index] for index in best_cover(shuffled)] == chosen


def test_nothing_covers_nothing() -> None:
    assert best_cover([]) == []
    assert best_cover([Interval(0, 3, 0.0), Interval(0, 3, -1.0)]) == []
