"""Plans against a brute-force search over prefixes, and the rules that every plan keeps."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvstore.planning import Plan, plan_loads

MS = st.floats(0.0, 1000.0)
CHUNKS = st.lists(st.tuples(MS, st.lists(MS, min_size=1, max_size=3).map(sorted), MS), min_size=1, max_size=8)
NEVER = 1e9


def plan(chunks: Sequence[tuple[float, list[float], float]], room: float, budget: float, fixed: float = 0.0) -> Plan:
    return plan_loads(
        [chunk[0] for chunk in chunks],
        [chunk[1] for chunk in chunks],
        [chunk[2] for chunk in chunks],
        fixed_ms=fixed,
        room_ms=room,
        budget_ms=budget,
    )


@given(CHUNKS, MS)
def test_with_unlimited_patience_the_best_prefix_is_loaded(
    chunks: list[tuple[float, list[float], float]], fixed: float
) -> None:
    patient = [(saving, loads[:1], NEVER) for saving, loads, _ in chunks]
    gains = [0.0]
    for count in range(1, len(chunks) + 1):
        gains.append(sum(saving - loads[0] for saving, loads, _ in patient[:count]) - fixed)
    chosen = plan(patient, NEVER, NEVER, fixed)
    assert chosen.saved_ms - chosen.load_ms >= max(gains) - 1e-6


@given(CHUNKS, MS, MS, MS)
def test_a_plan_keeps_every_bound(
    chunks: list[tuple[float, list[float], float]], room: float, budget: float, fixed: float
) -> None:
    chosen = plan(chunks, room, budget, fixed)
    spent, saved, bound = fixed, 0.0, room
    for index, level in enumerate(chosen.levels):
        saving, loads, patience = chunks[index]
        bound = min(bound, spent - saved + patience) if index else bound
        spent += loads[level]
        assert spent <= min(saved + bound, budget) + 1e-6
        assert level == 0 or loads[level] <= saving
        saved += saving
    if chosen.levels:
        assert abs(chosen.load_ms - spent) < 1e-6
        assert abs(chosen.saved_ms - saved) < 1e-6
        assert saved - fixed > sum(chunks[index][1][0] for index in range(len(chosen.levels)))


def test_everything_comes_in_its_lowest_level_before_anything_is_refined() -> None:
    chunks = [(100.0, [10.0, 40.0, 90.0], NEVER)] * 4
    assert plan(chunks, NEVER, 40.0).levels == (0, 0, 0, 0)
    assert plan(chunks, NEVER, 100.0).levels == (1, 1, 0, 0)
    assert plan(chunks, NEVER, 160.0).levels == (1, 1, 1, 1)
    assert plan(chunks, NEVER, 215.0).levels == (2, 1, 1, 1)
    assert plan(chunks, NEVER, NEVER).levels == (2, 2, 2, 2)


def test_a_level_that_takes_longer_than_computing_is_not_used() -> None:
    assert plan([(50.0, [10.0, 60.0], NEVER), (100.0, [10.0, 60.0], NEVER)], NEVER, NEVER).levels == (0, 1)


def test_what_would_come_too_late_is_computed() -> None:
    chunks = [(100.0, [30.0], NEVER)] * 5
    assert len(plan(chunks, NEVER, 100.0).levels) == 3
    assert plan([(10.0, [30.0], NEVER)] * 3, NEVER, NEVER) == Plan()


def test_a_first_chunk_that_does_not_pay_is_loaded_for_those_behind_it() -> None:
    chunks = [(10.0, [20.0], NEVER), (50.0, [20.0], NEVER)]
    assert plan(chunks, NEVER, NEVER).levels == (0, 0)
    assert plan(chunks, 15.0, NEVER).levels == ()
