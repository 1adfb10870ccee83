"""Blending in vLLM, both sides over a store: what lands in a request's blocks, and what is done when it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

from kvstore.chunk import decode_chunk, encode_chunk, encoded_bytes_max
from kvstore.client import Part
from kvstore.codecs import registry
from kvstore.connectors.vllm.blend_planning import BlendPlanner
from kvstore.connectors.vllm.blend_plans import Plan
from kvstore.connectors.vllm.blend_settings import SALT_PREFIX
from kvstore.container import ChunkMeta, parse
from kvstore.keys import ROOT
from kvstore.outcome import Reason
from kvstore.testing.blending import full_prefill
from kvstore.testing.chunks import FINGERPRINT
from kvstore.testing.memory_client import MemoryClient
from kvstore.testing.models import random_model
from kvstore.testing.vllm_blend import BLOCK, CHUNK, BlendEngine, FakeBlendRequest

PREAMBLE = list(range(20, 26))
DOCUMENTS = [list(range(100, 119)), list(range(200, 208)), list(range(300, 311))]
QUERY = [7, 8, 9]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("llama", changes={"num_hidden_layers": 3})


class Engines:
    """Makes engines that end with the test; their documents are stored already."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.store = MemoryClient()
        self.made: list[BlendEngine] = []

    def make(self, policy: str = "recommended", *, stored: bool = True, **more: Any) -> BlendEngine:
        engine = BlendEngine(self.model, self.store, policy, **more)
        self.made.append(engine)
        if stored:
            for document in DOCUMENTS:
                engine.store_document(PREAMBLE, document)
        return engine


@pytest.fixture
def engines(model: Any) -> Iterator[Engines]:
    made = Engines(model)
    yield made
    for engine in made.made:
        engine.close()


def request(name: str = "r", order: tuple[int, ...] = (2, 0, 1), **fields: Any) -> FakeBlendRequest:
    """Documents behind the preamble and three tokens of this prompt's own."""
    ids, places = [*PREAMBLE, 1, 2, 3], []
    for index in order:
        places.append([len(ids), len(ids) + len(DOCUMENTS[index])])
        ids = ids + DOCUMENTS[index]
    wish = {"kvstore": {"blend": {"preamble_tokens": len(PREAMBLE), "documents": places}}}
    return FakeBlendRequest(name, ids + QUERY, wish, **fields)


