"""What each recompute policy chooses."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.connectors.blend import registry
from kvstore.connectors.blend.chunk_statistics import ChunkStatistics, best_variant
from kvstore.connectors.blend.engine import blend_prefill
from kvstore.connectors.blend.measuring import measure
from kvstore.connectors.blend.policies.hkvd import filtered, largest
from kvstore.connectors.blend.policies.parallel import Parallel
from kvstore.connectors.blend.policies.query import ByAttention
from kvstore.connectors.blend.policies.recommended import spread
from kvstore.connectors.blend.policy import Attention
from kvstore.connectors.blend.prompt import Prompt, assemble
from kvstore.connectors.blend.sources import KV, Source
from kvstore.connectors.blend.split import Split, merge, split_attention
from kvstore.errors import ConfigError, SpecError, UnsupportedModelError
from kvstore.testing.blending import blendable, full_prefill
from kvstore.testing.models import random_model


def nothing(layer: int) -> KV:
    return torch.zeros(0), torch.zeros(0)


def prompt_of(
    *documents: int, prefix: int = 2, query: int = 3, statistics: dict[int, ChunkStatistics] | None = None
) -> Prompt:
    sources, at = [], prefix
    for index, tokens in enumerate(documents):
        own = (statistics or {}).get(index)
        sources.append(Source(at, [0] * tokens, nothing, position=0, statistics=own))
        at += tokens
    return assemble([0] * (at + query), sources, 3)


def places(chosen: torch.Tensor) -> list[int]:
    return [int(place) for place in torch.nonzero(chosen)[:, 0]]


@pytest.mark.parametrize("name", registry.POLICIES)
def test_every_policy_runs_and_a_report_says_what_it_cost(name: str) -> None:
    model = random_model("llama", changes={"num_hidden_layers": 4})
    prompt = blendable(model)
    report = blend_prefill(model, prompt.ids, prompt.sources, registry.get(name)).report
    assert (report.policy, report.moved_tokens, report.fresh_tokens) == (name, 72, 16)
    assert len(report.moved_rows) == 4
    assert 0 <= report.token_share <= report.layer_share or name == "chunk_score"
    assert report.layer_share <= 1


def test_unknown_policies_and_settings_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'recommended'"):
        registry.get("recomended")
    with pytest.raises(ConfigError, match="did you mean 'ratio'"):
        registry.get("query", ratoi=0.1)
    for name, wrong in (("query", {"ratio": 2}), ("hkvd", {"check_layer": 0}), ("chunk_score", {"alpha": -1})):
        with pytest.raises(ConfigError, match=name):
            registry.get(name, **wrong)
    with pytest.raises(ConfigError, match="spread"):
        registry.get("recommended", spread=1.5)
    with pytest.raises(ConfigError, match="above 0"):
        Split(0.0, 1.0)


def test_first_k_takes_the_start_of_documents_but_not_of_the_prompt() -> None:
    chosen = registry.get("first_k", tokens=2)
    assert places(chosen.begin(prompt_of(5, 4)).start()) == [2, 3, 7, 8]
    assert places(chosen.begin(prompt_of(5, 4, prefix=0)).start()) == [5, 6]
    assert places(registry.get("first_k", ratio=0.5).begin(prompt_of(5, 3)).start()) == [2, 3, 7, 8]


@given(ratio=st.floats(0, 1), slope=st.floats(0, 0.9), steps=st.integers(1, 30))
@settings(deadline=None)
def test_gradual_filtering_keeps_the_mean_and_never_grows(ratio: float, slope: float, steps: int) -> None:
    shares = [filtered(ratio, slope, step, steps) for step in range(steps)]
    assert math.isclose(sum(shares) / steps, ratio, abs_tol=1e-9)
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in shares)
    assert all(late <= early + 1e-12 for early, late in pairwise(shares))


def test_the_largest_are_as_many_as_asked_and_ties_go_to_the_earlier() -> None:
    assert places(largest(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2)) == [0, 1]
    assert places(largest(torch.tensor([1.0]), 0)) == []


def test_query_sums_attention_over_layers_and_spreads_in_the_recommended_policy() -> None:
    prompt = prompt_of(6, 6)
    weights = torch.zeros(2, 3, prompt.tokens)
    weights[0, 2, 5] = 0.9  # one head of one row
    weights[:, :, 0] = 1.0  # fresh: does not count
    weights[:, :, 11] = 0.1
    attention = Attention(0, weights, torch.ones(1, prompt.tokens, 4))
    chooser = ByAttention(prompt, 1 / 12)
    chooser.attended(attention)
    assert places(chooser.start()) == [5]
    wide = registry.get("recommended", ratio=0.25, first=0).begin(prompt)
    wide.attended(attention)
    assert places(wide.start()) == [4, 5, 6]
    with_first = registry.get("recommended", ratio=0.25, first=1).begin(prompt)
    with_first.attended(attention)
    assert places(with_first.start()) == [2, 5, 8]


def test_scores_spread_to_neighbours_and_fall_off() -> None:
    found = spread(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0]), 0.5, 2)
    assert found.tolist() == [0.25, 0.5, 1.0, 0.5, 0.25, 0.0]
    assert spread(torch.tensor([2.0]), 0.5, 3).tolist() == [2.0]


STATISTICS = ChunkStatistics("c", ("a", "b"), (0.3, 0.1), 0.4, (0.0, 3.0, 1.0, 2.0))


def test_chunk_influence_and_prefix_overlap() -> None:
    assert math.isclose(STATISTICS.influence, 1 / (1 + math.exp(-1.0)))
    assert math.isclose(STATISTICS.overlap(["a", "b"]), 1.0)
    assert math.isclose(STATISTICS.overlap(["x", "a"]), 0.75)
    assert STATISTICS.overlap(["b", "a"]) == 0.0  # all there, all out of order
    assert STATISTICS.overlap(["x"]) == 0.0
    assert math.isclose(STATISTICS.overhead(["b"]), STATISTICS.influence * 0.75)
    alone = ChunkStatistics("c", (), (), 0.4, (0.0,) * 4)
    assert alone.influence == 0.5
    assert best_variant([STATISTICS, alone], ["a", "b"]) == 0
    assert best_variant([STATISTICS, alone], ["x"]) == 1
    with pytest.raises(SpecError, match="no variants"):
        best_variant([], [])


def test_chunk_score_computes_what_leaned_most_on_what_is_missing() -> None:
    prompt = prompt_of(3, 4, statistics={1: STATISTICS})
    chosen = places(registry.get("chunk_score", alpha=0.6).begin(prompt).start())
    assert chosen == [2, 6, 8]  # ceil(0.6 * 0.5 * 3) first ones of the chunk without statistics; 2 of 4 by attention
    everything = places(registry.get("chunk_score", alpha=9.0).begin(prompt).start())
    assert everything == list(range(2, 9))
    with pytest.raises(SpecError, match="its statistics 4"):
        Source(0, [1, 2], nothing, statistics=STATISTICS)


def test_statistics_are_those_of_the_attention() -> None:
    model = random_model("llama")
    prompt = blendable(model)
    model.set_attn_implementation("eager")
    chunks = [(f"d{index}", source.start, source.stop) for index, source in enumerate(prompt.sources)]
    found, cache = measure(model, prompt.ids, chunks)
    with torch.no_grad():
        weights = model(torch.tensor([prompt.ids]), output_attentions=True).attentions
    mean = torch.stack([layer[0].mean(0) for layer in weights])  # (layers, T, T)
    (_, a, b), (_, c, d) = chunks[0], chunks[2]
    inter = mean[:, c:d, a:b].sum((1, 2)).mean() / ((d - c) * (b - a))
    assert math.isclose(found[2].inter[0], float(inter), rel_tol=1e-4)
    assert math.isclose(found[2].intra, float(mean[:, c:d, c:d].sum((1, 2)).mean() / (d - c) ** 2), rel_tol=1e-4)
    token = mean[:, c:d, a : chunks[1][2]].sum(2).mean(0)
    torch.testing.assert_close(torch.tensor(found[2].token_inter), token, rtol=1e-4, atol=1e-6)
    assert found[2].behind == ("d0", "d1")
    _, full = full_prefill(model, prompt.ids)
    computed: Any = cache.layers[1]
    torch.testing.assert_close(computed.keys[:, :, : len(prompt.ids)], full.layers[1].keys, rtol=0, atol=1e-4)


def test_parallel_places_documents_side_by_side() -> None:
    assert Parallel().positions(prompt_of(3, 5, query=2)).tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8]
    assert Parallel().positions(assemble([1, 2], [], 1)).tolist() == [0, 1]


def test_split_attention_without_correction_is_ordinary_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 3, 8, generator=generator)
    keys, values = torch.randn(2, 2, 9, 8, generator=generator)
    seen = torch.ones(3, 9, dtype=torch.bool).tril(6)
    for apart in (torch.arange(9) < 4, torch.zeros(9, dtype=torch.bool), torch.ones(9, dtype=torch.bool)):
        merged = merge(queries, keys, values, seen, apart, Split(1.0, 1.0), 0.5)
        plain = torch.nn.functional.scaled_dot_product_attention(
            queries[None], keys.repeat_interleave(2, 0)[None], values.repeat_interleave(2, 0)[None], seen, scale=0.5
        )
        torch.testing.assert_close(merged, plain[0], rtol=0, atol=1e-5)
    corrected = merge(queries, keys, values, seen, torch.arange(9) < 4, Split(0.9, 0.9), 0.5)
    assert not torch.allclose(corrected, plain[0], atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_parallel_decoding_goes_on_in_the_same_attention(family: str) -> None:
    model = random_model(family, changes={"num_hidden_layers": 3})
    prompt = blendable(model)
    policy = Parallel(temperature=0.8, scale=0.7)
    longer = [*prompt.ids, 7]
    expected = blend_prefill(model, longer, prompt.sources, policy)
    blended = blend_prefill(model, prompt.ids, prompt.sources, policy)
    context = assemble(prompt.ids, prompt.sources, 3).moved
    with split_attention(model, blended.cache, context, policy.split), torch.no_grad():
        logits = model(
            torch.tensor([[7]]), position_ids=torch.tensor([[blended.next_position]]), past_key_values=blended.cache
        ).logits[0]
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4)
    assert expected.next_position == blended.next_position + 1


def test_parallel_refuses_sliding_windows_by_name() -> None:
    model = random_model("mistral", window=20)
    prompt = blendable(model)
    with pytest.raises(UnsupportedModelError, match="sliding windows"):
        blend_prefill(model, prompt.ids, prompt.sources, Parallel())
