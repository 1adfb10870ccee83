"""The part of the client suite that is about plans: prefixes, documents at any place, reasons, many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kvstore.chunk_put import chunk_put
from kvstore.client import Client, PutChunk
from kvstore.codecs import registry
from kvstore.container import FLAG_CONTENT_KEY, ChunkMeta
from kvstore.cost_rates import CostRates, PrefillRates, TierRates
from kvstore.errors import ConfigError, SpecError
from kvstore.keys import KeyScheme
from kvstore.outcome import Reason
from kvstore.sidecar import describe, put_sidecar
from kvstore.span_plan import PlanOptions, SpanPlan
from kvstore.spans import Document, Piece, SpanReason, cut
from kvstore.testing.chunks import FINGERPRINT, sample_container, sample_kv, sample_spec
from kvstore.testing.client_harness import ClientHarness, put_chunk

CHUNK_TOKENS = 16
PREAMBLE = [1, 2, 3]


def scheme(**settings: Any) -> KeyScheme:
    """The sample model's key scheme."""
    return KeyScheme(FINGERPRINT, **{"chunk_tokens": CHUNK_TOKENS, **settings})


def sample_tokens(count: int, seed: int) -> list[int]:
    """Token ids that no other seed has in the same order."""
    return [int(token) for token in np.random.default_rng(seed).integers(10, 1 << 32, count)]


def put_document(
    client: Client,
    document: Sequence[int],
    preamble: Sequence[int] = PREAMBLE,
    *,
    keys: KeyScheme | None = None,
    sidecars: bool = True,
) -> list[Piece]:
    """Store a document as a connector does: a container and a side-car for each piece."""
    keys = keys or scheme()
    pieces = cut(keys, document, preamble=preamble)
    puts = []
    for piece in pieces:
        puts.append(_content_chunk(piece))
        if sidecars:
            puts.append(put_sidecar(describe(keys, piece, document, preamble), keys.fingerprint))
    assert all(status.stored for status in client.put(puts))
    return pieces


def _content_chunk(piece: Piece) -> PutChunk:
    spec, codec, tokens = sample_spec(), registry.get("raw"), piece.stop - piece.start
    meta = ChunkMeta(
        fingerprint=FINGERPRINT,
        key=piece.key,
        spec=spec,
        tokens=tokens,
        parent=piece.parent,
        first_position=piece.position,
        flags=FLAG_CONTENT_KEY,
    )
    arrays = spec.arrays(sample_kv(spec, tokens, seed=piece.start), tokens)
    return chunk_put(codec, meta, lambda: arrays)


def put_prompt(client: Client, tokens: Sequence[int], keys: KeyScheme | None = None) -> list[bytes]:
    """Store the full chunks of a prompt; answers their keys."""
    chain = (keys or scheme()).chain(tokens)
    puts = [put_chunk(key, sample_container(key, tokens=CHUNK_TOKENS)) for key in chain]
    assert all(status.stored for status in client.put(puts))
    return chain


def outline(plan: SpanPlan) -> list[tuple[str, int, int]]:
    """Kind, or reason, and place of each span."""
    return [(str(span.reason or span.kind), span.start, span.stop) for span in plan.spans]