def assert_exact(engine: BlendEngine, asked: FakeBlendRequest, blocks: list[int], stop: int) -> None:
    _, cache = full_prefill(engine.model, asked.all_token_ids)
    for (keys, values), layer in zip(engine.read(blocks, stop), cache.layers, strict=True):
        torch.testing.assert_close(keys, layer.keys[0, :, :stop], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(values, layer.values[0, :, :stop], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("local", [0, BLOCK, 5 * BLOCK])
def test_blocks_hold_what_a_full_prefill_computes(engines: Engines, local: int) -> None:
    engine = engines.make(ratio=1.0)
    asked = request()
    external, blocks = engine.blend(asked, local)
    assert engine.planner.busy
    stop = len(asked.all_token_ids) - len(QUERY)
    assert external == stop - local
    assert (engine.worker.finished(), engine.worker.bad_blocks()) == ({"r"}, set())
    assert_exact(engine, asked, blocks, stop)
    (found,) = engine.report()
    assert not engine.planner.busy
    assert found.reason is None
    assert found.exact_tokens == local
    assert engine.worker.counts()["blended_tokens"] == found.reused_tokens > 0
    answer = engine.planner.finished(asked)
    assert answer is not None
    assert answer["kvstore"]["blended"]["token_share"] == 1.0


def test_without_recomputing_blocks_hold_what_was_stored(engines: Engines) -> None:
    engine = engines.make("none")
    asked = request()
    _, blocks = engine.blend(asked)
    with pytest.raises(AssertionError):
        assert_exact(engine, asked, blocks, len(asked.all_token_ids) - len(QUERY))
    alone = PREAMBLE + DOCUMENTS[0]
    _, cache = full_prefill(engine.model, alone)
    start = len(PREAMBLE) + 3 + len(DOCUMENTS[2])
    for (_, values), layer in zip(engine.read(blocks, start + len(DOCUMENTS[0])), cache.layers, strict=True):
        torch.testing.assert_close(values[:, start:], layer.values[0, :, len(PREAMBLE) :], rtol=0, atol=TOLERANCE)


def test_a_known_prefix_is_loaded_as_it_is(engines: Engines) -> None:
    engine = engines.make(ratio=1.0)
    asked = request()
    _, cache = full_prefill(engine.model, asked.all_token_ids)
    parent = ROOT
    for index, key in enumerate(engine.scheme("").chain(asked.all_token_ids)[:2]):
        tokens = slice(index * CHUNK, (index + 1) * CHUNK)
        arrays = [
            (layer.keys[0, :, tokens].numpy().view("u4"), layer.values[0, :, tokens].numpy().view("u4"))
            for layer in cache.layers
        ]
        meta = ChunkMeta(
            fingerprint=FINGERPRINT, key=key, spec=engine.spec, tokens=CHUNK, parent=parent, first_position=tokens.start
        )
        buffer, parent = bytearray(1 << 16), key
        nbytes = encode_chunk(registry.get("raw", ROOT), meta, arrays, memoryview(buffer))
        engines.store.chunks[key] = bytes(buffer[:nbytes])
    for local in (0, BLOCK):
        asked = request(f"local{local}")
        _, blocks = engine.blend(asked, local)
        assert_exact(engine, asked, blocks, len(asked.all_token_ids) - len(QUERY))
        (found,) = engine.report()
        assert found.reason is None
        assert found.exact_tokens == 2 * CHUNK
        assert found.reused_tokens > 0


def test_nothing_of_a_blended_request_is_stored(engines: Engines) -> None:
    engine = engines.make()
    before = dict(engines.store.chunks)
    engines.store.calls.clear()
    asked = request()
    engine.blend(asked)
    scheduled = {"r": len(asked.all_token_ids)}
    assert engine.planner.documents(scheduled, lambda _: []) == []
    assert "put" not in engines.store.calls
    assert engines.store.chunks == before


def drop(store: MemoryClient, key: bytes) -> None:
    del store.chunks[key]


def damage(store: MemoryClient, key: bytes) -> None:
    spoilt = bytearray(store.chunks[key])
    spoilt[-3] ^= 1
    store.chunks[key] = bytes(spoilt)


def foreign(store: MemoryClient, key: bytes) -> None:
    other = next(other for other in store.chunks if other != key and len(store.chunks[other]) == len(store.chunks[key]))
    store.chunks[key] = store.chunks[other]


@pytest.mark.parametrize(
    ("spoil", "reasons"),
    [(drop, {Reason.ABSENT}), (damage, {Reason.CORRUPT}), (foreign, {Reason.WRONG_KEY})],
    ids=["missing", "damaged", "foreign"],
)
def test_a_piece_that_is_not_to_be_had_means_a_full_prefill(
    engines: Engines, spoil: Callable[[MemoryClient, bytes], None], reasons: set[Reason]
) -> None:
    engine = engines.make(ratio=1.0)
    asked = request()
    external = engine.matched(asked, BLOCK)
    blocks = engine.blocks(len(asked.all_token_ids))
    engine.planner.allocated(asked, blocks, external)
    (job,) = engine.planner.take_jobs()
    full = [piece for piece in job.pieces if piece.stop - piece.start == 8]
    spoil(engines.store, full[0].key)
    engine.worker.start([job])
    engine.worker._loader.submit(int).result(20)
    engine.worker.advance()
    assert engine.worker.finished() == {"r"}
    assert engine.worker.bad_blocks() == set(job.block_ids[1:])
    (found,) = engine.report()
    assert found.reason in reasons
    assert engine.planner.matched(asked, 0) == 0, "it is computed in full now"
    assert engine.planner.take_counts() == {f"unblended_{found.reason}": 1}
    assert full[0].key not in engines.store.chunks
    answer = engine.planner.finished(asked)
    assert answer is not None
    assert answer["kvstore"]["refused"] == str(found.reason)
    for document in DOCUMENTS:  # what was bad has been deleted, so that it can be stored again
        engine.store_document(PREAMBLE, document)
    again = request("again")
    _, blocks = engine.blend(again)
    assert_exact(engine, again, blocks, len(again.all_token_ids) - len(QUERY))


def test_a_store_that_breaks_its_promise_and_a_model_that_is_not_known(engines: Engines) -> None:
    engine = engines.make()
    engine.finder.found = "the model has not been called yet"
    engine.blend(request("early"))

    def fetch(*args: Any, **kwargs: Any) -> Iterator[Part]:
        raise RuntimeError("injected")

    engines.store.fetch = fetch  # type: ignore[method-assign]
    engine.blend(request("broken"))
    assert engine.worker.finished() == {"early", "broken"}
    found = engine.report()
    assert [(blend.reason, blend.detail) for blend in found] == [
        (Reason.UNAVAILABLE, "the model has not been called yet"),
        (Reason.UNAVAILABLE, "RuntimeError: injected"),
    ]


@pytest.mark.parametrize(("deadline_ms", "says"), [(1e-6, "it waited"), (0.02, "")])
def test_what_comes_too_late_is_given_up(engines: Engines, deadline_ms: float, says: str) -> None:
    engine = engines.make(blend={"deadline_ms": deadline_ms})
    engine.blend(request())
    (found,) = engine.report()
    assert found.reason is Reason.DEADLINE
    assert says in found.detail


def test_kv_of_a_lossy_codec_is_not_used(engines: Engines) -> None:
    engine = engines.make()
    for key, container in list(engines.store.chunks.items()):
        header = parse(memoryview(container))
        if header.codec == "raw":
            spec, tokens = header.meta.spec, header.meta.tokens
            arrays = spec.arrays(bytearray(spec.chunk_bytes(tokens)), tokens)
            decode_chunk(memoryview(container), arrays, registry.get)
            lossy = registry.get("int8", ROOT)
            buffer = bytearray(encoded_bytes_max(lossy, spec, tokens))
            engines.store.chunks[key] = bytes(buffer[: encode_chunk(lossy, header.meta, arrays, memoryview(buffer))])
    before = dict(engines.store.chunks)
    engine.blend(request())
    (found,) = engine.report()
    assert found.reason is Reason.UNGATED
    assert "'int8' is lossy" in found.detail
    assert engines.store.chunks == before, "it is good enough for others"


def test_salts_keep_blended_kv_apart(engines: Engines) -> None:
    engine = engines.make(planner={"caches_prefixes": True}, stored=False)
    for document in DOCUMENTS:
        engine.store_document(PREAMBLE, document)
    unsalted = request("unsalted")
    assert engine.matched(unsalted) == 0
    answer = engine.planner.finished(unsalted)
    assert answer is not None
    assert answer["kvstore"]["refused"] == "salt"
    assert SALT_PREFIX in answer["kvstore"]["detail"]
    assert engine.matched(request("salted", cache_salt=SALT_PREFIX + "a")) > 0
    ordinary = FakeBlendRequest("ordinary", [1, 2, 3])
    follower = FakeBlendRequest("follower", [1, 2, 3], cache_salt=SALT_PREFIX + "a")
    assert not engine.planner.add(ordinary)
    assert engine.planner.add(follower), "it may be behind blended KV, so nothing of it is saved"
    assert engine.matched(follower) == 0
    answer = engine.store_document(PREAMBLE, [5, 6, 7], cache_salt=SALT_PREFIX + "a")
    assert answer is not None
    assert answer["kvstore"]["refused"] == "salt"


BAD_WISHES: list[tuple[Any, str]] = [
    ({"blend": {"documents": [[0, 0]]}}, "is empty"),
    ({"blend": {"documents": [[4, 9], [8, 12]]}}, "before documents[0] ends"),
    ({"blend": {"documents": [[4, 2000]]}}, "the prompt has"),
    ({"blend": {"documents": [[2, 9]], "preamble_tokens": 5}}, "before the preamble ends"),
    ({"blend": {"document": [[4, 9]]}}, "unknown field `document`"),
    ({"blend": {}, "store_document": {}}, "send two requests"),
    ({"store_document": {"preamble_tokens": 2000}}, "no document"),
    ("yes", "Expected `object`"),
]


@pytest.mark.parametrize(("wish", "says"), BAD_WISHES)
def test_wishes_that_make_no_sense_are_answered_with_the_field(engines: Engines, wish: Any, says: str) -> None:
    engine = engines.make(stored=False)
    asked = FakeBlendRequest("r", list(range(40)), {"kvstore": wish})
    assert engine.matched(asked) == 0
    answer = engine.planner.finished(asked)
    assert answer is not None
    assert answer["kvstore"]["refused"] == "malformed"
    assert says in answer["kvstore"]["detail"]


class NoPlans:
    """A store that does not answer."""

    def ask(self, tokens: object, asked: object) -> Future[Plan]:
        return Future()


@pytest.mark.parametrize(("deadline_ms", "answer"), [(1e6, None), (-1.0, 0)])
def test_a_plan_is_waited_for_until_its_deadline(deadline_ms: float, answer: int | None) -> None:
    planner = BlendPlanner(
        NoPlans(), lambda _: None, block_tokens=BLOCK, lookup_deadline_ms=deadline_ms, caches_prefixes=False
    )
    asked = request()
    planner.add(asked)
    assert planner.matched(asked, 0) == answer
    assert planner.take_counts() == ({} if answer is None else {"unblended_deadline": 1})


@pytest.mark.parametrize(
    ("reads", "lora", "says"), [(False, None, "producer"), (True, object(), "lora")], ids=["role", "input"]
)
def test_requests_that_cannot_be_served_say_why(reads: bool, lora: object, says: str) -> None:
    planner = BlendPlanner(
        NoPlans(), lambda _: None, block_tokens=BLOCK, lookup_deadline_ms=1, caches_prefixes=False, reads=reads
    )
    asked = request(lora_request=lora)
    planner.add(asked)
    assert planner.matched(asked, 0) == 0
    answer = planner.finished(asked)
    assert answer is not None
    assert answer["kvstore"]["refused"] == says


def test_a_document_is_not_stored_by_an_engine_that_only_reads() -> None:
    planner = BlendPlanner(
        NoPlans(), lambda _: None, block_tokens=BLOCK, lookup_deadline_ms=1, caches_prefixes=False, writes=False
    )
    asked = FakeBlendRequest("d", [1, 2, 3], {"kvstore": {"store_document": {}}})
    planner.add(asked)
    assert planner.documents({"d": 3}, lambda _: [0]) == []
    assert planner.take_counts() == {"unblended_consumer": 1}
