"""Estimates find the rates behind noisy observations, follow a change, and are not misled by outliers."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.cost import CostModel, Line
from kvstore.errors import ConfigError

MIB = 1 << 20


def prefill_ms(tokens: int, context: int, rates: tuple[float, float, float]) -> float:
    per_token, per_pair, overhead = rates
    return overhead + per_token * tokens + per_pair * (tokens * context + tokens * tokens / 2)


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.01, 10.0),
    st.floats(0.0, 1e-3),
    st.floats(0.0, 50.0),
    st.integers(0, 2**32),
    st.sampled_from([0.3, 20.0]),
)
def test_prefill_is_estimated_from_noisy_prompts_with_outliers(
    per_token: float, per_pair: float, overhead: float, seed: int, factor: float
) -> None:
    """One in eight takes a third, or twenty times as long."""
    rates = (per_token, per_pair, overhead)
    costs, dice = CostModel(), random.Random(seed)
    for number in range(60):
        tokens, context = dice.choice([64, 256, 700, 2000, 8000]), dice.choice([0, 0, 1024, 4096])
        ms = prefill_ms(tokens, context, rates) * dice.uniform(0.95, 1.05)
        costs.observe_prefill(tokens=tokens, context=context, ms=ms * factor if number % 8 == 3 else ms)
        assert costs.prefill_ms(tokens, context) is not None
    for tokens, context in ((1000, 0), (4000, 2000), (8000, 4096)):
        assert costs.prefill_ms(tokens, context) == pytest.approx(prefill_ms(tokens, context, rates), rel=0.3)
    savings = costs.savings_ms(8, 256)
    assert savings is not None
    assert savings == sorted(savings)
    assert sum(savings) == pytest.approx(prefill_ms(2048, 0, rates) - overhead, rel=0.3)


def test_what_chunks_save_adds_up_to_what_computing_them_takes() -> None:
    costs = CostModel()
    for tokens, context in ((256, 0), (1024, 0), (1024, 4096), (4096, 0)):
        costs.observe_prefill(tokens=tokens, context=context, ms=prefill_ms(tokens, context, (0.5, 1e-4, 3.0)))
    savings = costs.savings_ms(5, 100)
    whole, rest = costs.prefill_ms(700, 0), costs.prefill_ms(200, 500)
    assert savings is not None
    assert whole is not None
    assert rest is not None
    assert sum(savings) == pytest.approx(whole - rest)


def test_nothing_is_known_before_the_first_observation() -> None:
    costs = CostModel()
    assert costs.load("nvme") is None
    assert costs.decode("raw") is None
    assert costs.chunk("nvme") is None
    assert costs.prefill_ms(1, 0) is None
    assert costs.savings_ms(3, 256) is None


def test_one_observation_is_a_bandwidth() -> None:
    costs = CostModel()
    costs.observe_load("nvme", nbytes=10 * MIB, ms=20.0)
    line = costs.load("nvme")
    assert line is not None
    assert line.ms(40 * MIB) == pytest.approx(80.0, rel=1e-3)


def test_latency_and_bandwidth_are_told_apart() -> None:
    costs = CostModel()
    for nbytes in (MIB // 4, MIB, 4 * MIB, 16 * MIB):
        costs.observe_load("s3", nbytes=nbytes, ms=30.0 + nbytes / 1e5)
    line = costs.load("s3")
    assert line is not None
    assert line.fixed_ms == pytest.approx(30.0, rel=1e-2)
    assert line.ms_per_byte == pytest.approx(1e-5, rel=1e-2)


@pytest.mark.parametrize("factor", [0.05, 20.0])
def test_a_lasting_change_is_followed_and_a_single_one_is_not(factor: float) -> None:
    costs = CostModel()
    for number in range(30):
        costs.observe_load("link", nbytes=MIB * (1 + number % 3), ms=10.0 * (1 + number % 3))

    def seen() -> float:
        line = costs.load("link")
        assert line is not None
        return line.ms(MIB)

    costs.observe_load("link", nbytes=MIB, ms=10.0 * factor)
    assert 5.0 < seen() < 20.0
    for _ in range(7):
        costs.observe_load("link", nbytes=MIB, ms=10.0 * factor)
    assert seen() == pytest.approx(10.0 * factor, rel=0.3)


def test_a_chunk_costs_its_bytes_and_the_decoding_of_what_the_tier_holds() -> None:
    costs = CostModel()
    for nbytes in (MIB, 4 * MIB):
        costs.observe_load("nvme", nbytes=nbytes, ms=5.0 + nbytes / 1e6)
        costs.observe_decode("lossless", tier="nvme", nbytes=nbytes, ms=nbytes / 2e6)
        costs.observe_decode("raw", tier="dram", nbytes=nbytes, ms=nbytes / 1e8)
    line = costs.chunk("nvme")
    assert line is not None
    assert line == pytest.approx(Line(0.0, 1.5e-6), rel=1e-2, abs=1e-2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1 << 40), st.floats(0.0, 1e9)), min_size=1, max_size=40))
def test_whatever_is_observed_no_estimate_is_negative_or_infinite(loads: list[tuple[int, float]]) -> None:
    costs = CostModel()
    for nbytes, ms in loads:
        costs.observe_load("any", nbytes=nbytes, ms=ms)
        costs.observe_prefill(tokens=nbytes, context=nbytes % 7, ms=ms)
    line = costs.load("any")
    assert line is not None
    assert 0 <= line.fixed_ms < 1e12
    assert 0 <= line.ms_per_byte < 1e12
    assert all(0 <= ms < 1e15 for ms in costs.savings_ms(4, 256) or [-1.0])


@pytest.mark.parametrize(
    "wrong", [{"nbytes": 0, "ms": 1.0}, {"nbytes": 1, "ms": -1.0}, {"nbytes": 1, "ms": float("inf")}]
)
def test_an_observation_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        CostModel().observe_load("nvme", **wrong)  # type: ignore[arg-type]


def test_many_threads_share_a_model() -> None:
    costs = CostModel()

    def work(seed: int) -> None:
        for number in range(1, 50):
            costs.observe_load(f"tier {seed % 2}", nbytes=MIB * number, ms=1.0 * number)
            costs.observe_prefill(tokens=number, context=0, ms=1.0 * number)
            assert costs.chunk(f"tier {seed % 2}") is not None
            assert costs.savings_ms(3, 16) is not None

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for seed in range(4)]:
            done.result(timeout=60)
    line = costs.load("tier 0")
    assert line is not None
    assert line.ms(MIB) == pytest.approx(1.0, rel=0.1)
