"""Masks, moved keys, sources and batches, by property and by example."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.connectors.blend import registry
from kvstore.connectors.blend.batch import blend_batch
from kvstore.connectors.blend.engine import blend_prefill
from kvstore.connectors.blend.masks import additive, visible, windows
from kvstore.connectors.blend.moving import KeyMover, mover_of
from kvstore.connectors.blend.policies.recommended import Recommended
from kvstore.connectors.blend.prompt import Kind, assemble
from kvstore.connectors.blend.sources import KV, Source, of_layers
from kvstore.connectors.hf_spec import kv_spec
from kvstore.errors import SpecError, UnsupportedModelError
from kvstore.spec import KVSpec, Rope
from kvstore.testing.blending import blendable
from kvstore.testing.models import FAMILIES, ROPES, random_model

RANDOM = torch.Generator().manual_seed(5)


def nothing(layer: int) -> KV:
    return torch.zeros(0), torch.zeros(0)


@given(
    tokens=st.integers(1, 40),
    window=st.one_of(st.none(), st.integers(1, 50)),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_a_row_sees_the_places_up_to_its_own_within_the_window(
    tokens: int, window: int | None, data: st.DataObject
) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, tokens - 1), min_size=1)))
    seen = visible(torch.tensor(rows), tokens, window)
    for index, place in enumerate(rows):
        first = 0 if window is None else max(0, place - window + 1)
        assert torch.nonzero(seen[index])[:, 0].tolist() == list(range(first, place + 1))
    mask = additive(seen, torch.float32)[0, 0]
    assert torch.equal(mask == 0, seen)


def test_every_family_has_its_windows() -> None:
    found = {family: windows(random_model(family, window=20)) for family in ("mistral", "qwen2", "qwen3")}
    assert found == {"mistral": [20, 20], "qwen2": [None, 20], "qwen3": [None, 20]}
    assert all(windows(random_model(family)) == [None, None] for family in FAMILIES)


@pytest.mark.parametrize("rope", ROPES)
def test_scaled_rope_moves_to_what_the_model_computes_there(rope: str) -> None:
    model = random_model("llama", rope=rope)
    spec = kv_spec(model)
    keys = torch.randn(2, 9, 16, generator=RANDOM)
    heads: Any = model.base_model.rotary_emb

    def rotated(start: int) -> torch.Tensor:
        cosine, sine = heads(keys, torch.arange(start, start + 9)[None])
        first, second = keys.chunk(2, -1)
        turned: torch.Tensor = keys * cosine + torch.cat((-second, first), -1) * sine
        return turned

    for mover, tolerance in ((mover_of(model, spec), 3e-6), (KeyMover(spec), 1e-4)):
        for old, new in ((0, 700), (700, 0), (5, 6), (1500, 31)):
            moved = mover.move(rotated(old), torch.arange(old, old + 9), torch.arange(new, new + 9))
            torch.testing.assert_close(moved, rotated(new), rtol=0, atol=tolerance)


@given(old=st.integers(0, 2000), middle=st.integers(0, 2000), new=st.integers(0, 2000), dims=st.sampled_from([8, 16]))
@settings(deadline=None, max_examples=40)
def test_moves_add_up_keep_lengths_and_leave_what_is_not_rotated(old: int, middle: int, new: int, dims: int) -> None:
    rope = Rope(kind="default", theta=10000.0, dims=dims)
    mover = KeyMover(KVSpec(layers=1, kv_heads=1, key_dim=16, value_dim=16, dtype="float32", rope=rope))
    keys = torch.randn(1, 3, 16, generator=RANDOM)
    places = [torch.arange(3) + start for start in (old, middle, new)]
    direct = mover.move(keys, places[0], places[2])
    torch.testing.assert_close(
        mover.move(mover.move(keys, places[0], places[1]), places[1], places[2]), direct, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(direct.norm(dim=-1), keys.norm(dim=-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(direct[..., dims:], keys[..., dims:])
    assert mover.move(keys, places[0], places[0]) is keys


def test_keys_are_rounded_to_half_precision_once() -> None:
    model = random_model("llama", dtype=torch.bfloat16)
    keys = torch.randn(2, 5, 16, generator=RANDOM).bfloat16()
    mover = KeyMover(kv_spec(model))
    old, new = torch.arange(5), torch.arange(5) + 321
    moved = mover.move(keys, old, new)
    assert torch.equal(moved, mover.move(keys.float(), old, new).bfloat16())


@pytest.mark.parametrize("kind", ["none", "unknown"])
def test_keys_of_an_unknown_rope_are_not_moved(kind: Any) -> None:
    spec = KVSpec(layers=1, kv_heads=1, key_dim=16, value_dim=16, dtype="float32", rope=Rope(kind=kind, dims=16))
    with pytest.raises(UnsupportedModelError, match=kind):
        KeyMover(spec)


def test_a_prompt_knows_its_tokens() -> None:
    sources = [
        Source(0, [1, 2], nothing, exact=True),
        Source(4, [5, 6, 7], nothing, position=1, document=8),
        Source(7, [8], nothing, position=0, document=8),
        Source(8, [9], nothing, position=0),
    ]
    prompt = assemble(range(1, 12), sources, 2)
    assert prompt.kind.tolist() == [Kind.EXACT] * 2 + [Kind.FRESH] * 2 + [Kind.MOVED] * 5 + [Kind.FRESH] * 2
    assert prompt.document.tolist() == [0, 0, -1, -1, 1, 1, 1, 1, 2, -1, -1]
    assert torch.nonzero(prompt.query)[:, 0].tolist() == [9, 10]
    assert torch.nonzero(prompt.first_of_documents(2, skip_first=True))[:, 0].tolist() == [4, 5, 8]
    assert [prompt.budget(ratio) for ratio in (0.0, 0.2, 0.21, 1.0)] == [0, 1, 2, 5]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([Source(0, [1, 2, 3], nothing), Source(2, [3], nothing)], "overlap at token 2"),
        ([Source(3, [4, 5, 6], nothing)], "ends at 6, the prompt at 5"),
        ([Source(2, [3], nothing, exact=True)], "does not follow an exact beginning"),
    ],
)
def test_sources_that_do_not_fit_are_refused(sources: list[Source], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        assemble([1, 2, 3, 4, 5], sources, 2)


def test_bad_sources_and_prompts_are_refused() -> None:
    with pytest.raises(SpecError, match="ids empty"):
        Source(0, [], nothing)
    with pytest.raises(SpecError, match="exact KV stands where it was computed"):
        Source(0, [1], nothing, exact=True, position=4)
    with pytest.raises(SpecError, match="no tokens"):
        assemble([], [], 2)
    model = random_model("llama")
    with pytest.raises(SpecError, match="one prompt"):
        blend_prefill(model, torch.zeros((2, 3), dtype=torch.long), [], Recommended())
    with pytest.raises(SpecError, match="logits_tokens is 4"):
        blend_prefill(model, [1, 2, 3], [], Recommended(), logits_tokens=4)
    wrong = Source(0, [1, 2], of_layers([(torch.zeros(2, 2, 8), torch.zeros(2, 2, 16))] * 2), position=1)
    with pytest.raises(SpecError, match=r"K of shape \(2, 2, 8\) for layer 0"):
        blend_prefill(model, [1, 2, 3], [wrong], Recommended())


def test_a_wrong_token_in_an_exact_beginning_ends_what_is_exact() -> None:
    sources = [Source(0, [1, 9, 3], nothing, exact=True), Source(3, [4, 5], nothing, exact=True)]
    prompt = assemble([1, 2, 3, 4, 5, 6], sources, 2)
    assert prompt.kind.tolist() == [Kind.EXACT] + [Kind.FRESH] * 5
    assert prompt.mismatched == 4


def test_layers_are_asked_for_in_order_and_no_sooner_than_they_are_needed() -> None:
    model = random_model("llama", changes={"num_hidden_layers": 3})
    prompt = blendable(model)
    happened: list[str] = []
    for index, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *_, index=index: happened.append(f"computed {index}"))
    source = prompt.sources[0]

    def slow(index: int) -> KV:
        happened.append(f"asked {index}")
        return source.layer(index)

    first = Source(source.start, source.ids, slow, position=source.position)
    blend_prefill(model, prompt.ids, [first, *prompt.sources[1:]], Recommended())
    scout = [step for index in range(3) for step in (f"asked {index}", f"computed {index}")]
    assert happened == scout + [f"computed {index}" for index in range(3)]


def test_a_source_that_fails_leaves_the_model_as_it_was() -> None:
    model = random_model("llama")
    prompt = blendable(model)
    source = prompt.sources[0]

    def failing(index: int) -> KV:
        if index == 1:
            raise LookupError("gone")
        return source.layer(index)

    broken = Source(source.start, source.ids, failing, position=source.position)
    for policy in registry.POLICIES:
        with pytest.raises(LookupError, match="gone"):
            blend_prefill(model, prompt.ids, [broken, *prompt.sources[1:]], registry.get(policy))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_batch_gives_what_its_rows_give_one_by_one() -> None:
    model = random_model("qwen3", window=20, changes={"num_hidden_layers": 4})
    model.config.layer_types = ["full_attention", "sliding_attention"] * 2
    prompts = [blendable(model, seed=0), blendable(model, documents=(12,), prefix=0, seed=1), blendable(model, seed=2)]
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros((3, width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, width - len(prompt.ids) :] = 1
    batch = blend_batch(model, ids, mask, [prompt.sources for prompt in prompts], Recommended(ratio=0.3))
    greedy: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    chosen = batch.logits.argmax(-1, keepdim=True)
    longer = torch.cat([mask, torch.ones_like(chosen)], 1)
    rest = model.generate(
        torch.cat([ids, chosen], 1), attention_mask=longer, past_key_values=batch.cache, pad_token_id=0, **greedy
    )
    for row, prompt in enumerate(prompts):
        alone = blend_prefill(model, prompt.ids, prompt.sources, Recommended(ratio=0.3))
        torch.testing.assert_close(batch.logits[row], alone.logits[0], rtol=0, atol=1e-4)
        assert batch.reports[row] == alone.report
        token = alone.logits.argmax(-1, keepdim=True)
        again = model.generate(
            torch.cat([torch.tensor([prompt.ids]), token], 1), past_key_values=alone.cache, pad_token_id=0, **greedy
        )
        assert rest[row, width:].tolist() == again[0, len(prompt.ids) :].tolist()
    with pytest.raises(SpecError, match="3 prompts and 1 lists"):
        blend_batch(model, ids, mask, [[]], Recommended())
