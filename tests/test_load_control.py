"""Load control on links with any bandwidth, in virtual time: never much slower than recomputing, whatever happens."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.cost import CostModel
from kvstore.load_control import PATIENCE, PATIENCE_MS_MIN, PATIENCE_NEXT, Candidate, LoadControl
from kvstore.outcome import Reason
from kvstore.testing.links import Link, Prompt, oracle_ms, simulate

TIER = "far"
MIB = 1 << 20
NEVER = 1e12

STEPS = st.lists(st.tuples(st.floats(0.1, 5000.0), st.sampled_from([0.0, 1e2, 1e4, 1e5, 1e6, 1e7])), max_size=12)
LINKS = st.builds(
    Link,
    steps=STEPS.map(tuple),
    then=st.sampled_from([0.0, 1e2, 1e4, 1e6, 1e8]),
    latency_ms=st.floats(0.0, 200.0),
)
PROMPTS = st.builds(
    Prompt,
    nbytes=st.shared(st.integers(1, 24), key="chunks").flatmap(
        lambda count: st.lists(
            st.lists(st.integers(1, 4 * MIB), min_size=2, max_size=2).map(sorted).map(tuple),
            min_size=count,
            max_size=count,
        ).map(tuple)
    ),
    savings_ms=st.shared(st.integers(1, 24), key="chunks").flatmap(
        lambda count: st.lists(st.floats(0.01, 500.0), min_size=count, max_size=count).map(tuple)
    ),
    rest_ms=st.floats(0.0, 500.0),
)
BELIEFS = st.lists(st.tuples(st.integers(1, 32 * MIB), st.floats(0.0, 1e4)), max_size=6)
"""Loads observed before, right or wrong."""


def control(prompt: Prompt, costs: CostModel, *, deadline_ms: float = NEVER) -> LoadControl:
    candidates = [Candidate(TIER, nbytes) for nbytes in prompt.nbytes]
    return LoadControl(costs, candidates, prompt.savings_ms, deadline_ms=deadline_ms)


def believing(beliefs: list[tuple[int, float]]) -> CostModel:
    costs = CostModel()
    for nbytes, ms in beliefs:
        costs.observe_load(TIER, nbytes=nbytes, ms=ms)
    return costs


def steady(prompt: Prompt, rate: float) -> CostModel:
    return believing([(sizes[0], sizes[0] / rate) for sizes in prompt.nbytes])


def patience_ms(prompt: Prompt) -> float:
    return max(PATIENCE_MS_MIN, PATIENCE * sum(prompt.savings_ms), PATIENCE_NEXT * prompt.savings_ms[0])


def even(chunks: int, *, saving_ms: float, nbytes: int = MIB, rest_ms: float = 10.0, decode_ms: float = 0.0) -> Prompt:
    return Prompt(((nbytes,),) * chunks, (saving_ms,) * chunks, rest_ms, decode_ms)


@settings(max_examples=400, deadline=None)
@given(LINKS, PROMPTS, BELIEFS)
def test_never_slower_than_recomputing_by_more_than_the_patience(
    link: Link, prompt: Prompt, beliefs: list[tuple[int, float]]
) -> None:
    took, _ = simulate(control(prompt, believing(beliefs)), link, prompt)
    assert took <= prompt.recompute_ms + patience_ms(prompt) + 1e-6


@settings(deadline=None)
@given(LINKS, PROMPTS, BELIEFS, st.floats(0.0, 2000.0))
def test_no_load_goes_on_after_its_deadline(
    link: Link, prompt: Prompt, beliefs: list[tuple[int, float]], deadline_ms: float
) -> None:
    loading = control(prompt, believing(beliefs), deadline_ms=deadline_ms)
    took, _ = simulate(loading, link, prompt)
    assert took <= deadline_ms + prompt.recompute_ms - sum(prompt.savings_ms[: loading.loaded]) + 1e-6
    if loading.loaded < len(prompt.nbytes):
        assert loading.stop is not None
        assert loading.stop.reason in (Reason.NOT_WORTH_IT, Reason.DEADLINE)


@settings(deadline=None)
@given(PROMPTS, st.floats(1e2, 1e7))
def test_on_a_steady_link_that_is_known_it_is_never_slower_but_for_what_is_not_worth_weighing(
    prompt: Prompt, rate: float
) -> None:
    took, _ = simulate(control(prompt, steady(prompt, rate)), Link(then=rate), prompt)
    assert took <= prompt.recompute_ms + PATIENCE_MS_MIN
    if sum(sizes[0] for sizes in prompt.nbytes) / rate > PATIENCE_MS_MIN + 0.1:
        assert took <= prompt.recompute_ms * (1 + 1e-4) + 0.1


@settings(deadline=None)
@given(st.integers(1, 64), st.floats(2.0, 1000.0), st.floats(4.0, 1e4))
def test_a_link_that_is_fast_enough_is_used_to_the_full(chunks: int, saving_ms: float, times: float) -> None:
    prompt = even(chunks, saving_ms=saving_ms)
    link = Link(then=times * MIB / saving_ms)
    took, levels = simulate(control(prompt, steady(prompt, link.then)), link, prompt)
    assert len(levels) == chunks
    assert took == pytest.approx(oracle_ms(link, prompt), rel=1e-6)


def test_decoding_counts_as_loading() -> None:
    prompt = even(8, saving_ms=100.0, decode_ms=300.0)
    costs = steady(prompt, 1e6)
    took, levels = simulate(control(prompt, costs), Link(then=1e6), prompt)
    assert len(levels) < 8  # learned while it loaded
    assert took <= prompt.recompute_ms + patience_ms(prompt) + 300.0
    again = control(prompt, costs)
    assert simulate(again, Link(then=1e6), prompt) == (prompt.recompute_ms, [])
    assert again.stop is not None
    assert again.stop.reason == Reason.NOT_WORTH_IT
    assert again.stop.detail.startswith("loading the rest from far would take 24")
    assert again.stop.detail.endswith("ms, computing it 800 ms")


def test_a_stall_in_the_middle_keeps_what_has_come() -> None:
    prompt = even(16, saving_ms=100.0)
    link = Link(steps=((80.0, 1e5),), then=0.0)
    loading = control(prompt, steady(prompt, 1e5))
    took, _ = simulate(loading, link, prompt)
    assert loading.loaded == 7
    assert took < prompt.recompute_ms
    assert loading.stop is not None
    assert loading.stop.reason == Reason.NOT_WORTH_IT


def test_a_pause_that_patience_covers_loses_nothing() -> None:
    prompt = even(16, saving_ms=100.0)
    link = Link(steps=((80.0, 1e5), (60.0, 0.0)), then=1e5)
    loading = control(prompt, steady(prompt, 1e5))
    took, _ = simulate(loading, link, prompt)
    assert loading.loaded == 16
    assert took <= oracle_ms(link, prompt) + MIB / 1e5  # one chunk was cut and came twice


def test_a_level_is_chosen_while_the_link_slows_down() -> None:
    prompt = Prompt(((MIB, 4 * MIB),) * 32, (40.0,) * 32, 10.0)
    costs = believing([(sizes[0], sizes[0] / 5e5) for sizes in prompt.nbytes])
    _, fast = simulate(control(prompt, costs, deadline_ms=260.0), Link(then=5e5), prompt)
    _, slower = simulate(control(prompt, costs, deadline_ms=260.0), Link(steps=((60.0, 5e5),), then=2e5), prompt)
    assert len(fast) == 32
    assert fast[0] == 1
    assert fast[-1] == 0
    assert len(slower) == 32
    assert sum(slower) < sum(fast)


def test_nothing_known_of_the_engine_loads_everything_by_the_deadline() -> None:
    prompt = even(4, saving_ms=1.0)
    loading = LoadControl(CostModel(), [Candidate(TIER, (MIB,))] * 4, None, deadline_ms=100.0)
    _, levels = simulate(loading, Link(then=1e5), prompt)
    assert len(levels) == 4
    stalled = LoadControl(CostModel(), [Candidate(TIER, (MIB,))] * 4, None, deadline_ms=100.0)
    simulate(stalled, Link(then=2e4), prompt)
    assert stalled.stop is not None
    assert (stalled.loaded, stalled.stop.reason) == (1, Reason.DEADLINE)


def test_a_tier_that_has_become_fast_is_found_out_about_and_the_search_is_cheap() -> None:
    prompt = even(16, saving_ms=10.0)
    costs = steady(prompt, 1e3)
    slow, spent = Link(then=1e3), 0.0
    for _ in range(200):
        took, _ = simulate(control(prompt, costs), slow, prompt)
        spent += took
    assert 200 * prompt.recompute_ms < spent < 1.025 * 200 * prompt.recompute_ms
    fast = Link(then=1e6)
    loaded = []
    for _ in range(60):
        loading = control(prompt, costs)
        simulate(loading, fast, prompt)
        loaded.append(loading.loaded)
    assert loaded[-1] == 16


def test_the_estimates_see_how_long_a_cut_load_took_at_least() -> None:
    prompt = even(4, saving_ms=100.0)
    costs = steady(prompt, 1e6)
    for _ in range(8):
        simulate(control(prompt, costs), Link(then=0.0), prompt)
    line = costs.load(TIER)
    assert line is not None
    assert line.ms(MIB) > 40.0


@given(LINKS, st.integers(1, 10 * MIB), st.floats(0.0, 1e4))
def test_a_link_delivers_what_was_asked_in_order(link: Link, nbytes: int, start: float) -> None:
    half = link.arrival_ms(start, nbytes / 2)
    whole = link.arrival_ms(start, nbytes)
    assert start <= half <= whole
    if math.isfinite(half):
        twice = link.arrival_ms(half, nbytes / 2)
        assert twice == whole or twice == pytest.approx(whole, rel=1e-6, abs=1e-3)
