"""The ways in which blending is known to go wrong elsewhere, one test each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

from kvstore.bench import blend_prompts
from kvstore.bench.blend_baselines import cacheblend_published
from kvstore.connectors.blend import registry
from kvstore.connectors.blend.compiling import compile_span
from kvstore.connectors.blend.engine import blend_prefill
from kvstore.connectors.blend.policies.first_k import FirstK
from kvstore.connectors.blend.policies.hkvd import HighDeviation
from kvstore.connectors.blend.policies.none import Fixed
from kvstore.connectors.blend.policies.recommended import Recommended
from kvstore.connectors.blend.policy import Change, Chooser, Policy
from kvstore.connectors.blend.prompt import Prompt, assemble
from kvstore.connectors.blend.sources import Source, of_layers
from kvstore.connectors.transformers import TransformersConnector
from kvstore.errors import UnsupportedModelError
from kvstore.testing.blending import blendable, full_prefill
from kvstore.testing.memory_client import MemoryClient
from kvstore.testing.models import random_model

LAYERS: dict[str, Any] = {"num_hidden_layers": 4}


class Chosen(Policy):
    """Tokens that the test chose."""

    name = "chosen"

    def __init__(self, *places: int) -> None:
        self._places = list(places)

    def begin(self, prompt: Prompt) -> Chooser:
        tokens = torch.zeros(prompt.tokens, dtype=torch.bool)
        tokens[self._places] = True
        return Fixed(tokens)


def changed(source: Source) -> Source:
    """The same source with other KV."""
    return replace(source, layer=lambda layer: (source.layer(layer)[0] + 3.0, source.layer(layer)[1] - 3.0))


def test_no_causal_leak_from_rows_that_are_not_neighbours() -> None:
    model = random_model("llama", changes=LAYERS)
    prompt = blendable(model)
    early = [10, 12, 20, 38, 41]  # in the first document
    other = [prompt.sources[0], prompt.sources[1], changed(prompt.sources[2])]
    caches = [
        blend_prefill(model, prompt.ids, sources, Chosen(*early)).cache.layers for sources in (prompt.sources, other)
    ]
    for one, two in zip(*caches, strict=True):
        left: Any = one
        right: Any = two
        torch.testing.assert_close(left.keys[:, :, early], right.keys[:, :, early], rtol=0, atol=0)
        torch.testing.assert_close(left.values[:, :, early], right.values[:, :, early], rtol=0, atol=0)


def test_the_published_mask_does_leak() -> None:
    model = random_model("llama", changes=LAYERS)
    prompt = blendable(model, prefix=0)
    other = [*prompt.sources[:2], changed(prompt.sources[2])]
    caches: list[Any] = [
        cacheblend_published(model, prompt.ids, sources, prompt.preamble, 0.5)[1] for sources in (prompt.sources, other)
    ]
    first = len(prompt.sources[0].ids)
    left, right = (cache.layers[3].values[:, :, :first] for cache in caches)
    assert not torch.equal(left, right)


def test_query_is_never_treated_as_cached() -> None:
    class Refusing(Chooser):
        compares = True

        def __init__(self, moved: torch.Tensor) -> None:
            self._moved = moved

        def start(self) -> torch.Tensor:
            return self._moved

        def computed(self, change: Change) -> torch.Tensor | None:
            assert not set(change.rows.tolist()) & {*range(9), *range(81, 88)}
            return torch.zeros(len(change.rows), dtype=torch.bool)

    class Refuse(Policy):
        name = "refuse"

        def begin(self, prompt: Prompt) -> Chooser:
            return Refusing(prompt.moved)

    model = random_model("llama", changes=LAYERS)
    prompt = blendable(model)
    rows: list[int] = []
    for layer in model.base_model.layers:
        layer.mlp.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[1]))
    blend_prefill(model, prompt.ids, prompt.sources, Refuse())
    assert rows == [88, 16, 16, 16]  # prefix and query go on; a first layer that nobody stops costs everything


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_rope_that_depends_on_the_length_is_refused_by_name(rope: str) -> None:
    model = random_model("llama")
    model.config.rope_parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match=rope):
        blend_prefill(model, [1, 2, 3], [], Recommended())


def test_m_rope_is_refused_by_name() -> None:
    model = random_model("llama")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    with pytest.raises(UnsupportedModelError, match="mrope_section"):
        blend_prefill(model, [1, 2, 3], [], Recommended())


def test_an_unknown_architecture_and_attention_are_refused_by_name() -> None:
    model = random_model("llama")
    model.config.model_type = "gemma9"
    with pytest.raises(UnsupportedModelError, match="gemma9"):
        blend_prefill(model, [1, 2, 3], [], Recommended())
    model = random_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="flash_attention_2"):
        blend_prefill(model, [1, 2, 3], [], Recommended())


def test_phantom_sinks_are_computed_again() -> None:
    model = blend_prompts.trained("text")
    asked = blend_prompts.text(model, "mixed", 1)[0]
    bare = [
        replace(source, layer=of_layers(compile_span(model, [], source.ids)), position=0)
        for source in asked.sources[1:]
    ]
    spoilt = [asked.sources[0], *(changed_first(source) for source in bare)]
    blended = blend_prefill(model, asked.ids, spoilt, Recommended(ratio=0.05))
    layer: Any = blended.cache.layers[-1]
    for source in spoilt[1:]:
        assert layer.keys[0, :, source.start].abs().max() < 1e3


def changed_first(source: Source) -> Source:
    """A source whose first token no query would attend to, and whose KV is absurd."""

    def layer(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (part.clone() for part in source.layer(index))
        keys[:, 0], values[:, 0] = 1e4, 0.0
        return keys, values

    return replace(source, layer=layer)


def test_salient_tokens_do_not_crowd_out_what_the_query_needs() -> None:
    model = blend_prompts.trained("recall")
    asked = blend_prompts.recall(model, "bindings_first_4p_long", 24, seed=1)

    def right(policy: Policy) -> int:
        return sum(
            int(blend_prefill(model, one.ids, one.sources, policy).logits.argmax()) == one.following[0] for one in asked
        )

    blind, asking = right(HighDeviation(ratio=0.1)), right(Recommended(ratio=0.1))
    assert asking >= 23
    assert blind < asking - 5


def test_multi_hop_answers_survive_at_a_fifth_of_the_tokens() -> None:
    model = blend_prompts.trained("recall")
    asked = blend_prompts.recall(model, "shuffled_4p", 40, seed=2)
    policies = [registry.get("none"), registry.get("recommended", ratio=0.15)]
    blended = [[blend_prefill(model, one.ids, one.sources, policy) for one in asked] for policy in policies]
    concat, ours = (
        sum(int(b.logits.argmax()) == one.following[0] for b, one in zip(own, asked, strict=True)) for own in blended
    )
    full = sum(int(one.full[0].argmax()) == one.following[0] for one in asked)
    assert ours >= full - 1 >= 35
    assert concat < full - 15
    assert max(b.report.layer_share for b in blended[1]) <= 0.2


def change(layer: int, amounts: list[float], noise: list[float] | None = None) -> Change:
    """A change of V of 2 heads of 4 dimensions, by so much an element."""
    rows = torch.arange(len(amounts))
    old = torch.ones(2, len(amounts), 4)
    new = old + torch.tensor(amounts)[None, :, None]
    floors = torch.zeros(len(amounts), 2)
    floors[:, 1] = torch.tensor(noise or [0.0] * len(amounts))
    return Change(layer, rows, (old, new), (old, old), floors)


def test_selection_is_not_blind_behind_the_first_layer() -> None:
    source = Source(0, list(range(8)), lambda layer: (torch.zeros(0), torch.zeros(0)), position=3)
    chooser = HighDeviation(ratio=0.25, slope=0.5).begin(assemble([*range(8), 9], [source], 4))
    first = chooser.computed(change(1, [9.0, 8.0, 7.0, 0.1, 0.1, 0.1, 0.1, 0.1]))
    assert first is not None
    assert torch.nonzero(first)[:, 0].tolist() == [0, 1, 2]
    second = chooser.computed(change(2, [0.1, 0.2, 5.0]))  # the third of those that went on deviates deeper
    assert second is not None
    assert second.tolist() == [False, False, True]


def test_codec_noise_is_not_taken_for_deviation() -> None:
    noisy, deviating = [2.0, 2.0, 0.0, 1.5], [4.0, 4.0, 0.0, 0.0]  # expected squared error 4 in the first two
    assert change(1, noisy).deviation(1).argmax() == 0
    scores = change(1, noisy, deviating).deviation(1)
    assert scores.argmax() == 3
    assert scores[:2].tolist() == [0.0, 0.0]


class Listening(Policy):
    """Another policy, with what it heard at layer 1 that goes on."""

    name = "listening"

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.going_on = torch.zeros(0)

    def begin(self, prompt: Prompt) -> Chooser:
        inner = self.policy.begin(prompt)
        outer = self

        class Heard(Chooser):
            compares = True

            def start(self) -> torch.Tensor:
                return inner.start()

            def computed(self, change: Change) -> torch.Tensor | None:
                answer = inner.computed(change)
                if change.layer == 1 and answer is not None:
                    outer.going_on = change.rows[answer]
                return answer

        return Heard()


def test_the_noise_of_a_source_reaches_the_policy() -> None:
    model = random_model("llama", changes=LAYERS)
    prompt = blendable(model, documents=(40, 40))
    generator = torch.Generator().manual_seed(0)
    loud: list[Any] = [
        tuple(part + 5 * torch.randn(part.shape, generator=generator) for part in prompt.sources[0].layer(index))
        for index in range(4)
    ]
    first = replace(prompt.sources[0], layer=of_layers(loud))
    counts = []
    for noise in (None, [(25.0, 25.0)] * 4):
        policy = Listening(HighDeviation(ratio=0.25))
        blend_prefill(model, prompt.ids, [replace(first, noise=noise), prompt.sources[1]], policy)
        counts.append(int((policy.going_on < first.stop).sum()))
    assert counts[0] > 1.5 * counts[1]


def test_tokens_that_do_not_match_are_computed_and_so_is_what_stands_behind_them() -> None:
    model = random_model("llama", changes=LAYERS)
    prompt = blendable(model)
    full, _ = full_prefill(model, prompt.ids)
    second = prompt.sources[1]
    joined = list(second.ids)
    joined[5] = joined[5] + 1 if joined[5] < 400 else joined[5] - 1  # as where two texts meet and one token comes out
    sources = [prompt.sources[0], replace(second, ids=joined), prompt.sources[2]]
    blended = blend_prefill(model, prompt.ids, sources, FirstK(tokens=1000))
    assert blended.report.mismatched_tokens == len(joined) - 5
    assert blended.report.fresh_tokens == 16 + len(joined) - 5
    torch.testing.assert_close(blended.logits, full, rtol=0, atol=1e-4)


def test_blended_kv_is_never_written_back() -> None:
    model = random_model("llama", changes=LAYERS)
    prompt = blendable(model)
    client = MemoryClient()
    connector = TransformersConnector(model, client, chunk_tokens=16, codec="raw", load_policy="always")
    blended = blend_prefill(model, prompt.ids, prompt.sources, Recommended())
    with pytest.raises(UnsupportedModelError, match="past_key_values"):
        connector.generate(torch.tensor([prompt.ids]), past_key_values=blended.cache, max_new_tokens=2)
    _, logits, report = connector.prefill(torch.tensor([prompt.ids]))
    assert report.reused_tokens == 0
    torch.testing.assert_close(logits, full_prefill(model, prompt.ids)[0], rtol=0, atol=1e-4)
