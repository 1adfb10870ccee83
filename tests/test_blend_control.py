"""The controller of blending on simulated links: free ratios, refusals, and never much slower than a full prefill."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blend_control import FREE, PATIENCE, PATIENCE_MS_MIN, BlendControl, BlendDecision, BlendWork, finish_ms
from kvstore.cost import CostModel
from kvstore.errors import ConfigError
from kvstore.testing.blend_links import Engine, arrivals_ms, simulate_blend
from kvstore.testing.links import Link

LAYERS = 24
TOKENS = 4096
CHUNK_BYTES = 1 << 20
CHUNKS = 16


def work(*, query_rows: int = 0, compared_layers: int = 0, fresh: int = 64) -> BlendWork:
    return BlendWork(
        layers=LAYERS,
        prompt_tokens=TOKENS + fresh,
        exact_tokens=0,
        moved_tokens=TOKENS,
        query_rows=query_rows,
        compared_layers=compared_layers,
        loads=(("nvme", CHUNK_BYTES),) * CHUNKS,
    )


def learned(*, token_ms: float = 1.0, bytes_per_ms: float | None = None, decode_ms: float = 0.0) -> CostModel:
    """A model that has seen prefills and, with a bandwidth, loads of both."""
    costs = CostModel()
    for tokens in (64, 512, 4096):
        costs.observe_prefill(tokens=tokens, context=0, ms=token_ms * tokens)
    if bytes_per_ms is not None:
        for nbytes in (CHUNK_BYTES, 8 * CHUNK_BYTES):
            costs.observe_load("nvme", nbytes=nbytes, ms=nbytes / bytes_per_ms)
            if decode_ms:
                costs.observe_decode("raw", nbytes=nbytes, ms=decode_ms * nbytes / CHUNK_BYTES, tier="nvme")
    return costs


def control(costs: CostModel, *, patience: float = PATIENCE) -> BlendControl:
    return BlendControl(costs, patience=patience, load_deadline_ms=60_000.0)


def decide(costs: CostModel, own: BlendWork, *, ratio: float = 0.15, lowest: float = 0.15) -> BlendDecision:
    return control(costs).decide(own, ratio=ratio, lowest=lowest)


def bandwidth(load_ms: float) -> float:
    """Bytes a millisecond with which all chunks take so long."""
    return CHUNKS * CHUNK_BYTES / load_ms


def test_nothing_known_means_the_wanted_ratio() -> None:
    decision = decide(CostModel(), work())
    assert (decision.ratio, decision.wait_ms) == (0.15, 60_000.0)


def test_who_does_not_weigh_blends_whatever_there_is() -> None:
    steering = BlendControl(learned(bytes_per_ms=bandwidth(5000)), load_deadline_ms=70.0, weighs=False)
    assert steering.decide(work(), ratio=0.15, lowest=0.1) == BlendDecision(ratio=0.15, wait_ms=70.0)


def test_a_fast_load_leaves_the_ratio_alone() -> None:
    assert decide(learned(bytes_per_ms=bandwidth(20)), work()).ratio == pytest.approx(0.15, abs=0.03)


def test_loading_as_the_bottleneck_raises_the_ratio_for_free() -> None:
    costs = learned(bytes_per_ms=bandwidth(1500))
    decision = decide(costs, work())
    assert decision.ratio is not None
    assert 0.28 < decision.ratio < 1500 / TOKENS  # what is computed takes about as long as what is loaded
    steering = control(costs)
    assert steering.blend_ms(work(), decision.ratio) <= (1 + FREE) * steering.blend_ms(work(), 0.15)


def test_a_policy_that_runs_the_query_first_gets_nothing_for_free() -> None:
    decision = decide(learned(bytes_per_ms=bandwidth(1500)), work(query_rows=64))
    assert decision.ratio is not None
    assert decision.ratio < 0.2


def test_the_ratio_is_lowered_where_the_wanted_one_is_not_worth_it() -> None:
    decision = decide(learned(bytes_per_ms=bandwidth(10)), work(), ratio=0.99, lowest=0.1)
    assert decision.ratio is not None
    assert 0.1 <= decision.ratio < 0.96
    refused = decide(learned(bytes_per_ms=bandwidth(10)), work(compared_layers=LAYERS))
    assert refused.ratio is None
    assert "computing everything" in refused.detail


def test_a_load_that_takes_too_long_is_not_begun() -> None:
    decision = decide(learned(bytes_per_ms=bandwidth(5000)), work())
    assert decision.ratio is None
    assert "loading would take 5" in decision.detail


def test_slow_tiers_are_tried_again_now_and_then() -> None:
    steering = control(learned(bytes_per_ms=bandwidth(5000)))
    tried = [steering.decide(work(), ratio=0.15, lowest=0.15).ratio is not None for _ in range(60)]
    assert any(tried)
    assert sum(tried) <= 4


def test_decoding_counts_beside_reading() -> None:
    reading = control(learned(bytes_per_ms=bandwidth(400))).load_ms(work())
    decoding = control(learned(bytes_per_ms=bandwidth(400), decode_ms=50.0)).load_ms(work())
    assert reading[1] * LAYERS == pytest.approx(400, rel=0.05)
    assert decoding[1] * LAYERS == pytest.approx(800, rel=0.05)  # the longer of the two: 16 chunks of 50 ms


def test_estimates_follow_what_blending_took() -> None:
    steering = control(learned())
    before = steering.blend_ms(work(), 0.15)
    for _ in range(20):
        steering.observe(work(), 0.15, 3 * before)
    assert steering.blend_ms(work(), 0.15) == pytest.approx(3 * before, rel=0.05)


def test_a_negative_patience_is_refused() -> None:
    with pytest.raises(ConfigError, match="patience"):
        control(CostModel(), patience=-0.1)


links = st.builds(
    Link,
    steps=st.lists(st.tuples(st.floats(1, 3000), st.one_of(st.just(0.0), st.floats(1.0, 1e6))), max_size=6).map(tuple),
    then=st.one_of(st.just(0.0), st.floats(1.0, 1e6)),
    latency_ms=st.floats(0, 2000),
)


@settings(max_examples=300, deadline=None)
@given(
    link=links,
    believed=st.one_of(st.none(), st.floats(1.0, 1e6)),
    query_rows=st.sampled_from([0, 64]),
    ratio=st.floats(0.01, 1.0),
    decode_layer_ms=st.floats(0, 100),
    patience=st.floats(0, 1),
)
def test_never_slower_than_a_prefill_by_more_than_the_bound(
    link: Link, believed: float | None, query_rows: int, ratio: float, decode_layer_ms: float, patience: float
) -> None:
    own = work(query_rows=query_rows)
    costs = learned(bytes_per_ms=believed)
    steering = BlendControl(costs, patience=patience, load_deadline_ms=60_000.0)
    engine = Engine(row_layer_ms=1.0 / LAYERS, decode_layer_ms=decode_layer_ms)
    decision = steering.decide(own, ratio=ratio, lowest=ratio)
    prefill_ms = engine.prefill_ms(own)
    wait_ms = max(PATIENCE_MS_MIN, patience * prefill_ms)
    layer_ms = prefill_ms / LAYERS
    took = simulate_blend(decision, link, engine, own)
    blended_ms = (
        (own.query_rows + own.fresh_tokens + (decision.ratio or 0) * own.moved_tokens)
        * layer_ms
        * LAYERS
        / (own.prompt_tokens)
    )
    assert took <= max(prefill_ms, blended_ms) + 1.01 * wait_ms + layer_ms


@settings(max_examples=100, deadline=None)
@given(link=links, decode_layer_ms=st.floats(0, 50), ratio=st.floats(0.05, 0.5))
def test_pipelining_is_never_slower_than_loading_first(link: Link, decode_layer_ms: float, ratio: float) -> None:
    own, engine = work(), Engine(row_layer_ms=0.03, decode_layer_ms=decode_layer_ms)
    arrivals = arrivals_ms(link, engine, own)
    computes = [ratio * TOKENS * engine.row_layer_ms] * LAYERS
    pipelined, unpipelined = finish_ms(arrivals, computes), arrivals[-1] + sum(computes)
    assert pipelined <= unpipelined * (1 + 1e-9)
    assert pipelined >= max(arrivals[-1], sum(computes))
