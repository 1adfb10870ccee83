"""Computing everything again gives what a prefill gives, computing nothing what plain concatenation gives: on every
family, rope and attention."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

from kvstore.connectors.blend.engine import Blended, blend_prefill
from kvstore.connectors.blend.policies.first_k import FirstK
from kvstore.connectors.blend.policies.hkvd import HighDeviation
from kvstore.connectors.blend.policies.none import Nothing
from kvstore.connectors.blend.policies.recommended import Recommended
from kvstore.connectors.blend.policy import Policy
from kvstore.connectors.blend.sources import Source, of_layers
from kvstore.testing.blending import Blendable, blendable, concatenated, full_prefill
from kvstore.testing.models import FAMILIES, ROPES, random_model

TOLERANCE = 1e-4
WINDOW = 20
WINDOWED = ("mistral", "qwen2", "qwen3")
LAYERS: dict[str, Any] = {"num_hidden_layers": 4}
EVERYTHING: tuple[Policy, ...] = (FirstK(tokens=1000), HighDeviation(ratio=1.0), Recommended(ratio=1.0))


def blend(model: Any, prompt: Blendable, policy: Policy, **options: Any) -> Blended:
    return blend_prefill(model, prompt.ids, prompt.sources, policy, **options)


def assert_caches_equal(one: Any, other: Any, tokens: int) -> None:
    for left, right in zip(one.layers, other.layers, strict=True):
        torch.testing.assert_close(left.keys[:, :, :tokens], right.keys[:, :, :tokens], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(left.values[:, :, :tokens], right.values[:, :, :tokens], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("family", "window"), [*((f, None) for f in FAMILIES), *((f, WINDOW) for f in WINDOWED)])
def test_ratio_one_is_a_full_prefill_and_ratio_zero_plain_concatenation(
    family: str, window: int | None, rope: str
) -> None:
    model = random_model(family, rope=rope, window=window)
    prompt = blendable(model)
    full, cache = full_prefill(model, prompt.ids, 3)
    for policy in EVERYTHING:
        blended = blend(model, prompt, policy, logits_tokens=3)
        torch.testing.assert_close(blended.logits, full, rtol=0, atol=TOLERANCE)
        assert_caches_equal(blended.cache, cache, len(prompt.ids))
        assert blended.report.token_share == 1.0
    plain = concatenated(model, prompt)
    assert (plain - full[-1:]).abs().max() > 100 * TOLERANCE  # the test can tell the two apart
    for policy in (Nothing(), HighDeviation(ratio=0.0), Recommended(ratio=0.0)):
        blended = blend(model, prompt, policy)
        torch.testing.assert_close(blended.logits, plain, rtol=0, atol=TOLERANCE)
        assert blended.report.token_share == 0.0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attention_implementations_give_the_same(attention: str) -> None:
    model = random_model("llama", changes=LAYERS)
    prompt = blendable(model)
    expected = blend(model, prompt, Recommended(ratio=0.3)).logits
    model.set_attn_implementation(attention)
    torch.testing.assert_close(blend(model, prompt, Recommended(ratio=0.3)).logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_near_a_full_prefill(dtype: torch.dtype) -> None:
    model = random_model("llama", dtype=dtype)
    prompt = blendable(model)
    full, _ = full_prefill(model, prompt.ids)
    blended = blend(model, prompt, FirstK(tokens=1000))
    assert blended.logits.dtype == dtype
    torch.testing.assert_close(blended.logits, full, rtol=0, atol=0.5)


def test_decoding_goes_on_as_on_a_full_prefill() -> None:
    model = random_model("qwen3", changes=LAYERS)
    prompt = blendable(model)
    ids = torch.tensor([prompt.ids])
    greedy: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **greedy)
    blended = blend(model, prompt, HighDeviation(ratio=1.0), headroom=3)  # so little that the cache has to grow
    token = blended.logits.argmax(-1, keepdim=True)
    rest = model.generate(torch.cat([ids, token], 1), past_key_values=blended.cache, max_new_tokens=7, do_sample=False)
    assert rest.tolist() == expected.tolist()


def test_an_exact_beginning_is_kept_and_what_follows_recomputed() -> None:
    model = random_model("llama", changes=LAYERS)
    prompt = blendable(model)
    full, cache = full_prefill(model, prompt.ids)
    stop = prompt.sources[0].start
    beginning: Any = [(layer.keys[0, :, :stop], layer.values[0, :, :stop]) for layer in cache.layers]
    sources = [Source(0, prompt.ids[:stop], of_layers(beginning), exact=True), *prompt.sources]
    blended = blend_prefill(model, prompt.ids, sources, FirstK(tokens=1000))
    torch.testing.assert_close(blended.logits, full, rtol=0, atol=TOLERANCE)
    assert (blended.report.exact_tokens, blended.report.fresh_tokens) == (stop, 7)


def test_a_layer_costs_what_its_rows_cost() -> None:
    model = random_model("llama", changes=LAYERS)
    prompt = blendable(model)
    widths: list[list[int]] = []
    for layer in model.base_model.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.gate_proj):
            module.register_forward_hook(lambda _m, args, _o: widths[-1].append(args[0].shape[1]))
    for policy, rows in ((Nothing(), [16] * 4), (HighDeviation(ratio=0.25, slope=0.5), [88, 88, 16 + 27, 16 + 9])):
        widths.append([])
        report = blend(model, prompt, policy).report
        assert widths[-1] == [width for width in rows for _ in range(3)]
        assert [moved + report.fresh_tokens for moved in report.moved_rows] == rows


def test_a_prompt_without_sources_is_a_full_prefill() -> None:
    model = random_model("mistral")
    prompt = blendable(model)
    full, _ = full_prefill(model, prompt.ids)
    for policy in (Nothing(), Recommended(), HighDeviation()):
        torch.testing.assert_close(blend_prefill(model, prompt.ids, [], policy).logits, full, rtol=0, atol=TOLERANCE)
