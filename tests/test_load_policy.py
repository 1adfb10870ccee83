"""Connectors load what comes sooner than it is computed, stop waiting when it does not, and say so."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from kvstore import gate
from kvstore.client import Part
from kvstore.codecs import registry
from kvstore.connector import Loaded
from kvstore.connectors.prefix import LoadPolicy, PrefixStore, replaceable
from kvstore.connectors.transformers import TransformersConnector
from kvstore.cost import CostModel
from kvstore.errors import ConfigError
from kvstore.keys import KeyScheme
from kvstore.outcome import Lookup, Reason
from kvstore.spec import KVArrays
from kvstore.testing import lossy_chunks as lossy
from kvstore.testing.chunks import FINGERPRINT, sample_kv, sample_spec
from kvstore.testing.lossy import gaussian
from kvstore.testing.memory_client import TIER, FaultyClient, MemoryClient
from kvstore.testing.models import VOCABULARY, random_model

SPEC = sample_spec()
CHUNK, CHUNKS = 8, 6
TOKENS = list(range(CHUNK * CHUNKS + 1))


class Memory:
    """KV of TOKENS in one flat array."""

    def __init__(self) -> None:
        self.arrays = SPEC.arrays(sample_kv(SPEC, len(TOKENS), 1), len(TOKENS))

    def writable(self, start: int, stop: int) -> KVArrays:
        return self.readable(start, stop)

    def commit(self, start: int, stop: int) -> None:
        pass

    def readable(self, start: int, stop: int) -> KVArrays:
        return [(keys[:, start:stop], values[:, start:stop]) for keys, values in self.arrays]


def prefixes(client: MemoryClient, costs: CostModel, policy: LoadPolicy = "cost") -> PrefixStore:
    keys = KeyScheme(FINGERPRINT, chunk_tokens=CHUNK)
    return PrefixStore(client, SPEC, keys, registry.get("raw"), load_policy=policy, costs=costs)


def filled() -> FaultyClient:
    client = FaultyClient()
    store = prefixes(client, CostModel())
    assert store.store(store.chain(TOKENS), 0, Memory()).chunks == CHUNKS
    client.calls.clear()
    return client


def load(store: PrefixStore) -> Loaded:
    return store.load(store.chain(TOKENS), Memory(), len(TOKENS))


def computing(chunk_ms: float) -> CostModel:
    """An engine that takes so long for a chunk."""
    costs = CostModel()
    costs.observe_prefill(tokens=CHUNK * 10, context=0, ms=10 * chunk_ms)
    return costs


def test_a_load_that_would_be_slower_is_not_begun() -> None:
    client, costs = filled(), computing(1.0)
    costs.observe_load(TIER, nbytes=1000, ms=500.0)
    loaded = load(prefixes(client, costs))
    assert client.calls == ["lookup"]
    assert loaded.chunks == 0
    assert loaded.stop is not None
    assert loaded.stop.reason == Reason.NOT_WORTH_IT
    assert loaded.stop.detail.startswith("loading the rest from memory would take")
    assert [miss.reason for miss in loaded.misses.values()] == [Reason.NOT_WORTH_IT, *[Reason.PARENT_ABSENT] * 5]


def test_a_load_that_pays_is_made_and_learned_from() -> None:
    client, costs = filled(), computing(10_000.0)
    loaded = load(prefixes(client, costs))
    assert (loaded.chunks, loaded.stop, loaded.misses) == (CHUNKS, None, {})
    assert costs.load(TIER) is not None
    assert costs.decode("raw") is not None
    assert client.calls == ["lookup", "fetch", "fetch"]  # one chunk to see how fast it is, then the rest
    assert load(prefixes(client, costs)).chunks == CHUNKS
    assert client.calls[3:] == ["lookup", "fetch"]


def test_a_store_that_stalls_is_left_and_what_has_come_is_kept() -> None:
    client, costs = filled(), computing(200.0)
    client.before_part = lambda index: time.sleep(3.0) if index == 1 and len(client.calls) > 2 else None
    started = time.monotonic()
    loaded = load(prefixes(client, costs))
    assert time.monotonic() - started < 30.0
    assert 1 <= loaded.chunks < CHUNKS
    assert loaded.stop is not None
    assert loaded.stop.reason == Reason.NOT_WORTH_IT
    assert loaded.nbytes == sum(len(client.chunks[key]) for key in list(client.chunks)[: loaded.chunks])


def test_a_store_that_says_late_at_once_is_not_asked_for_ever() -> None:
    client, costs = filled(), computing(10_000.0)
    client.miss[list(client.chunks)[3]] = Reason.DEADLINE
    loaded = load(prefixes(client, costs))
    assert loaded.chunks == 3
    assert client.calls.count("fetch") <= 3


def test_always_loads_whatever_it_takes() -> None:
    client, costs = filled(), computing(0.001)
    costs.observe_load(TIER, nbytes=1000, ms=500.0)
    assert load(prefixes(client, costs, "always")).chunks == CHUNKS


@pytest.mark.parametrize("sizes", [(), (1,), (-5,) * CHUNKS])
def test_sizes_that_a_store_does_not_tell_are_done_without(sizes: Sequence[int]) -> None:
    class Vague(FaultyClient):
        def lookup(self, keys: Sequence[bytes]) -> Lookup:
            return Lookup((TIER,) * len(keys), None, tuple(sizes))

    client = Vague()
    client.chunks = filled().chunks
    assert load(prefixes(client, computing(10_000.0))).chunks == CHUNKS


def test_a_policy_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="load_policy is 'never'; use one of cost, always"):
        prefixes(FaultyClient(), CostModel(), "never")  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", ["prefill", "generate"])
def test_an_engine_is_observed_and_a_slow_store_is_gone_around(verb: str) -> None:
    client = FaultyClient()
    connector = TransformersConnector(random_model(), client, chunk_tokens=16, codec="raw")
    prompt = torch.from_numpy(np.random.default_rng(3).integers(3, VOCABULARY, (1, 100)))

    def report(client: FaultyClient) -> tuple[int, Reason | None]:
        if verb == "prefill":
            got = connector.prefill(prompt)[2]
        else:
            got = connector.generate(prompt, max_new_tokens=1, do_sample=False)[1][0]
        return got.loaded_chunks, got.stop.reason if got.stop else None

    assert report(client) == (0, Reason.ABSENT)
    client.before_part = lambda _: time.sleep(2.0)
    started = time.monotonic()
    seen = [report(client) for _ in range(4)]
    assert time.monotonic() - started < 40.0
    assert seen[-1] == (0, Reason.NOT_WORTH_IT)


class Recording(FaultyClient):
    """Notes the `max_quality` of every fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int | None] = []

    def fetch(self, keys: Sequence[bytes], **options: Any) -> Iterator[Part]:
        self.asked.append(options["max_quality"])
        return super().fetch(keys, **options)


