"""Documents reused through a store: found, moved, blended, reported; and prompts without them as ever."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

pytest.importorskip("transformers")

import torch
from transformers import PreTrainedModel

from kvstore.client import Client
from kvstore.connector import ReuseReport
from kvstore.connectors.blend.compiling import compile_span
from kvstore.connectors.blend.connector import BlendConnector
from kvstore.connectors.blend.engine import blend_prefill
from kvstore.connectors.blend.outcomes import BlendedReport
from kvstore.connectors.blend.policies.first_k import FirstK
from kvstore.connectors.blend.policies.parallel import Parallel
from kvstore.connectors.blend.policies.recommended import Recommended
from kvstore.connectors.blend.policy import Policy
from kvstore.connectors.blend.sources import Source, of_layers
from kvstore.connectors.model_identity import identify
from kvstore.errors import ConfigError, SpecError
from kvstore.keys import KeyScheme
from kvstore.spans import Document, cut
from kvstore.testing.blend_pass import BAD, blend_record
from kvstore.testing.connector import CHUNK_TOKENS, PATIENT_MS, ConnectorContract, Logits
from kvstore.testing.memory_client import FaultyClient, MemoryClient
from kvstore.testing.models import random_model, random_prompt

CHUNK = 16
PREAMBLE = random_prompt(6, 99)[0].tolist()
DOCUMENTS = [random_prompt(tokens, 50 + tokens)[0].tolist() for tokens in (40, 23, 32)]
QUERY = random_prompt(9, 98)[0].tolist()
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("llama", changes={"num_hidden_layers": 3})


def blending(model: Any, client: Client, *, policy: Policy | None = None, **options: Any) -> BlendConnector:
    policy = policy or Recommended(ratio=0.3)
    _, fingerprint = identify(model)
    settings = {"chunk_tokens": CHUNK, "codec": "raw", "preamble": PREAMBLE, "load_policy": "always", **options}
    return BlendConnector(model, client, policy=policy, blend_gates=[blend_record(fingerprint, policy)], **settings)


def prompt_of(order: tuple[int, ...] = (0, 1, 2), between: int = 0) -> list[int]:
    ids = list(PREAMBLE)
    for index in order:
        ids += [*random_prompt(between, 7 + index)[0].tolist(), *DOCUMENTS[index]] if between else DOCUMENTS[index]
    return ids + QUERY


def used(report: BlendedReport, kind: str) -> list[tuple[int, int]]:
    return [(span.start, span.stop) for span in report.spans if span.kind == kind]


def expected(model: Any, ids: list[int], order: tuple[int, ...], policy: Policy) -> torch.Tensor:
    """The same blend with KV that never was in a store."""
    sources, at = [], len(PREAMBLE)
    for index in order:
        own = DOCUMENTS[index]
        sources.append(Source(at, own, of_layers(compile_span(model, PREAMBLE, own)), position=len(PREAMBLE)))
        at += len(own)
    return blend_prefill(model, ids, sources, policy).logits


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_documents_are_found_moved_and_blended(model: Any, codec: str, pipelined: bool) -> None:
    client = MemoryClient()
    connector = blending(model, client, codec=codec, pipelined=pipelined)
    for document in DOCUMENTS:
        stored = connector.store_document(document)
        assert (stored.chunks, stored.failures) == (-(-len(document) // CHUNK), {})
    order = (2, 0, 1)
    ids = prompt_of(order)
    _, logits, report = connector.prefill(torch.tensor([ids]))
    torch.testing.assert_close(logits, expected(model, ids, order, Recommended(ratio=0.3)), rtol=0, atol=TOLERANCE)
    moved = sum(map(len, DOCUMENTS))
    assert report.blend is not None
    assert (report.blend.moved_tokens, report.reused_tokens, report.computed_tokens) == (
        moved, moved, len(ids) - moved
    )  # fmt: skip
    assert used(report, "content")[0] == (len(PREAMBLE), len(PREAMBLE) + CHUNK)
    assert report.loaded_chunks == len(used(report, "content")) == 7
    assert (report.ratio, report.discarded_runs) == (0.3, 0)


def test_ratio_one_is_what_the_model_alone_computes(model: Any) -> None:
    connector = blending(model, MemoryClient(), policy=FirstK(tokens=1000))
    for document in DOCUMENTS:
        connector.store_document(document)
    ids = prompt_of(between=5)
    with torch.no_grad():
        alone = model(torch.tensor([ids])).logits[:, -1]
    _, logits, report = connector.prefill(torch.tensor([ids]))
    assert report.blend is not None
    torch.testing.assert_close(logits, alone, rtol=0, atol=TOLERANCE)


def test_generating_goes_on_over_blended_rows(model: Any) -> None:
    connector = blending(model, MemoryClient(), policy=FirstK(tokens=1000))
    for document in DOCUMENTS:
        connector.store_document(document)
    prompts = [prompt_of((1, 0)), prompt_of((2,)), random_prompt(30, 3)[0].tolist()]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(own)) + own for own in prompts])
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompts])
    greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    alone = model.generate(ids, attention_mask=mask, **greedy)
    sequences, reports = connector.generate(ids, mask, **greedy)
    assert sequences.tolist() == alone.tolist()
    assert [report.blend is not None for report in reports] == [True, True, False]


def test_only_what_is_exact_is_stored_of_a_blended_prompt(model: Any) -> None:
    """Whatever is in the store after blending is what a store that never blended would have under these keys."""
    client = MemoryClient()
    connector = blending(model, client, store_documents=True)
    connector.store_document(DOCUMENTS[0])
    ids = [*PREAMBLE, *random_prompt(2 * CHUNK, 5)[0].tolist(), *DOCUMENTS[0], *random_prompt(3 * CHUNK, 6)[0].tolist()]
    before = dict(client.chunks)
    start = len(PREAMBLE) + 2 * CHUNK
    greedy: dict[str, Any] = {"max_new_tokens": 2 * CHUNK, "min_new_tokens": 2 * CHUNK, "do_sample": False}
    _, (report,) = connector.generate(
        torch.tensor([ids]), documents=[[Document(start, start + len(DOCUMENTS[0]))]], **greedy
    )
    assert report.blend is not None
    new = [key for key in client.chunks if key not in before]
    _, fingerprint = identify(model)
    keys = KeyScheme(fingerprint, chunk_tokens=CHUNK)
    assert new == keys.chain(ids)[: start // CHUNK]  # two chunks before the document, none behind, none generated
    assert {key: client.chunks[key] for key in before} == before
    plain = MemoryClient()
    blending(model, plain).prefill(torch.tensor([ids[:start]]))
    assert all(client.chunks[key] == plain.chunks[key] for key in new)


def test_a_document_that_is_not_known_is_computed_and_stored_from_a_run_of_its_own(model: Any) -> None:
    client, apart = MemoryClient(), MemoryClient()
    connector = blending(model, client, store_documents=True)
    connector.store_document(DOCUMENTS[0])
    ids = prompt_of((0, 1))
    first = len(PREAMBLE) + len(DOCUMENTS[0])
    documents = [Document(len(PREAMBLE), first), Document(first, first + len(DOCUMENTS[1]))]
    _, _, report = connector.prefill(torch.tensor([ids]), documents=documents)
    assert [span.reason for span in report.spans if span.kind == "recompute" and span.start == first] == ["absent"]
    assert (report.documents.chunks, report.documents.existed) == (2, 3)
    blending(model, apart).store_document(DOCUMENTS[1])
    assert all(client.chunks[key] == data for key, data in apart.chunks.items())
    _, _, again = connector.prefill(torch.tensor([ids]), documents=documents)
    assert again.blend is not None
    assert again.blend.moved_tokens == len(DOCUMENTS[0]) + len(DOCUMENTS[1])


def test_a_stored_prefix_comes_first_and_documents_behind_it(model: Any) -> None:
    connector = blending(model, MemoryClient())
    ids = [*PREAMBLE, *random_prompt(3 * CHUNK - len(PREAMBLE), 5)[0].tolist()]
    connector.prefill(torch.tensor([ids]))
    connector.store_document(DOCUMENTS[2])
    _, _, report = connector.prefill(torch.tensor([[*ids, *DOCUMENTS[2], *QUERY]]))
    assert used(report, "prefix") == [(0, 3 * CHUNK)]
    assert used(report, "content") == [(48, 64), (64, 80)]
    assert report.blend is not None
    assert report.blend.exact_tokens == 3 * CHUNK


def test_a_prompt_with_another_preamble_reuses_nothing(model: Any) -> None:
    connector = blending(model, MemoryClient())
    connector.store_document(DOCUMENTS[0])
    ids = [*reversed(PREAMBLE), *DOCUMENTS[0], *QUERY]
    _, logits, report = connector.prefill(torch.tensor([ids]))
    assert report.blend is None
    assert "preamble" in {span.reason for span in report.spans}
    with torch.no_grad():
        torch.testing.assert_close(logits, model(torch.tensor([ids])).logits[:, -1], rtol=0, atol=TOLERANCE)


def test_text_tokenised_differently_is_recomputed_from_the_first_difference(model: Any) -> None:
    connector = blending(model, MemoryClient())
    connector.store_document(DOCUMENTS[2])
    ids = prompt_of((2,))
    start, stop = len(PREAMBLE), len(PREAMBLE) + len(DOCUMENTS[2])
    ids[start + CHUNK + 3] += 1  # as if the tokeniser had merged here
    _, _, report = connector.prefill(torch.tensor([ids]), documents=[Document(start, stop, tokens=DOCUMENTS[2])])
    assert used(report, "content") == [(start, start + CHUNK)]
    assert (start + CHUNK, "tokenisation") in {(span.start, span.reason) for span in report.spans}


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([Document(6, 20), Document(19, 30)], "before documents.0. ends"),
        ([Document(6, 6)], "is empty"),
        ([Document(6, 4000)], "ends at 4000"),
        ([Document(2, 20)], "before the preamble ends"),
    ],
)
def test_documents_that_do_not_fit_are_refused_by_name(model: Any, documents: list[Document], message: str) -> None:
    connector = blending(model, MemoryClient())
    with pytest.raises(ConfigError, match=message):
        connector.prefill(torch.tensor([prompt_of()]), documents=documents)
    with pytest.raises(ConfigError, match=message):
        connector.generate(torch.tensor([prompt_of()]), documents=[documents])


def test_other_mistakes_are_refused_by_name(model: Any) -> None:
    connector = blending(model, MemoryClient())
    with pytest.raises(ConfigError, match="document is empty"):
        connector.store_document([])
    with pytest.raises(ConfigError, match="no room"):
        connector.store_document([1] * (model.config.max_position_embeddings + 1))
    with pytest.raises(ConfigError, match="the model's context has"):
        connector.prefill(torch.tensor([[1] * (model.config.max_position_embeddings + 1)]))
    with pytest.raises(SpecError, match="lists of documents"):
        connector.generate(torch.tensor([prompt_of()]), documents=[[], []])
    with pytest.raises(ConfigError, match="parallel"):
        blending(model, MemoryClient(), policy=Parallel())
    with pytest.raises(ConfigError, match="on_refusal"):
        blending(model, MemoryClient(), on_refusal="ignore")


def test_blending_without_a_pass_is_refused_with_the_command_that_gets_one(model: Any) -> None:
    _, fingerprint = identify(model)
    options: dict[str, Any] = {"chunk_tokens": CHUNK, "codec": "raw", "preamble": PREAMBLE}
    with pytest.raises(ConfigError, match="has not been measured on model .*kvstore gate --blend"):
        BlendConnector(model, MemoryClient(), blend_gates=[], **options)
    bad = blend_record(fingerprint, Recommended(), metrics=BAD)
    with pytest.raises(ConfigError, match="fails the quality gate .*KL nats 2, at most 0.05"):
        BlendConnector(model, MemoryClient(), blend_gates=[bad], **options)
    connector = BlendConnector(model, MemoryClient(), blend_gates=[bad], on_refusal="compute", **options)
    connector.store_document(DOCUMENTS[0])
    _, _, report = connector.prefill(torch.tensor([prompt_of((0,))]))
    assert report.blend is None
    assert "fails the quality gate" in report.detail


def test_a_changed_model_needs_a_pass_of_its_own() -> None:
    model = random_model("llama", seed=5)
    connector = blending(model, MemoryClient())
    connector.store_document(DOCUMENTS[0])
    assert connector.prefill(torch.tensor([prompt_of((0,))]))[2].blend is not None
    with torch.no_grad():
        model.base_model.layers[0].mlp.up_proj.weight.mul_(1.5)
    connector.store_document(DOCUMENTS[0])
    report = connector.prefill(torch.tensor([prompt_of((0,))]))[2]
    assert report.blend is None
    assert "has not been measured" in report.detail


class Prefill(ConnectorContract):
    """Prompts without documents: the contract of every connector."""

    model: ClassVar[PreTrainedModel]

    def run(
        self, client: Client, tokens: list[int], *, load_deadline_ms: float = PATIENT_MS
    ) -> tuple[Logits, ReuseReport]:
        connector = blending(self.model, client, chunk_tokens=CHUNK_TOKENS, load_deadline_ms=load_deadline_ms)
        _, logits, report = connector.prefill(torch.tensor([tokens]))
        return logits[0].numpy(), report

    def without_store(self, tokens: list[int]) -> Logits:
        with torch.no_grad():
            logits: Logits = self.model(torch.tensor([tokens])).logits[0, -1].numpy()
        return logits


class TestContract(Prefill):
    model = random_model("llama")

    def test_a_prompt_shorter_than_a_chunk_does_not_ask_the_store(self, tokens: list[int]) -> None:
        """Here it asks: a document may be shorter than a chunk. But it fetches nothing."""
        client = FaultyClient()
        logits, _ = self.run(client, tokens[: CHUNK_TOKENS - 1])
        self.check_logits(logits, tokens[: CHUNK_TOKENS - 1])
        assert "fetch" not in client.calls


def test_pieces_are_those_of_the_store_s_planner(model: Any) -> None:
    client = MemoryClient()
    blending(model, client).store_document(DOCUMENTS[0])
    _, fingerprint = identify(model)
    pieces = cut(KeyScheme(fingerprint, chunk_tokens=CHUNK), DOCUMENTS[0], preamble=PREAMBLE)
    assert [piece.key in client.chunks for piece in pieces] == [True] * 3
