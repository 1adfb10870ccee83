"""Any arrangement of sources: what is computed again is right, what is not keeps its bits."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.connectors.blend import registry
from kvstore.connectors.blend.compiling import compile_span
from kvstore.connectors.blend.engine import blend_prefill
from kvstore.connectors.blend.moving import mover_of
from kvstore.connectors.blend.policies.none import Fixed
from kvstore.connectors.blend.policy import Chooser, Policy
from kvstore.connectors.blend.prompt import Kind, Prompt, assemble
from kvstore.connectors.blend.sources import Source, of_layers
from kvstore.connectors.hf_spec import kv_spec
from kvstore.testing.blending import full_prefill
from kvstore.testing.models import random_model, random_prompt

PREAMBLE = [1, 2, 3]
Pieces = list[tuple[int, int]]
"""(fresh tokens before, tokens) of each source."""


@pytest.fixture(scope="module")
def model() -> Any:
    """Qwen3: norms of queries and keys, and a window in half of the layers."""
    return random_model("qwen3", window=12, changes={"num_hidden_layers": 4})


class Chosen(Policy):
    """Tokens drawn by the test."""

    name = "chosen"

    def __init__(self, tokens: torch.Tensor) -> None:
        self._tokens = tokens

    def begin(self, prompt: Prompt) -> Chooser:
        return Fixed(self._tokens)


def arranged(model: Any, exact: int, pieces: Pieces, tail: int, seed: int) -> tuple[list[int], list[Source]]:
    """A prompt and its sources, an exact beginning first if there is one."""
    total = exact + sum(before + tokens for before, tokens in pieces) + tail
    ids = [int(token) for token in random_prompt(total, seed)[0].tolist()]
    sources = []
    if exact:
        _, cache = full_prefill(model, ids[:exact])
        layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        sources.append(Source(0, ids[:exact], of_layers(layers), exact=True))
    at = exact
    for before, tokens in pieces:
        at += before
        own = ids[at : at + tokens]
        sources.append(Source(at, own, of_layers(compile_span(model, PREAMBLE, own)), position=len(PREAMBLE)))
        at += tokens
    return ids, sources


LAYOUT = {
    "exact": st.integers(0, 9),
    "pieces": st.lists(st.tuples(st.integers(0, 4), st.integers(1, 14)), min_size=1, max_size=4),
    "tail": st.integers(0, 5),
    "seed": st.integers(0, 10_000),
}
SLOW = settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@given(**LAYOUT, name=st.sampled_from(["first_k", "hkvd", "query", "chunk_score", "recommended"]))
@SLOW
def test_ratio_one_is_a_full_prefill_however_sources_lie(
    model: Any, exact: int, pieces: Pieces, tail: int, seed: int, name: str
) -> None:
    ids, sources = arranged(model, exact, pieces, tail, seed)
    settings_of: dict[str, Any] = {"tokens": 1000} if name == "first_k" else {"ratio": 1.0}
    blended = blend_prefill(model, ids, sources, registry.get(name, **settings_of))
    full, cache = full_prefill(model, ids)
    torch.testing.assert_close(blended.logits, full, rtol=0, atol=2e-4)
    for one, other in zip(blended.cache.layers, cache.layers, strict=True):
        layer: Any = one
        torch.testing.assert_close(layer.values, other.values, rtol=0, atol=2e-4)


@given(**LAYOUT, data=st.data())
@SLOW
def test_tokens_that_are_not_chosen_keep_their_bits(
    model: Any, exact: int, pieces: Pieces, tail: int, seed: int, data: st.DataObject
) -> None:
    ids, sources = arranged(model, exact, pieces, tail, seed)
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    blended = blend_prefill(model, ids, sources, Chosen(chosen))
    prompt = assemble(ids, sources, 4)
    kept = (prompt.kind == Kind.EXACT) | (prompt.moved & ~chosen)
    kept[-1] = False
    mover = mover_of(model, kv_spec(model))
    for index, one in enumerate(blended.cache.layers):
        layer: Any = one
        for source in sources:
            keys, values = source.layer(index)
            old = source.computed_at + torch.arange(len(source.ids))
            moved = mover.move(keys, old, torch.arange(source.start, source.stop))
            own = kept[source.start : source.stop]
            assert torch.equal(layer.keys[0, :, source.start : source.stop][:, own], moved[:, own])
            assert torch.equal(layer.values[0, :, source.start : source.stop][:, own], values[:, own])
    assert bool(torch.isfinite(blended.logits).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blending_on_a_gpu_gives_what_it_gives_on_the_host() -> None:
    host = random_model("llama", changes={"num_hidden_layers": 4})
    ids, sources = arranged(host, 5, [(0, 30), (3, 40)], 6, 0)
    device = random_model("llama", changes={"num_hidden_layers": 4}).to("cuda")
    for name in registry.POLICIES:
        expected = blend_prefill(host, ids, sources, registry.get(name))
        found = blend_prefill(device, ids, sources, registry.get(name))
        torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=0, atol=1e-3)
        assert found.report.layer_share == pytest.approx(expected.report.layer_share, abs=0.05)