class PlanContract(ClientHarness):
    """What `Client.plan` and `Client.plan_batch` promise."""

    def test_what_nobody_knows_is_recomputed(self, client: Client) -> None:
        for tokens in ([7], sample_tokens(100, 1)):
            plan = client.plan(tokens, scheme())
            assert outline(plan) == [("new", 0, len(tokens))]
            assert plan.miss is None
            assert plan.reused_tokens == 0

    def test_a_prefix_comes_first_and_the_last_token_is_computed(self, client: Client) -> None:
        prompt = sample_tokens(64, 1)
        chain = put_prompt(client, prompt[:32])
        assert outline(client.plan(prompt, scheme())) == [("prefix", 0, 32), ("new", 32, 64)]
        (span, rest) = client.plan(prompt[:32], scheme()).spans
        assert (span.stop, span.keys, rest.reason) == (31, tuple(chain), SpanReason.LAST_TOKEN)
        assert len(span.tiers) == 2
        assert all(span.nbytes)

    def test_documents_are_loaded_where_the_caller_says_they_are(self, client: Client) -> None:
        one, two = sample_tokens(40, 2), sample_tokens(20, 3)
        pieces = [*put_document(client, one, sidecars=False), *put_document(client, two, sidecars=False)]
        prompt = [*PREAMBLE, *two, 8, 9, *one, 10, 11]
        documents = [Document(3, 23), Document(25, 65)]
        plan = client.plan(prompt, scheme(), PlanOptions(documents=documents, preamble_tokens=3))
        assert outline(plan) == [
            ("new", 0, 3),
            ("content", 3, 19),
            ("content", 19, 23),
            ("new", 23, 25),
            ("content", 25, 41),
            ("content", 41, 57),
            ("content", 57, 65),
            ("new", 65, 67),
        ]
        found = [(span.keys[0], span.position) for span in plan.spans if span.kind == "content"]
        assert found == [(piece.key, piece.position) for piece in [*pieces[3:], *pieces[:3]]]
        assert plan.reused_tokens == 60

    def test_documents_are_found_at_any_offset(self, client: Client) -> None:
        documents = [sample_tokens(40, seed) for seed in range(4)]
        for document in documents:
            put_document(client, document)
        prompt = list(PREAMBLE)
        expected = []
        for gap, document in zip((0, 1, 5, 23), reversed(documents), strict=True):
            prompt += sample_tokens(gap, 100 + gap)
            expected += [(len(prompt) + start, len(prompt) + min(40, start + 16)) for start in (0, 16, 32)]
            prompt += document
        prompt += [5, 6]
        options = PlanOptions(preamble_tokens=3)
        plan = client.plan(prompt, scheme(), options)
        assert [(span.start, span.stop) for span in plan.spans if span.kind == "content"] == expected
        without = client.plan(prompt, scheme(), PlanOptions(preamble_tokens=3, scan=False))
        assert outline(without) == [("new", 0, len(prompt))]

    def test_a_piece_without_those_before_it_is_not_used(self, client: Client) -> None:
        document = sample_tokens(48, 5)
        pieces = put_document(client, document)
        options = PlanOptions(preamble_tokens=3)
        cut_off = [*PREAMBLE, *document[16:], 4]
        assert outline(client.plan(cut_off, scheme(), options)) == [("new", 0, len(cut_off))]
        client.delete([pieces[1].key])  # its text is computed instead, so what comes behind it may be used
        prompt = [*PREAMBLE, *document, 4]
        assert outline(client.plan(prompt, scheme(), options)) == [
            ("new", 0, 3),
            ("content", 3, 19),
            ("absent", 19, 35),
            ("content", 35, 51),
            ("new", 51, 52),
        ]

    def test_a_document_that_is_tokenised_differently_is_recomputed_from_there_on(self, client: Client) -> None:
        document = sample_tokens(40, 6)
        put_document(client, document, sidecars=False)
        here = [*document[:38], 77, 78]
        prompt = [*PREAMBLE, *here, 4]
        options = PlanOptions(documents=[Document(3, 43, document)], preamble_tokens=3)
        expected = [("new", 0, 3), ("content", 3, 19), ("content", 19, 35), ("tokenisation", 35, 43), ("new", 43, 44)]
        assert outline(client.plan(prompt, scheme(), options)) == expected

    def test_another_preamble_is_a_reason_or_said_in_the_span(self, client: Client) -> None:
        document = sample_tokens(32, 7)
        pieces = put_document(client, document, preamble=[9, 9])
        prompt = [*PREAMBLE, *document, 4]
        options = PlanOptions(preamble_tokens=3)
        assert outline(client.plan(prompt, scheme(), options)) == [("new", 0, 3), ("preamble", 3, 35), ("new", 35, 36)]
        plan = client.plan(prompt, scheme(), PlanOptions(preamble_tokens=3, any_preamble=True))
        found = [(span.keys[0], span.position, span.preamble_matches) for span in plan.spans if span.kind == "content"]
        assert found == [(piece.key, piece.position, False) for piece in pieces]

    def test_models_and_tenants_share_nothing(self, client: Client) -> None:
        document = sample_tokens(40, 8)
        put_document(client, document, keys=scheme(salt=b"a", extras={"image": b"\xff", "n": 3}))
        prompt = [*PREAMBLE, *document, 4]
        options = PlanOptions(preamble_tokens=3, documents=[Document(3, 43)])
        for keys in (scheme(), scheme(salt=b"b"), scheme(salt=b"a"), KeyScheme(bytes(32), chunk_tokens=16)):
            plan = client.plan(prompt, keys, options)
            assert outline(plan) == [("new", 0, 3), ("absent", 3, 43), ("new", 43, 44)]
            assert client.plan(prompt, keys, PlanOptions(preamble_tokens=3)).reused_tokens == 0
        same = scheme(salt=b"a", extras={"n": 3, "image": b"\xff"})
        assert client.plan(prompt, same, PlanOptions(preamble_tokens=3)).reused_tokens == 40

    def test_what_takes_longer_to_load_than_to_compute_is_computed(self, client: Client) -> None:
        document = sample_tokens(32, 9)
        pieces = put_document(client, document)
        prompt = [*PREAMBLE, *document, 4]
        prefill = PrefillRates(token_ms=1.0, pair_ms=0.0, call_ms=5.0)
        (tier,) = {tier for info in client.head([pieces[0].key]) if info is not None for tier in info.tiers[:1]}
        slow = CostRates(prefill, {tier: TierRates(request_ms=0.0, chunk_ms=17.0, byte_ms=0.0)})
        quick = CostRates(prefill, {tier: TierRates(request_ms=1.0, chunk_ms=2.0, byte_ms=0.0)})
        plan = client.plan(prompt, scheme(), PlanOptions(preamble_tokens=3, rates=slow))
        assert outline(plan) == [("new", 0, 3), ("not_worth_it", 3, 35), ("new", 35, 36)]
        plan = client.plan(prompt, scheme(), PlanOptions(preamble_tokens=3, rates=quick))
        assert plan.reused_tokens == 32
        assert (plan.load_ms, plan.compute_ms, plan.prefill_ms) == (5.0, 9.0, 41.0)

    def test_mistakes_in_a_plan_raise(self, client: Client) -> None:
        prompt = sample_tokens(50, 1)
        for options in (
            {"documents": [Document(60, 70)]},
            {"documents": [Document(40, 51)]},
            {"preamble_tokens": 51},
            {"context_tokens": 49},
        ):
            with pytest.raises(ConfigError, match=r"50 tokens"):
                client.plan(prompt, scheme(), PlanOptions(**options))
        with pytest.raises(ConfigError, match="tokens is empty"):
            client.plan([], scheme())
        with pytest.raises(SpecError, match="token ids"):
            client.plan([-1], scheme())

    def test_the_prefixes_that_prompts_share(self, client: Client) -> None:
        system, one, two = sample_tokens(32, 1), sample_tokens(20, 2), sample_tokens(33, 3)
        put_prompt(client, [*system, *two[:16]])
        prompts = [[*system, *one], sample_tokens(5, 4), [*system, *two], [*system, *one, 5]]
        plan = client.plan_batch(prompts, scheme())
        assert plan.order == (1, 0, 3, 2)
        assert [(node.parent, node.start, node.stop, node.shared_by) for node in plan.nodes] == [
            (None, 0, 32, 3),
            (0, 32, 48, 2),
            (0, 32, 64, 1),
        ]
        assert [node.stored for node in plan.nodes] == [2, 0, 1]
        assert plan.computed_tokens == (16 + 4 + 5) + 5 + (16 + 1)

    def test_a_plan_after_closing_recomputes(self, client: Client) -> None:
        document = sample_tokens(32, 9)
        put_document(client, document)
        client.close()
        plan = client.plan([*PREAMBLE, *document], scheme(), PlanOptions(preamble_tokens=3))
        assert plan.reused_tokens == 0
        assert plan.miss is None or plan.miss.reason is Reason.UNAVAILABLE