class LossyMemory:
    """KV of eight lossy chunks."""

    def __init__(self) -> None:
        tokens = 8 * lossy.TOKENS
        self.arrays = lossy.SPEC.arrays(np.zeros(lossy.SPEC.chunk_bytes(tokens), np.uint8), tokens)
        for layer, (keys, values) in enumerate(gaussian(lossy.SPEC, tokens, 3)):
            self.arrays[layer][0][:] = keys
            self.arrays[layer][1][:] = values

    def writable(self, start: int, stop: int) -> KVArrays:
        return [(keys[:, start:stop].copy(), values[:, start:stop].copy()) for keys, values in self.arrays]

    def commit(self, start: int, stop: int) -> None:
        pass

    def readable(self, start: int, stop: int) -> KVArrays:
        return [(keys[:, start:stop], values[:, start:stop]) for keys, values in self.arrays]


def lossy_prefixes(client: FaultyClient, costs: CostModel, passed: Sequence[int], **options: Any) -> PrefixStore:
    return PrefixStore(
        client,
        lossy.SPEC,
        KeyScheme(FINGERPRINT, chunk_tokens=lossy.TOKENS, extras={"lossy": 1}),
        registry.get("ladder"),
        limits=gate.STANDARD,
        gates=[lossy.passes("ladder", *passed)],
        costs=costs,
        **options,
    )


@pytest.mark.parametrize(
    ("passed", "load_ms", "first"), [([0, 1, 2, 3], 32_000.0, 0), ([1, 2, 3], 12_000.0, 1), ([2, 3], 12_000.0, 2)]
)
def test_a_slow_store_is_asked_for_the_lowest_level_that_may_be_served(
    passed: list[int], load_ms: float, first: int
) -> None:
    client, _, store, chain = slow_lossy_store(passed, load_ms)
    loaded = store.load(chain, LossyMemory(), 8 * lossy.TOKENS)
    assert client.asked[0] == first
    assert loaded.chunks == 8
    assert loaded.nbytes < sum(map(len, client.chunks.values()))


def test_a_slow_store_that_may_serve_only_all_levels_is_not_asked() -> None:
    client, _, store, chain = slow_lossy_store([3], 12_000.0)
    loaded = store.load(chain, LossyMemory(), 8 * lossy.TOKENS)
    assert client.asked == []
    assert loaded.stop is not None
    assert loaded.stop.reason == Reason.NOT_WORTH_IT


def slow_lossy_store(
    passed: Sequence[int], load_ms: float
) -> tuple[Recording, CostModel, PrefixStore, Sequence[bytes]]:
    """Eight chunks, each worth 2 s of computing, in a store seen to take `load_ms` for all levels of all of them."""
    client, costs = Recording(), CostModel()
    costs.observe_prefill(tokens=lossy.TOKENS, context=0, ms=2_000.0)
    store = lossy_prefixes(client, costs, passed, load_deadline_ms=10_000.0)
    chain = store.chain(list(range(8 * lossy.TOKENS)))
    assert store.store(chain, 0, LossyMemory()).chunks == 8
    assert store.load(chain, LossyMemory(), 8 * lossy.TOKENS).chunks == 8
    assert set(client.asked) == {None}
    for _ in range(8):
        costs.observe_load(TIER, nbytes=sum(map(len, client.chunks.values())), ms=load_ms)
    client.asked.clear()
    return client, costs, store, chain


def test_a_level_that_turns_out_not_to_be_served_replaces_nothing() -> None:
    _, _, store, chain = slow_lossy_store([0, 1, 2, 3], 32_000.0)
    store._gates = [lossy.passes("ladder", 3)]
    loaded = store.load(chain, LossyMemory(), 8 * lossy.TOKENS)
    assert loaded.stop is not None
    assert loaded.stop.reason == Reason.NOT_WORTH_IT
    assert "may not be served" in loaded.stop.detail
    assert not replaceable(loaded)
