"""Plans of prompts: every token in exactly one span, what is best taken, nothing assumed, and what it should take."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.cost import CostModel
from kvstore.cost_rates import CostRates, PrefillRates, TierRates
from kvstore.keys import KeyScheme, Tokens
from kvstore.outcome import Lookup, Miss, Reason
from kvstore.sidecar import describe
from kvstore.span_index import SpanIndex
from kvstore.span_plan import PlanOptions, SpanPlan
from kvstore.span_planning import plan_prompt
from kvstore.spans import Document, Piece, cut
from kvstore.testing.client_plan import outline, put_document, put_prompt, sample_tokens, scheme
from kvstore.testing.memory_client import MemoryClient

PREFILL = PrefillRates(token_ms=1.0, pair_ms=0.01, call_ms=7.0)


def indexed(document: list[int], preamble: list[int], index: SpanIndex) -> list[Piece]:
    keys = scheme()
    pieces = cut(keys, document, preamble=preamble)
    for piece in pieces:
        index.add(describe(keys, piece, document, preamble))
    return pieces


def check(plan: SpanPlan, prompt: Tokens, keys: KeyScheme, client: MemoryClient) -> None:
    """What holds of every plan."""
    end = 0
    for span in plan.spans:
        assert span.start == end < span.stop
        end = span.stop
        assert (span.kind == "recompute") == (span.reason is not None) == (not span.keys)
        assert all(key in client.chunks for key in span.keys)
        assert len(span.tiers) == len(span.nbytes) == len(span.keys)
    assert end == len(prompt)
    assert plan.spans[-1].kind == "recompute"
    assert [place for place, span in enumerate(plan.spans) if span.kind == "prefix"] in ([], [0])
    if plan.spans[0].kind == "prefix":
        assert list(plan.spans[0].keys) == keys.chain(prompt)[: len(plan.spans[0].keys)]


FEW = st.lists(st.integers(0, 1), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_token_is_in_one_span_and_every_span_is_what_it_says(data: st.DataObject) -> None:
    keys, client, index = scheme(), MemoryClient(), SpanIndex()
    preamble = data.draw(st.lists(st.integers(0, 1), max_size=3))
    documents = data.draw(st.lists(FEW, max_size=3))
    for document in documents:
        put_document(client, document, preamble, sidecars=False)
        for piece in indexed(document, preamble, index):
            if data.draw(st.integers(0, 3)) == 0:
                client.chunks.pop(piece.key, None)
    prompt = list(preamble)
    given_documents = []
    for _ in range(data.draw(st.integers(0, 4))):
        prompt += data.draw(st.lists(st.integers(0, 1), max_size=5))
        if documents:
            document = data.draw(st.sampled_from(documents))
            own = data.draw(st.sampled_from([None, document, [*document[:-1], 9], [*document, 1], document[:5]]))
            if data.draw(st.booleans()):
                given_documents.append(Document(len(prompt), len(prompt) + len(document), own))
            prompt += document
    prompt += data.draw(st.lists(st.integers(0, 1), min_size=0 if prompt else 1, max_size=5))
    put_prompt(client, prompt[: data.draw(st.integers(0, 40))])
    prefill = data.draw(st.sampled_from([None, PREFILL]))
    tier = TierRates(data.draw(st.sampled_from([0.0, 30.0])), data.draw(st.sampled_from([0.0, 14.0, 50.0])), 0.0)
    options = PlanOptions(
        documents=given_documents,
        preamble_tokens=len(preamble),
        scan=data.draw(st.booleans()),
        any_preamble=data.draw(st.booleans()),
        recompute_share=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        rates=CostRates(prefill, {"memory": tier}),
    )
    plan = plan_prompt(client, index, prompt, keys, options)
    check(plan, prompt, keys, client)
    for span in plan.spans:
        if span.kind == "content":
            placed = [
                (piece, document[piece.start : piece.stop])
                for document in documents
                for piece in cut(keys, document, preamble=preamble)
                if piece.key == span.keys[0]
            ]
            piece, tokens = placed[0]
            assert prompt[span.start : span.stop] == tokens[: span.tokens]
            assert span.tokens == len(tokens) or span.stop == len(prompt) - 1
            assert span.position == piece.position
            before = piece.position - len(preamble)
            assert prompt[span.start - before : span.start] == placed_before(documents, piece, keys, preamble)
    if prefill is not None:
        assert plan.compute_ms is not None
        assert plan.prefill_ms is not None
        assert plan.load_ms is not None
        assert plan.load_ms + plan.compute_ms <= plan.prefill_ms + 1e-6


def placed_before(documents: list[list[int]], piece: Piece, keys: KeyScheme, preamble: list[int]) -> list[int]:
    """The tokens of the document before a piece."""
    for document in documents:
        if piece in cut(keys, document, preamble=preamble):
            return document[: piece.start]
    raise AssertionError("a piece of no document")


def test_a_piece_that_the_prefix_covers_in_part_is_recomputed_behind_it() -> None:
    client, document = MemoryClient(), sample_tokens(48, 1)
    put_document(client, document, [])
    prompt = [*document, *sample_tokens(20, 2)]
    assert outline(client.plan(prompt, scheme())) == [
        ("content", 0, 16),
        ("content", 16, 32),
        ("content", 32, 48),
        ("new", 48, 68),
    ]
    put_prompt(client, prompt[:16])
    assert outline(client.plan([5, *prompt], scheme()))[:2] == [("new", 0, 1), ("content", 1, 17)]
    moved = [*sample_tokens(8, 3), *document, 7, 8]
    put_prompt(client, moved[:16])
    assert outline(client.plan(moved, scheme())) == [
        ("prefix", 0, 16),
        ("overlap", 16, 24),
        ("content", 24, 40),
        ("content", 40, 56),
        ("new", 56, 58),
    ]


def test_of_documents_that_overlap_the_larger_part_is_taken() -> None:
    client = MemoryClient()
    one = sample_tokens(40, 1)
    two = [*one[36:], *sample_tokens(44, 2)]
    put_document(client, one, [])
    put_document(client, two, [])
    plan = client.plan([*one, *two[4:], 3], scheme())
    assert outline(plan) == [
        ("content", 0, 16),
        ("content", 16, 32),
        ("overlap", 32, 36),
        ("content", 36, 52),
        ("content", 52, 68),
        ("content", 68, 84),
        ("new", 84, 85),
    ]


def test_a_document_at_the_very_end_leaves_the_last_token() -> None:
    client, document = MemoryClient(), sample_tokens(17, 1)
    put_document(client, document, [])
    assert outline(client.plan([4, *document], scheme())) == [("new", 0, 1), ("content", 1, 17), ("last_token", 17, 18)]
    assert outline(client.plan([4, *document[:16]], scheme())) == [
        ("new", 0, 1),
        ("content", 1, 16),
        ("last_token", 16, 17),
    ]


def test_a_document_shorter_than_its_place_is_said_to_be_tokenised_differently() -> None:
    client, document = MemoryClient(), sample_tokens(16, 1)
    put_document(client, document, [])
    options = PlanOptions(documents=[Document(0, 20, document)])
    plan = client.plan([*document, *sample_tokens(10, 2)], scheme(), options)
    assert outline(plan) == [("content", 0, 16), ("tokenisation", 16, 20), ("new", 20, 26)]


def test_side_cars_that_lie_are_not_believed() -> None:
    keys, client, index = scheme(), MemoryClient(), SpanIndex()
    document = sample_tokens(16, 1)
    (piece,) = put_document(client, document, [])
    lie = msgspec.structs.replace(describe(keys, piece, document), tokens=np.arange(16, dtype="<u4").tobytes())
    assert index.add(lie)
    plan = plan_prompt(client, index, [*range(16), 5], keys, PlanOptions())
    assert outline(plan) == [("new", 0, 17)]


@pytest.mark.parametrize("preamble", [[], [1], [1, 2, 3, 4]])
def test_a_place_inside_the_preamble_is_no_place(preamble: list[int]) -> None:
    client, document = MemoryClient(), sample_tokens(16, 1)
    put_document(client, document, [1, 2])
    options = PlanOptions(preamble_tokens=len(preamble))
    plan = client.plan([*preamble, *document, 9], scheme(), options)
    assert ("preamble", len(preamble), len(preamble) + 16) in outline(plan)
    assert plan.reused_tokens == 0


class Scripted(MemoryClient):
    """A store that says what it is told to."""

    def __init__(self, found: Lookup) -> None:
        super().__init__()
        self.found = found

    def lookup(self, keys: Any) -> Lookup:
        return self.found


def test_a_store_that_does_not_answer_is_no_error() -> None:
    client = Scripted(Lookup((), Miss(Reason.UNAVAILABLE, "gone")))
    options = PlanOptions(rates=CostRates(PREFILL))
    plan = plan_prompt(client, None, list(range(40)), scheme(), options)
    assert outline(plan) == [("unavailable", 0, 40)]
    assert plan.miss == Miss(Reason.UNAVAILABLE, "gone")
    assert plan.compute_ms == plan.prefill_ms == 7 + 40 + 0.01 * 800


def test_a_store_that_does_not_know_sizes_is_believed_about_the_rest() -> None:
    client = Scripted(Lookup(("memory", "memory")))
    plan = plan_prompt(client, None, list(range(40)), scheme(), PlanOptions())
    assert outline(plan) == [("prefix", 0, 32), ("new", 32, 40)]
    assert plan.spans[0].nbytes == (0, 0)


def test_a_prefix_is_loaded_as_far_as_it_is_worth_it() -> None:
    client, prompt = MemoryClient(), sample_tokens(64, 1)
    put_prompt(client, prompt)
    # Loading takes as long for each chunk; computing takes longer the more there is before.
    prefill = PrefillRates(token_ms=0.0, pair_ms=1.0, call_ms=0.0)
    rates = CostRates(prefill, {"memory": TierRates(0.0, 400.0, 0.0)})
    assert outline(client.plan(prompt, scheme(), PlanOptions(rates=rates)))[0] == ("prefix", 0, 63)
    dear = CostRates(prefill, {"memory": TierRates(2000.0, 400.0, 0.0)})
    assert outline(client.plan(prompt, scheme(), PlanOptions(rates=dear))) == [
        ("not_worth_it", 0, 63),
        ("last_token", 63, 64),
    ]


def test_what_is_loaded_from_a_tier_must_be_worth_its_request() -> None:
    client, document = MemoryClient(), sample_tokens(32, 1)
    put_document(client, document, [])
    prompt = [4, *document, 5]
    saved = sum(PREFILL.tokens_ms(16, start) for start in (1, 17))
    for request_ms, reused in ((saved - 0.1, 32), (saved + 0.1, 0)):
        rates = CostRates(PREFILL, {"memory": TierRates(request_ms, 0.0, 0.0)})
        assert client.plan(prompt, scheme(), PlanOptions(rates=rates)).reused_tokens == reused
    rates = CostRates(PREFILL, {"memory": TierRates(saved - 0.1, 0.0, 0.0)})
    assert client.plan(prompt, scheme(), PlanOptions(rates=rates, recompute_share=0.5)).reused_tokens == 0


def test_rates_are_the_models() -> None:
    costs = CostModel()
    assert costs.rates() == CostRates()
    for tokens in (100, 200, 400):
        costs.observe_prefill(tokens=tokens, context=0, ms=5 + tokens)
        costs.observe_load("dram", nbytes=tokens * 1000, ms=1 + tokens * 0.1)
        costs.observe_decode("lossless", nbytes=tokens * 1000, ms=tokens * 0.01, tier="dram")
    rates = msgspec.json.decode(msgspec.json.encode(costs.rates()), type=CostRates)
    assert rates == costs.rates()
    line, request = costs.chunk("dram"), costs.load("dram")
    assert line is not None
    assert request is not None
    assert rates.load_ms("dram", 1000) == line.ms(1000)
    assert rates.request_ms("dram") == request.fixed_ms
    assert rates.prefill is not None
    assert rates.prefill.tokens_ms(300, 20) + rates.prefill.call_ms == pytest.approx(costs.prefill_ms(300, 20))
    assert rates.load_ms("nvme", 1) is None
    assert rates.request_ms("nvme") == 0
